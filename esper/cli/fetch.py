"""`esper fetch`: what a finished session of a cluster has left, as `esper run` leaves it.

The session and the token that opens its results are read with kubectl, by the rights of the person
who asks; the hub is reached through a forwarded port, unless it has an address outside.
"""

from __future__ import annotations

import argparse
import base64
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from esper.cli.output import write_json, write_note, write_result
from esper.errors import BadInput, NotFound

if TYPE_CHECKING:
    from esper.cli.kubectl import Kubectl
    from esper.configs import EsperConfig

HELP = "fetch the grown model and the report of a session that a cluster has trained"

# What the operator calls them; it does not belong to what is installed here.
_SECRET, _SETTINGS, _TOKEN = "{}-esper", "esper.yaml", "hub-token"
_SERVICE = re.compile(r"([a-z0-9-]+)\.([a-z0-9-]+)\.svc(\..+)?")
"""The host of a Service: its name, its namespace, and the cluster's domain."""
_MODEL = "model.safetensors"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    command.add_argument("session", metavar="SESSION", help="name of a TrainingSession")
    command.add_argument(
        "--namespace", "-n", metavar="N", help="its namespace (default: that of kubectl)"
    )
    command.add_argument(
        "--output-dir", type=Path, metavar="D", help="where it goes (default: runs/SESSION)"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace the run that the directory holds"
    )
    command.add_argument(
        "--hub", metavar="URL", help="the hub, where it is not to be reached through kubectl"
    )
    command.add_argument("--json", action="store_true", help="print a JSON object")


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Fetch; 0 where all of it is there.

    Raises:
        BadInput: there is no such session, it has not succeeded, or the directory can't be used.
        Unavailable: the hub, or the session's own store, does not answer.
    """
    from esper.cli.kubectl import Kubectl
    from esper.services.tolaria.run_directory import MANIFEST, refuse_unusable

    directory = arguments.output_dir or Path("runs") / arguments.session
    refuse_unusable(directory, overwrite=arguments.overwrite)
    session = Session.of(Kubectl(arguments.namespace), arguments.session)
    with session.reached(config) as reached:
        files = session.results(reached, directory)
    if not {MANIFEST, _MODEL} <= files.keys():
        raise NotFound(f"results of {session.name}", ", ".join(files) or "none", "a grown model")
    _write(directory, files, overwrite=arguments.overwrite)
    if arguments.json:
        write_json({"session": session.name, "directory": str(directory), "files": sorted(files)})
    else:
        write_result(f"{directory}: {', '.join(sorted(files))}")
        write_note(f'cd {directory} && python -c "import grown; model = grown.load()"')
    return 0


@dataclass(frozen=True, kw_only=True)
class Session:
    """A session of a cluster that has succeeded, and the settings of its pods."""

    name: str
    uid: str
    uri: str | None
    hub_url: str | None
    token: str

    @classmethod
    def of(cls, kubectl: Kubectl, name: str) -> Session:
        """The session of that name.

        Raises:
            BadInput: there is none, it has not succeeded, or its results lie in a claim.
        """
        import yaml

        found = kubectl.get("trainingsessions.esper.dev", name)
        conditions = found.get("status", {}).get("conditions", ())
        end: dict[str, str] = next((one for one in conditions if one["type"] == "Succeeded"), {})
        if end.get("status") != "True":
            said = end.get("reason", "one that the operator has not seen")
            raise BadInput(f"session {name}", said, "one that has succeeded; kubectl get ts shows")
        storage = found["spec"].get("storage", {})
        if storage.get("claimName"):
            raise BadInput(
                f"session {name}",
                f"results in the claim {storage['claimName']}",
                "results at the hub or at a storage.uri; a pod with that claim can copy them",
            )
        secret = kubectl.get("secret", _SECRET.format(name))["data"]
        settings = yaml.safe_load(_decoded(secret, _SETTINGS))
        return cls(
            name=name,
            uid=found["metadata"]["uid"],
            uri=storage.get("uri"),
            hub_url=settings.get("hub", {}).get("url"),
            token=_decoded(secret, _TOKEN),
        )

    @contextmanager
    def reached(self, config: EsperConfig) -> Iterator[EsperConfig]:
        """The settings with which the hub answers here, while it lasts.

        `--hub` is stronger than the address that pods have; one of a Service is forwarded to.

        Raises:
            BadInput: it is a Service's with TLS, whose certificate does not hold here.
            HubUnavailable: kubectl can't forward.
        """
        from esper.cli.kubectl import forwarded

        url = config.hub.url or self.hub_url
        if self.uri is not None or url is None:
            yield config
            return
        parts = urlsplit(url)
        service = _SERVICE.fullmatch(parts.hostname or "")
        if service is None:
            yield self._opened(config, url)
            return
        if parts.scheme == "https":
            raise BadInput(
                f"hub of session {self.name}",
                url,
                "http within a cluster; or --hub URL, an address that its certificate names",
            )
        with forwarded(service[1], service[2], parts.port or 80) as port:
            yield self._opened(config, f"http://127.0.0.1:{port}{parts.path}")

    def results(self, config: EsperConfig, directory: Path) -> dict[str, bytes]:
        """What it has left, by the names of files.

        Raises:
            BadInput: its place or the token can't be used.
            Unavailable: the place does not answer.
        """
        from esper.cli.wiring import hub_objects
        from esper.services.tolaria.checkpoint_manifest import Owner
        from esper.services.tolaria.checkpoint_places import HUB, open_checkpoints
        from esper.services.tolaria.run_directory import FILES

        checkpoints = open_checkpoints(
            directory,
            Owner(session=self.name, uid=self.uid),
            1,
            uri=self.uri or HUB,
            storage=config.storage,
            hub=None if config.hub.url is None else partial(hub_objects, config),
        )
        with closing(checkpoints):
            found = checkpoints.kept()
        # A name from elsewhere is no path here.
        return {name: data for name, data in found.items() if name in FILES}

    def _opened(self, config: EsperConfig, url: str) -> EsperConfig:
        from pydantic import SecretStr

        hub = config.hub.model_copy(
            update={"url": url, "token": SecretStr(self.token), "token_file": None}
        )
        return config.model_copy(update={"hub": hub})


def _decoded(secret: Mapping[str, str], name: str) -> str:
    if name not in secret:
        raise BadInput("the session's Secret", f"no {name}", "one that the operator has made")
    return base64.b64decode(secret[name]).decode()


def _write(directory: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Put the files into a run's directory, the manifest first."""
    from esper.services.tolaria.run_directory import MANIFEST, RunDirectory, write_atomically

    run = RunDirectory.create(directory, files[MANIFEST].decode(), overwrite=overwrite)
    with closing(run):
        for name, data in files.items():
            if name != MANIFEST:
                write_atomically(directory / name, data)
