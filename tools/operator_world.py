"""What the operator stands among, without nodes: a control plane, the hub, the bus, its rights."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import httpx
import yaml
from pydantic import SecretStr

from esper.configs import OperatorConfig
from esper.services.urza.auth import Role, Tokens
from esper_operator.rbac import manifests
from tools.cluster.control_plane import ControlPlane, wait_for
from tools.operator_process import OperatorProcess, Settings
from tools.servers.process import new_password
from tools.servers.redis_server import RedisServer
from tools.servers.tcp_proxy import TcpProxy
from tools.stack import SOURCES, EsperProcess

OWN_NAMESPACE = "esper-system"
ACCOUNT = f"system:serviceaccount:{OWN_NAMESPACE}:esper-operator"
GROUP = "/apis/esper.dev/v1alpha1"
CHANGES = {"create", "update", "patch", "delete"}
"""The verbs that change an object."""


class HubAndBus:
    """Urza over SQLite, and a Redis: all that the operator asks beside the API server."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where they keep their data."""
        self._key = new_password() + new_password()
        self.redis = RedisServer(folder / "redis", password=new_password())
        self.folder = folder
        self.urza = EsperProcess(folder / "urza", "urza", self._for_urza)

    def token(self, role: Role) -> str:
        """A token for the hub."""
        return Tokens(SecretStr(self._key)).mint(role, f"test-{role.value}")

    def namespaces(self) -> list[str]:
        """Those in which a sweep may find something."""
        headers = {"Authorization": f"Bearer {self.token(Role.ADMIN)}"}
        answer = httpx.get(f"{self.urza.url}/internal/namespaces", headers=headers, trust_env=False)
        answer.raise_for_status()
        return list(answer.json()["namespaces"])

    def settings(self) -> dict[str, dict[str, Any]]:
        """What the operator needs to know of them."""
        place = self.redis.url.partition("://")[2].rpartition("@")[2]
        return {
            "hub": {"url": self.urza.url, "token": self.token(Role.ADMIN)},
            "redis": {"url": f"redis://{place}"},
        }

    def __enter__(self) -> Self:
        self.redis.start()
        self.urza.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.urza.stop()
        self.redis.stop()

    def _for_urza(self, port: int) -> Settings:
        return {
            "database": {"url": f"sqlite+aiosqlite:///{self.folder.resolve()}/hub.sqlite"},
            "redis": {"url": self.redis.url},
            "storage": {"folder": str(self.folder.resolve() / "artifacts")},
            "urza": {"port": port, "signing_key": self._key},
        }


class OperatorWorld:
    """A control plane with Esper's kinds and the operator's rights, a hub and a bus.

    Args:
        folder: where everything is kept.
        plane: a control plane that runs.
        namespaces: those that the operator may serve; none for the whole cluster.
        own: the namespace of the operator itself, of its account and its lease.
    """

    def __init__(
        self, folder: Path, plane: ControlPlane, *, namespaces: str = "", own: str = OWN_NAMESPACE
    ) -> None:
        self.folder = folder
        self.plane = plane
        self.namespaces = namespaces
        self.own = own
        self.hub = HubAndBus(folder / "hub")
        self._stack = ExitStack()
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.hub)
            self.install()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def install(self) -> None:
        """The CustomResourceDefinitions and what the operator may do."""
        install(self.plane, own=self.own, namespaces=self.namespaces)

    def operator(
        self, *, through: TcpProxy | None = None, kubeconfig: Path | None = None, **settings: Any
    ) -> OperatorProcess:
        """An operator, not started; `settings` are of its section, the way may be a proxy's."""
        config = kubeconfig or self.plane.kubeconfig("esper-operator", self.own, through=through)
        section = {
            "kubeconfig": str(config),
            "namespaces": self.namespaces,
            "lease_namespace": self.own,
            **settings,
        }
        given: dict[str, Mapping[str, Any]] = {**self.hub.settings(), "operator": section}
        return OperatorProcess(self.folder / f"operator-{next(self._numbers)}", given)

    def changes(self, namespace: str) -> list[dict[str, Any]]:
        """What the operator asked to change in a namespace, by the API server's audit log."""
        account = f"system:serviceaccount:{self.own}:esper-operator"
        return [
            event
            for event in self.plane.requests(account)
            if event["objectRef"].get("namespace") == namespace and event["verb"] in CHANGES
        ]

    def session(self, name: str, *, spec: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The manifest of a session of two workers."""
        given: dict[str, Any] = {
            "model": {"entrypoint": "esper.zoo.models:MLP"},
            "data": {"entrypoint": "esper.zoo.data:spirals"},
            "workers": {"replicas": 2},
            **(spec or {}),
        }
        return {
            "apiVersion": "esper.dev/v1alpha1",
            "kind": "TrainingSession",
            "metadata": {"name": name},
            "spec": given,
        }


def install(plane: ControlPlane, *, own: str = OWN_NAMESPACE, namespaces: str = "") -> None:
    """Esper's kinds, and what an operator in the namespace `own` may do."""
    with plane.client() as client:
        if client.get(f"/api/v1/namespaces/{own}").status_code == httpx.codes.NOT_FOUND:
            plane.create_namespace(own)
    plane.install(SOURCES / "crds")
    allow(plane, own=own, namespaces=namespaces)


def allow(plane: ControlPlane, *, own: str, namespaces: str = "") -> None:
    """What an operator in the namespace `own`, which is there, may do in those that it serves."""
    config = OperatorConfig(namespaces=namespaces, lease_namespace=own)
    roles = manifests(config, namespaced=bool(namespaces))
    plane.kubectl("apply", "-f", "-", given=yaml.safe_dump_all(roles))


class Watching:
    """A watch, read by a thread: each object as it came to be, and when that was heard."""

    def __init__(self, plane: ControlPlane, path: str, version: str) -> None:
        """`path` is that of a list, `version` the one from which on it is watched."""
        self._heard: SimpleQueue[tuple[float, dict[str, Any]]] = SimpleQueue()
        self._client = plane.client()
        self._query = {"watch": "true", "resourceVersion": version}
        self._path = path
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def take(self) -> list[tuple[float, dict[str, Any]]]:
        """What was heard since the last call; times are by the monotonic clock."""
        return [self._heard.get() for _ in range(self._heard.qsize())]

    def close(self) -> None:
        """Stop to watch."""
        self._client.close()

    def _read(self) -> None:
        with (
            suppress(httpx.HTTPError, RuntimeError, OSError),
            self._client.stream("GET", self._path, params=self._query, timeout=None) as answer,
        ):
            for line in answer.iter_lines():
                self._heard.put((time.monotonic(), json.loads(line)["object"]))


class Objects:
    """Objects of one namespace, as one sees them who may do everything."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        """`namespace` is there."""
        self.namespace = namespace
        self._plane = plane
        self._client = plane.client()

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Make an object at a path of the namespace, as in `GROUP/trainingsessions`."""
        answer = self._client.post(self._at(path), json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def get(self, path: str) -> dict[str, Any] | None:
        """The object, or the list; None where there is none."""
        answer = self._client.get(self._at(path))
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def items(self, path: str) -> list[dict[str, Any]]:
        """What is in a list."""
        found = self.get(path)
        return [] if found is None else list(found["items"])

    def delete(self, path: str, *, grace_seconds: int | None = None) -> None:
        """Delete an object; a pod may be told for how long it may take to end."""
        query: dict[str, str | int] = {"propagationPolicy": "Background"}
        if grace_seconds is not None:
            query["gracePeriodSeconds"] = grace_seconds
        self._client.delete(self._at(path), params=query)

    def merge(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Merge a patch into an object, or into its status."""
        answer = self._client.patch(
            self._at(path),
            content=json.dumps(body),
            headers={"Content-Type": "application/merge-patch+json"},
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def watch(self, path: str) -> Watching:
        """What happens to the objects of a list from now on."""
        found = self.get(path) or {}
        return Watching(self._plane, self._at(path), found["metadata"]["resourceVersion"])

    def condition(self, session: str, kind: str = "Succeeded") -> dict[str, Any]:
        """A condition of a session; empty before it is there."""
        found = self.get(f"{GROUP}/trainingsessions/{session}") or {}
        conditions = found.get("status", {}).get("conditions", ())
        return next((item for item in conditions if item["type"] == kind), {})

    def wait(self, session: str, status: str, *, seconds: float = 30.0) -> dict[str, Any]:
        """The condition Succeeded of a session, once it has that status."""
        found: dict[str, Any] = wait_for(
            lambda: (c := self.condition(session)).get("status") == status and c,
            f"{session} is not {status}",
            seconds=seconds,
        )
        return found

    def _at(self, path: str) -> str:
        root, _, rest = path.strip("/").partition("/")
        api = {"api": 1, "apis": 2}[root]
        parts = rest.split("/")
        within = ["namespaces", self.namespace]
        return "/" + "/".join([root, *parts[:api], *within, *parts[api:]])
