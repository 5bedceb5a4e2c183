"""The embedded run's composition root: one process, one event loop, every service in it.

Bus, hub, forge and controller are the same code as in a cluster, over in-process adapters.
"""

from __future__ import annotations

import asyncio
import errno
import math
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esper.cli.finished import tell_again
from esper.cli.live import make_view
from esper.cli.outcomes import is_crash
from esper.cli.output import write_json
from esper.cli.preparing import SOURCE_ANNOTATION, Prepared, own_manifest, prepare
from esper.cli.report_page import write_report
from esper.cli.run_checkpoints import keep_results, newest_checkpoint, run_checkpoints
from esper.cli.telling import telling
from esper.cli.trainers import (
    Attention,
    Progress,
    embedded_trainer,
    share_progress,
    wired_trainer,
)
from esper.cli.view_observer import ViewObserver
from esper.cli.watching import watched_services
from esper.cli.wiring import refuse_unreachable
from esper.configs import EsperConfig
from esper.contracts.enums import SessionOutcome
from esper.contracts.manifests import Manifest, load_manifest, parse_manifest
from esper.core.export import export_grown
from esper.errors import BadInput, ConfigError, EsperError, Interrupted, StorageFull, one_line
from esper.services.health import ServiceHealth
from esper.services.tolaria.checkpoints import Checkpoints, Found
from esper.services.tolaria.distribution import Alone, Ranks
from esper.services.tolaria.engine import layer_kind
from esper.services.tolaria.health import HealthObserver
from esper.services.tolaria.main import TolariaService
from esper.services.tolaria.reporting import SessionReport
from esper.services.tolaria.run_directory import RunDirectory, RunLog, refuse_unusable
from esper.services.tolaria.seeds import SeedBook
from esper.services.tolaria.status import StatusFile
from esper.services.tolaria.trainer import Observer, TrainingResult

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_file(
    path: Path,
    output_dir: Path | None,
    *,
    overwrite: bool,
    json_output: bool,
    live: bool,
    quiet: bool,
    config: EsperConfig,
    health: ServiceHealth | None = None,
) -> int:
    """`esper run FILE`: everything is checked before anything is written.

    With `health` it is a service's: services that do not answer yet are waited for.
    """
    wired = wired_to(config)
    manifest = load_manifest(path)
    directory = output_dir or Path("runs") / manifest.session.metadata.name
    refuse_unusable(directory, overwrite=overwrite)
    prepared = prepare(manifest, path.parent)
    if wired and health is None:
        asyncio.run(refuse_unreachable(config, prepared.uid))
    shown = Shown(json_output, live, quiet, health)
    checkpoints = run_checkpoints(manifest, directory, config, uid=prepared.uid)
    with closing(checkpoints):
        if health is None:
            checkpoints.check()
        run = RunDirectory.create(directory, own_manifest(prepared), overwrite=overwrite)
        with closing(run):
            return carry_out(prepared, run, checkpoints, None, config, shown)


def resume(
    directory: Path,
    *,
    json_output: bool,
    live: bool,
    quiet: bool,
    config: EsperConfig,
    health: ServiceHealth | None = None,
) -> int:
    """`esper run --resume D`: on from the newest checkpoint, or from the start without one.

    A run that has ended is shown, and bus and hub are told of its end once more.

    With `health` it is a service's: services that do not answer yet are waited for.
    """
    wired = wired_to(config)
    shown = Shown(json_output, live, quiet, health)
    run = RunDirectory.open(directory)
    try:
        manifest = parse_manifest(run.manifest, str(directory / "manifest.yaml"))
        result = run.result()
        if result is not None:
            write_report(directory)
            with closing(run_checkpoints(manifest, directory, config)) as checkpoints:
                keep_results(run, checkpoints)
            _tell_again(run, manifest, result, config, lasting=health is not None)
            show_end(result, directory, shown)
            return 0
        source = manifest.session.metadata.annotations.get(SOURCE_ANNOTATION, ".")
        prepared = prepare(manifest, Path(source))
        if wired and health is None:
            asyncio.run(refuse_unreachable(config, prepared.uid))
        checkpoints = run_checkpoints(manifest, directory, config, uid=prepared.uid)
        with closing(checkpoints):
            found = newest_checkpoint(checkpoints, config)
            return carry_out(prepared, run, checkpoints, found, config, shown)
    finally:
        run.close()


def _tell_again(
    run: RunDirectory,
    manifest: Manifest,
    result: Mapping[str, Any],
    config: EsperConfig,
    *,
    lasting: bool,
) -> None:
    tolaria = TolariaService()
    places = config.inside(run.path)
    with tolaria.signals():
        asyncio.run(
            tell_again(run, manifest, result, places, lasting=lasting, stopping=tolaria.stopping)
        )


@dataclass(frozen=True)
class Shown:
    """What the person asked to see, and what a service shows of itself."""

    json: bool
    live: bool
    quiet: bool
    health: ServiceHealth | None


def carry_out(
    prepared: Prepared,
    run: RunDirectory,
    checkpoints: Checkpoints,
    found: Found | None,
    config: EsperConfig,
    shown: Shown,
    ranks: Ranks | None = None,
) -> int:
    """Train a session in its directory, on from the checkpoint `found`; 0 once it is finished.

    `ranks` are its processes, of which this one is the first; by default there is no other, and
    signals stop it. A crash of theirs is not the end of the session: they are started again.

    Raises:
        WorkFailed: training failed; the run is kept.
        Interrupted: a checkpoint was written.
    """
    report = SessionReport(
        prepared.config.session,
        layers={n: layer_kind(m) for n, m in prepared.model.morphology.layers.items()},
        refused=prepared.model.morphology.refused,
        parameters_base=sum(p.numel() for p in prepared.model.parameters()),
        epochs=prepared.config.training.epochs,
        threads=prepared.config.training.threads,
        seeds_per_layer=prepared.config.growth.seeds_per_layer,
        processes=1 if ranks is None else ranks.size,
        attempt=config.tolaria.attempt,
    )
    status = StatusFile(run.path / "status.yaml", prepared.manifest.session, report)
    # One process may take its time; many are killed when theirs is over.
    stopping = ranks.stopping if ranks is not None else lambda: False
    log = RunLog(run, checkpoints, report.checkpointed, stopping=stopping)
    with telling(report, config, prepared.uid) if wired_to(config) else nullcontext():
        ended = _carried_out(prepared, run, log, found, config, (report, status), shown, ranks)
    keep_results(run, checkpoints)
    return ended


def _carried_out(
    prepared: Prepared,
    run: RunDirectory,
    log: RunLog,
    found: Found | None,
    config: EsperConfig,
    told: tuple[SessionReport, StatusFile],
    shown: Shown,
    ranks: Ranks | None,
) -> int:
    """As `carry_out`, which has opened what is written to."""
    _, status = told
    try:
        result = asyncio.run(
            _session(prepared, run, log, found, config.inside(run.path), told, shown, ranks)
        )
    except Interrupted as error:
        status.finish(SessionOutcome.INTERRUPTED, str(error))
        if shown.json:
            _show_broken_off(prepared, SessionOutcome.INTERRUPTED, str(error))
        raise Interrupted(f"interrupted; {log.saved}. Go on with: {_resuming(run)}") from error
    except Exception as error:
        failure = error
        if _disk_is_full(error):
            failure = StorageFull(
                f"no room left for {run.path}: {one_line(str(error))}; free some and go on with: "
                f"{_resuming(run)}"
            )
        if ranks is not None and is_crash(failure):
            raise
        _failed(status, run, failure)
        if shown.json and not isinstance(failure, BadInput):
            _show_broken_off(prepared, SessionOutcome.FAILED, str(failure))
        if failure is error:
            raise
        raise failure from error
    show_end(result, run.path, shown)
    return 0


async def _session(
    prepared: Prepared,
    run: RunDirectory,
    log: RunLog,
    found: Found | None,
    config: EsperConfig,
    told: tuple[SessionReport, StatusFile],
    shown: Shown,
    ranks: Ranks | None,
) -> dict[str, Any]:
    """Train the session in its directory, shown as it goes."""
    training, (report, status) = prepared.config.training, told
    recorded = log.rewind(found)
    progress = Progress(recorded=recorded)
    if found is not None:
        session = prepared.config.session
        progress = replace(progress, snapshot=found.snapshot, told=run.told(session))
        records = SeedBook.from_state(found.snapshot.state["book"]).records.values()
        # With the checkpoint's name: restarts are counted by it.
        report.resumed(records, run.transitions(session), found.written, run.last_row())
    tolaria = TolariaService()
    observers: list[Observer] = [log, status]
    if shown.health is not None:
        observers.append(HealthObserver(shown.health))
    lasting = ranks is not None
    with ExitStack() as stack:
        if ranks is None:
            # Before and after the training too: it may wait for services there.
            stack.enter_context(tolaria.signals())
            ranks = Alone(tolaria.stopping)
        share_progress(ranks, progress)
        if shown.health is not None and wired_to(config):
            stack.enter_context(watched_services(shown.health, config, prepared.uid))
        stack.callback(log.close)
        log.open()
        if not shown.quiet:
            view = make_view(
                sys.stderr,
                training.epochs,
                prepared.config.session,
                force_plain=not shown.live,
                policy=str(prepared.config.growth.controller.policy),
                parameters_base=sum(p.numel() for p in prepared.model.parameters()),
                metric=prepared.objective.metric_name,
            )
            observers.append(ViewObserver(stack.enter_context(view)))
        attention = Attention(
            observers=observers, ranks=ranks, positions=log.lengths, lasting=lasting
        )
        trainer_of = wired_trainer if wired_to(config) else embedded_trainer
        async with trainer_of(prepared, config, progress=progress, attention=attention) as trainer:
            report.begun(lambda: trainer.engine.steps)
            status.write()
            if shown.health is not None:
                shown.health.started()
            with log.draining():
                result = await trainer.run()
                if ranks.size > 1:
                    # The others hear meanwhile that it is written.
                    await ranks.awaited(lambda: asyncio.to_thread(log.drain))
            return _finished(prepared, run, status, result)


def _finished(
    prepared: Prepared,
    run: RunDirectory,
    status: StatusFile,
    result: TrainingResult,
) -> dict[str, Any]:
    """Leave what a finished run leaves: the grown model, the result, the status, the report."""
    summary: dict[str, Any] = {
        "session": prepared.config.session,
        "outcome": SessionOutcome.SUCCEEDED.value,
        "accuracy": result.test.metric if math.isfinite(result.test.metric) else None,
        "metric": prepared.objective.metric_name,
        "parametersBase": result.parameters_base,
        "parameters": result.parameters,
        "flops": result.flops,
        "flopsTrials": result.flops_trials,
        "flopsMonitoring": result.flops_monitoring,
        "epochs": result.epochs,
        "seconds": round(result.seconds, 3),
        "seeds": result.seeds,
        "grown": [
            {
                "layer": record.layer,
                "slot": record.slot,
                "blueprint": record.blueprint,
                "epoch": record.fossilized_epoch,
                "parameters": record.parameters,
                "contribution": {
                    "mean": record.measurement.mean,
                    "lower": record.measurement.lower,
                },
                "rent": record.measurement.rent,
                "samples": record.measurement.samples,
            }
            for record in result.grown
            if record.measurement is not None
        ],
    }
    export_grown(
        result.model,
        prepared.config.model.entrypoint,
        dict(prepared.config.model.arguments),
        run.path,
        {"session": prepared.config.session, "grown": summary["grown"]},
    )
    status.finish(
        SessionOutcome.SUCCEEDED,
        f"{result.epochs} epochs; parts grown: {len(result.grown)}",
        test=result.test.metric,
        parameters=result.parameters,
        flops=result.flops,
    )
    run.write_result(summary)
    write_report(run.path)
    return summary


def wired_to(config: EsperConfig) -> bool:
    """Whether bus and hub are elsewhere.

    Raises:
        ConfigError: only one of them is: the forge stands between them.
    """
    bus, hub = config.redis.url, config.hub.url
    if (bus is None) != (hub is None):
        missing, given = ("redis.url", "hub.url") if bus is None else ("hub.url", "redis.url")
        raise ConfigError(missing, None, f"an address, because {given} is set; or null in both")
    return bus is not None


def _resuming(run: RunDirectory) -> str:
    """The command that goes on with `run`, as a shell takes it."""
    return f"esper run --resume {shlex.quote(str(run.path))}"


def show_end(result: Mapping[str, Any], path: Path, shown: Shown) -> None:
    """Show what a finished run has come to."""
    if not shown.quiet:
        grown = result["parameters"] - result["parametersBase"]
        metric = result["accuracy"]
        reached = "not finite" if metric is None else f"{metric:.4f}"
        sys.stderr.write(
            f"{result['session']}: {result['outcome']}, "
            f"{result['metric']} {reached} on the test set, "
            f"{result['parametersBase']} + {grown} parameters\n"
            f"report: {path / 'report.html'}\n"
        )
    if shown.json:
        write_json(result)


def _failed(status: StatusFile, run: RunDirectory, error: BaseException) -> None:
    """Say in the status why the session failed; a disk without room may refuse even that."""
    reason = one_line(str(error), 1000)
    with suppress(OSError, EsperError):
        if run.result() is None:  # else all but the report is done
            status.finish(SessionOutcome.FAILED, reason)
        write_report(run.path)


def _show_broken_off(prepared: Prepared, outcome: SessionOutcome, reason: str) -> None:
    session, reason = prepared.config.session, one_line(reason, 1000)
    write_json({"session": session, "outcome": outcome.value, "reason": reason})


def _disk_is_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is a write refused for want of room."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, StorageFull) or getattr(seen, "errno", None) in FULL_DISK:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
