"""The checkpoints of a run, as its manifest and the settings say, and what is said about them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from esper.cli.preparing import uid_of
from esper.cli.wiring import hub_objects
from esper.configs import EsperConfig
from esper.contracts.manifests import Manifest
from esper.services.tolaria.checkpoint_manifest import Owner
from esper.services.tolaria.checkpoint_places import open_checkpoints
from esper.services.tolaria.checkpoints import Checkpoints, Found
from esper.services.tolaria.run_directory import FILES, RunDirectory


def run_checkpoints(
    manifest: Manifest, run: Path, config: EsperConfig, *, uid: str | None = None
) -> Checkpoints:
    """The checkpoints of the session in `manifest`, whose run's directory is `run`.

    `uid` is the session's, where it is not in the manifest. Nothing is written or asked for.

    Raises:
        BadInput: the manifest's address or the settings can't be used.
    """
    session = manifest.session
    return open_checkpoints(
        run,
        Owner(
            session=session.metadata.name,
            uid=uid or uid_of(manifest),
            attempt=config.tolaria.attempt,
        ),
        session.spec.training.checkpoint.keep,
        uri=session.spec.storage.uri or config.tolaria.storage,
        storage=config.storage,
        hub=None if config.hub.url is None else partial(hub_objects, config),
    )


def keep_results(run: RunDirectory, checkpoints: Checkpoints) -> None:
    """Store what a finished run has left beside its checkpoints, unless these lie in `run`.

    Raises:
        StorageFull: no room is left.
        StoreUnavailable: their place does not answer.
        Superseded: a newer attempt has taken over.
    """
    paths = ((name, run.path / name) for name in FILES)
    checkpoints.keep({name: path.read_bytes() for name, path in paths if path.is_file()})


def newest_checkpoint(checkpoints: Checkpoints, config: EsperConfig) -> Found | None:
    """The checkpoint to go on from; each one that was passed over shows as a line.

    Raises:
        CheckpointError: there are some, and none can be used.
        StoreUnavailable: their place does not answer.
    """
    found = checkpoints.newest()
    component = config.component
    in_the_log = component.log_file is None and component.log_level != "error"
    if found is not None and not in_the_log:  # which is on standard error, too
        for line in found.passed:
            sys.stderr.write(f"esper: {line}\n")
    return found
