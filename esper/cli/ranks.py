"""What one of several ranks of a session does: `esper worker` starts them, under torchrun.

Rank 0 is the run: it has the directory, the bus and the hub, and shows what happens. The others
prepare the same session, take their part in its training, and write nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from esper.cli.accelerators import require_accelerators
from esper.cli.embedded import Shown, carry_out, show_end
from esper.cli.finished import tell_again
from esper.cli.preparing import SOURCE_ANNOTATION, Prepared, own_manifest, prepare, uid_of
from esper.cli.run_checkpoints import keep_results, newest_checkpoint, run_checkpoints
from esper.cli.trainers import Attention, done_elsewhere, following_trainer, share_progress
from esper.configs import EsperConfig
from esper.contracts.manifests import load_manifest, parse_manifest, session_document
from esper.contracts.operational import AdaptationDecision, SeedTransition
from esper.errors import Interrupted
from esper.services.tolaria.checkpoints import Checkpoints, Found
from esper.services.tolaria.distribution import Ranks, as_wire, first_failure
from esper.services.tolaria.run_directory import (
    MANIFEST,
    RunDirectory,
    refuse_unusable,
)
from esper.services.tolaria.snapshots import Snapshot

LOOK_SECONDS = 0.1

_Result = TypeVar("_Result")


def run_rank(
    path: Path,
    directory: Path,
    ranks: Ranks,
    *,
    json_output: bool,
    config: EsperConfig,
    reached: Callable[[int], None] = lambda _: None,
) -> None:
    """Train the session of the manifest at `path`, or go on with the run in `directory`.

    A rank that is not the first tells `reached` the epoch of each checkpoint.

    Raises:
        BadInput: the manifest, the directory, a checkpoint or a setting can't be used.
        WorkFailed: training failed; the run is kept.
        Interrupted: a checkpoint was written.
        Unavailable: a rank is gone; all of them have to begin again.
    """
    shown = Shown(json=json_output, live=False, quiet=False, health=None)
    begun = ranks.led(lambda: _begun(path, directory))
    if begun["result"] is not None:
        if ranks.rank == 0:
            _tell_again(directory, begun["result"], ranks, config)
            show_end(begun["result"], directory, shown)
        return
    prepared = replace(_together(ranks, lambda: _prepared(begun, ranks.size)), uid=begun["uid"])
    if ranks.rank == 0:
        _lead(prepared, directory, ranks, shown, config, new=begun["new"])
    else:
        asyncio.run(_follow(prepared, ranks, config, reached))
    # No rank counts as done before rank 0 has written what the session came to.
    ranks.led(lambda: None)


def _begun(path: Path, directory: Path) -> dict[str, Any]:
    """On rank 0: the manifest, and where it came from, or the result that the run has come to."""
    if (directory / MANIFEST).is_file():
        with closing(RunDirectory.open(directory)) as run:
            text, result = run.manifest, run.result()
        manifest = parse_manifest(text, str(directory / MANIFEST))
        source = manifest.session.metadata.annotations.get(SOURCE_ANNOTATION, ".")
        return {
            "manifest": text,
            "folder": source,
            "uid": uid_of(manifest),
            "result": result,
            "new": False,
        }
    refuse_unusable(directory, overwrite=False)
    manifest = load_manifest(path)
    return {
        "manifest": "---\n".join(map(session_document, (manifest.session, *manifest.blueprints))),
        "folder": str(path.parent.resolve()),
        "uid": uid_of(manifest),
        "result": None,
        "new": True,
    }


def _tell_again(directory: Path, result: dict[str, Any], ranks: Ranks, config: EsperConfig) -> None:
    """On rank 0: bus and hub hear once more that the run succeeded; it may have ended before."""
    with closing(RunDirectory.open(directory)) as run:
        manifest = parse_manifest(run.manifest, str(directory / MANIFEST))
        with closing(run_checkpoints(manifest, directory, config)) as checkpoints:
            keep_results(run, checkpoints)
        places = config.inside(directory)
        telling = tell_again(run, manifest, result, places, lasting=True, stopping=ranks.stopping)
        asyncio.run(telling)


def _prepared(begun: dict[str, Any], processes: int) -> Prepared:
    manifest = parse_manifest(begun["manifest"], MANIFEST)
    require_accelerators(manifest.session, torch.cuda.device_count())
    return prepare(manifest, Path(begun["folder"]), own_device(), processes=processes)


def own_device() -> torch.device | None:
    """The GPU of this rank, where the machine has any; None: the CPU."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", dist.get_node_local_rank(0) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _together(ranks: Ranks, work: Callable[[], Prepared]) -> Prepared:
    """What `work` comes to here, once it has come to something on every rank.

    Raises:
        EsperError: what this rank met, or else the first one that met something.
    """
    made, met = None, None
    try:
        made = work()
    except Exception as error:
        met = error
    failure = first_failure(ranks.exchanged({} if met is None else as_wire(met)))
    if met is not None:
        raise met
    if failure is not None:
        raise failure
    assert made is not None
    return made


def _lead(
    prepared: Prepared,
    directory: Path,
    ranks: Ranks,
    shown: Shown,
    config: EsperConfig,
    *,
    new: bool,
) -> None:
    """Rank 0's part: the run. Services that do not answer yet are waited for."""
    checkpoints = run_checkpoints(prepared.manifest, directory, config, uid=prepared.uid)
    with closing(checkpoints):
        run = (
            RunDirectory.create(directory, own_manifest(prepared), overwrite=False)
            if new
            else RunDirectory.open(directory)
        )
        with closing(run):
            # Also of a new directory: the one before may have been lost with its pod.
            found = _newest(checkpoints, ranks, config)
            carry_out(prepared, run, checkpoints, found, config, shown, ranks)


async def _follow(
    prepared: Prepared, ranks: Ranks, config: EsperConfig, reached: Callable[[int], None]
) -> None:
    """The other ranks' part."""
    await ranks.awaited(done_elsewhere)  # the newest checkpoint is read
    progress = share_progress(ranks)
    attention = Attention(observers=[Reaching(reached)], ranks=ranks)
    async with following_trainer(
        prepared, config, progress=progress, attention=attention
    ) as trainer:
        await trainer.run()
        await ranks.awaited(done_elsewhere)  # the last checkpoint is written


def _newest(checkpoints: Checkpoints, ranks: Ranks, config: EsperConfig) -> Found | None:
    """On rank 0: the checkpoint to go on from. The others hear meanwhile that it reads.

    Raises:
        Superseded: a newer attempt has begun.
        BadInput, Unavailable: as `newest_checkpoint`, on every rank.
        Interrupted: a rank was asked to stop; there is nothing new to save yet.
    """
    found: Found | None = None

    def taken_over() -> Found | None:
        checkpoints.begin()
        return newest_checkpoint(checkpoints, config)

    async def read() -> None:
        nonlocal found
        found = await aside(taken_over, ranks.stopping)

    asyncio.run(ranks.awaited(read))
    return found


async def aside(work: Callable[[], _Result], stopping: Callable[[], bool]) -> _Result:
    """What `work` comes to, in a thread that is left alone once it is to stop.

    Raises:
        Interrupted: it is.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_Result] = loop.create_future()

    def tell(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not done.cancelled():
            set_outcome(outcome)

    def run() -> None:
        told: tuple[Callable[[Any], None], Any]
        try:
            told = done.set_result, work()
        except Exception as error:
            told = done.set_exception, error
        with suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(tell, *told)

    # No thread of a pool, which would be waited for at the end.
    threading.Thread(target=run, name="esper-reading", daemon=True).start()
    while not (await asyncio.wait({done}, timeout=LOOK_SECONDS))[0]:
        if stopping():
            done.cancel()
            raise Interrupted("asked to stop while the newest checkpoint was read; it stays")
    return done.result()


class Reaching:
    """An observer of a rank that is not the first: it tells the epoch of each checkpoint.

    A worker counts restarts without a newer one, and sees the run's directory where rank 0 is.
    """

    def __init__(self, reached: Callable[[int], None]) -> None:
        self._reached = reached

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Epochs are rank 0's to tell."""

    def transition(self, transition: SeedTransition) -> None:
        """Transitions are rank 0's to tell."""

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        """Decisions are rank 0's to tell."""

    def event(self, epoch: int, reason: str, message: str) -> None:
        """Events are rank 0's to tell."""

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Rank 0 writes it from now on."""
        self._reached(snapshot.epoch)
