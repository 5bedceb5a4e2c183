"""The checkpoints of a run, as its manifest and the settings say, and what is said about them."""

from __future__ import annotations

import sys
from pathlib import Path

from esper.cli.preparing import uid_of
from esper.configs import EsperConfig
from esper.contracts.manifests import Manifest
from esper.services.tolaria.checkpoint_manifest import Owner
from esper.services.tolaria.checkpoint_places import open_checkpoints
from esper.services.tolaria.checkpoints import Checkpoints, Found


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
        Owner(session=session.metadata.name, uid=uid or uid_of(manifest)),
        session.spec.training.checkpoint.keep,
        uri=session.spec.storage.uri,
        storage=config.storage,
    )


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
