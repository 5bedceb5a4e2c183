"""Every service as a process: Redis, Postgres, an S3 server, Urza, workers of Tezzeret, Tamiyo.

From packages alone, on the loopback, with credentials made for the occasion. Each part can be
killed, frozen and started again on its own port and data; see `tools.servers.process`.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from pydantic import SecretStr

from esper.services.urza.auth import Role, Tokens
from tools.servers.postgres import PostgresServer
from tools.servers.process import HOST, PROBE_SECONDS, ServerProcess, new_password
from tools.servers.redis_server import RedisServer
from tools.servers.s3 import S3Server

SOURCES = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCES)}
"""Of every process of Esper: one thread, and the sources that these tools lie beside."""

BUCKET = "kernels"
DATABASE = "esper"

Settings = Mapping[str, Mapping[str, Any]]


class EsperProcess(ServerProcess):
    """`esper serve SERVICE` as a process, with its health endpoints on `port`.

    Its settings are a file in its folder that only its owner reads: arguments and environments
    can be read by others.
    """

    def __init__(self, folder: Path, service: str, settings: Callable[[int], Settings]) -> None:
        """`settings` are those of the service, given its port."""
        super().__init__(folder)
        self.name = folder.name
        self._service = service
        self._settings = settings

    @property
    def url(self) -> str:
        """Where it tells of its health."""
        return f"http://{HOST}:{self.port}"

    def ready(self) -> str | None:
        """None once it is ready; else what is in the way, in one line."""
        status, text = self._asked("/readyz")
        if status == 200:
            return None
        return " ".join(text.split()) or f"no answer ({status})"

    def metrics(self) -> str:
        """Its numbers in Prometheus' text form."""
        return self._asked("/metrics")[1]

    def _asked(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=PROBE_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read().decode()
        except OSError as error:
            return 0, str(error)

    def _prepare(self) -> None:
        write_settings(self.folder / "esper.yaml", self._settings(self.port))

    def _command(self) -> Sequence[str]:
        return [sys.executable, "-m", "esper", "serve", self._service]

    def _environment(self) -> Mapping[str, str]:
        return ENVIRONMENT

    def _answers(self) -> bool:
        return self._asked("/healthz")[0] == 200


class Stack:
    """All services over one folder; a context manager. A second start finds the data of the first.

    Args:
        folder: where everything is kept.
        workers: of Tezzeret.
        tamiyo: whether there is a controller; in a cluster the operator makes it.
        settings: laid over those of every service, by section.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 2,
        tamiyo: bool = True,
        settings: Settings | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self._more = dict(settings or {})
        self._key = new_password() + new_password()
        self.redis = RedisServer(self.folder / "redis", password=new_password())
        self.postgres = PostgresServer(self.folder / "postgres")
        self.s3 = S3Server(self.folder / "s3")
        self.urza = EsperProcess(self.folder / "urza", "urza", self._for_urza)
        self.tamiyo = EsperProcess(self.folder / "tamiyo", "tamiyo", self._for_tamiyo)
        self._has_tamiyo = tamiyo
        self.workers = [
            EsperProcess(self.folder / f"tezzeret-{n}", "tezzeret", self._for_worker)
            for n in range(1, workers + 1)
        ]

    @property
    def services(self) -> tuple[EsperProcess, ...]:
        """Esper's own, in the order in which they start."""
        return (self.urza, *self.workers, *([self.tamiyo] * self._has_tamiyo))

    @property
    def parts(self) -> dict[str, ServerProcess]:
        """Everything by its name, in the order in which it starts."""
        everything = (self.redis, self.postgres, self.s3, *self.services)
        return {part.name: part for part in everything}

    @property
    def client_settings(self) -> Path:
        """The settings with which `esper run` uses these services; they hold a token."""
        return self.folder / "client.yaml"

    def start(self) -> Self:
        """Start everything; returns when all of it answers.

        Raises:
            ServerError: something can't be had; what was started is stopped.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_secrets()
        try:
            for server in (self.redis, self.postgres, self.s3):
                server.start()
            self._make_rooms()
            for service in self.services:
                service.start()
        except BaseException:
            self.stop()
            raise
        write_settings(self.client_settings, self.client())
        return self

    def stop(self) -> None:
        """Stop everything, the last first."""
        for part in reversed(list(self.parts.values())):
            part.stop()

    def client(self) -> Settings:
        """What a session's `esper run` needs: the hub, a token, the bus."""
        return self._with(
            {
                "hub": {"url": self.urza.url, "token": self.token(Role.WORKER)},
                "redis": {"url": self.redis.url},
            }
        )

    def for_operator(self) -> Settings:
        """What the operator of a cluster needs: the hub, with the right to let others in."""
        place = self.redis.url.partition("://")[2].rpartition("@")[2]
        return self._with(
            {
                "hub": {"url": self.urza.url, "token": self.token(Role.ADMIN)},
                "redis": {"url": f"redis://{place}"},
            }
        )

    def token(self, role: Role) -> str:
        """A token for the hub."""
        return Tokens(SecretStr(self._key)).mint(role, f"local-{role.value}")

    def _for_urza(self, port: int) -> Settings:
        return self._with(
            {
                "database": {"url": self.postgres.database_url(DATABASE)},
                "redis": {"url": self.redis.url},
                "storage": {
                    "bucket": BUCKET,
                    "endpoint_url": self.s3.url,
                    "region": self.s3.region,
                    "access_key_id": self.s3.access_key_id,
                    "secret_access_key": self.s3.secret_access_key,
                },
                "urza": {"port": port, "signing_key": self._key},
                "component": {"log_level": "info"},
            }
        )

    def _for_worker(self, port: int) -> Settings:
        return self._with(
            {
                "hub": {"url": self.urza.url, "token": self.token(Role.WORKER)},
                "redis": {"url": self.redis.url},
                "component": {"log_level": "info", "health_port": port},
            }
        )

    def _for_tamiyo(self, port: int) -> Settings:
        return self._with(
            {
                "redis": {"url": self.redis.url},
                "component": {"log_level": "info", "health_port": port},
            }
        )

    def _with(self, settings: Settings) -> Settings:
        """`settings` with those that the stack was given laid over them."""
        names = {*settings, *self._more}
        return {
            name: {**settings.get(name, {}), **self._more.get(name, {})} for name in sorted(names)
        }

    def _keep_secrets(self) -> None:
        """The passwords of the first start hold for the data of later ones."""
        path = self.folder / "secrets.yaml"
        if path.is_file():
            kept = yaml.safe_load(path.read_text())
            self._key, self.redis.password = kept["signing_key"], kept["redis"]
        else:
            write_settings(path, {"signing_key": self._key, "redis": self.redis.password})

    def _make_rooms(self) -> None:
        """The database and the bucket, unless an earlier start has made them."""
        buckets = self.s3.client().list_buckets()["Buckets"]
        if BUCKET not in {bucket["Name"] for bucket in buckets}:
            self.s3.create_bucket(BUCKET)
        found = self.postgres.execute("SELECT datname FROM pg_database").split()
        if DATABASE not in found:
            self.postgres.create_database(DATABASE)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write a file of settings that only its owner reads."""
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump({k: _plain(v) for k, v in settings.items()}))


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value
