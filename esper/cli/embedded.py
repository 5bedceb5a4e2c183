"""The embedded run's composition root: one process, one event loop, every service in it.

Bus, hub, forge and controller are the same code as in a cluster, over in-process adapters.
"""

from __future__ import annotations

import asyncio
import errno
import math
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper.cli.live import make_view
from esper.cli.output import write_json
from esper.cli.report_page import write_report
from esper.cli.view_observer import ViewObserver
from esper.configs import EsperConfig
from esper.contracts import assets
from esper.contracts.blueprints import CATALOGUE, BlueprintDocument, Graph
from esper.contracts.enums import SessionOutcome
from esper.contracts.manifests import (
    Manifest,
    load_manifest,
    parse_manifest,
    select_blueprints,
    session_document,
)
from esper.contracts.operational import AdaptationDecision
from esper.core.compilation import compile_blocks
from esper.core.export import export_grown
from esper.core.model_wrapper import LayerSelection, MorphableModel, wrap
from esper.errors import (
    BadInput,
    ConfigError,
    EsperError,
    Interrupted,
    ManifestError,
    StorageFull,
    one_line,
)
from esper.execution.builders import build
from esper.execution.kernel_cache import KernelCache
from esper.services.oona_client import InProcessOona
from esper.services.tamiyo.main import TamiyoService
from esper.services.tezzeret.main import TezzeretService
from esper.services.tolaria.boundary import BusController, HubKernels
from esper.services.tolaria.config import TolariaConfig
from esper.services.tolaria.data import Datasets
from esper.services.tolaria.engine import layer_kind
from esper.services.tolaria.entrypoints import (
    build_datasets,
    build_model,
    build_objective,
    check_fit,
    make_importable,
)
from esper.services.tolaria.growth import refuse_misfit
from esper.services.tolaria.main import TolariaService
from esper.services.tolaria.objective import Objective
from esper.services.tolaria.run_directory import RunDirectory, RunLog, refuse_unusable
from esper.services.tolaria.seeds import SeedBook
from esper.services.tolaria.snapshots import Snapshot
from esper.services.tolaria.status import StatusFile
from esper.services.tolaria.trainer import Observer, TolariaTrainer, TrainingResult
from esper.services.urza.client import UrzaClient, in_process_urza

SOURCE_ANNOTATION = "esper.dev/source"
"""On a run's own manifest: the folder of the manifest it was started with."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A session that was checked and built, with nothing written yet."""

    manifest: Manifest
    config: TolariaConfig
    documents: tuple[BlueprintDocument, ...]
    datasets: Datasets
    objective: Objective
    model: MorphableModel
    folder: Path


def run_file(
    path: Path,
    output_dir: Path | None,
    *,
    overwrite: bool,
    json_output: bool,
    live: bool,
    quiet: bool,
    config: EsperConfig,
) -> int:
    """`esper run FILE`: everything is checked before anything is written."""
    _refuse_other_services(config)
    manifest = load_manifest(path)
    directory = output_dir or Path("runs") / manifest.session.metadata.name
    refuse_unusable(directory, overwrite=overwrite)
    prepared = prepare(manifest, path.parent)
    run = RunDirectory.create(directory, _own_manifest(prepared), overwrite=overwrite)
    try:
        return _carry_out(prepared, run, None, config, _Shown(json_output, live, quiet))
    finally:
        run.close()


def resume(
    directory: Path, *, json_output: bool, live: bool, quiet: bool, config: EsperConfig
) -> int:
    """`esper run --resume D`: on from the newest checkpoint, or from the start without one."""
    _refuse_other_services(config)
    run = RunDirectory.open(directory)
    try:
        manifest = parse_manifest(run.manifest, str(directory / "manifest.yaml"))
        result = run.result()
        if result is not None:
            write_report(directory)
            _shown_end(result, directory, _Shown(json_output, live, quiet))
            return 0
        source = manifest.session.metadata.annotations.get(SOURCE_ANNOTATION, ".")
        prepared = prepare(manifest, Path(source))
        snapshot = run.newest_checkpoint()
        return _carry_out(prepared, run, snapshot, config, _Shown(json_output, live, quiet))
    finally:
        run.close()


def validate_file(path: Path, config: EsperConfig) -> dict[str, Any]:
    """`esper validate FILE`: what `run` would check, and what it would train."""
    del config  # every setting was checked when it was read
    prepared = prepare(load_manifest(path), path.parent)
    morphology = prepared.model.morphology
    return {
        "session": prepared.config.session,
        "parametersBase": sum(p.numel() for p in prepared.model.parameters()),
        "samples": {
            name: len(getattr(prepared.datasets, name)) for name in ("train", "validation", "test")
        },
        "layers": list(morphology.layers),
        "refused": dict(morphology.refused),
        "blueprints": [document.name for document in prepared.documents],
    }


def prepare(manifest: Manifest, folder: Path) -> Prepared:
    """Check and build everything a session needs; modules beside the manifest are found.

    Raises:
        BadInput: anything a person wrote can't be used.
    """
    _refuse_unserved(manifest)
    selector = manifest.session.spec.growth.blueprints
    documents = tuple(select_blueprints(selector, CATALOGUE, manifest.blueprints))
    config = TolariaConfig.from_resource(manifest.session)
    torch.set_num_threads(config.training.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    make_importable(folder)
    datasets = build_datasets(config)
    model = build_model(config)
    objective = build_objective(config, datasets)
    inputs, _ = check_fit(model, datasets, objective)
    wrapped = wrap(
        model,
        tuple(inputs) if isinstance(inputs, list) else inputs,
        layers=LayerSelection(
            types=config.growth.layers.types,
            include=config.growth.layers.include or ("*",),
            exclude=config.growth.layers.exclude,
        ),
        seeds_per_layer=config.growth.seeds_per_layer,
    )
    if config.training.compile:
        compile_blocks(wrapped)
    selected = {document.name: document for document in documents}
    for blueprint in manifest.blueprints:
        document = selected.get(blueprint.metadata.name)
        if document is not None:
            builtin = blueprint.spec.builtin is not None
            refuse_misfit(document, wrapped.morphology, builtin=builtin)
    return Prepared(
        manifest=manifest,
        config=config,
        documents=documents,
        datasets=datasets,
        objective=objective,
        model=wrapped,
        folder=folder,
    )


@dataclass(frozen=True)
class _Shown:
    """What the person asked to see."""

    json: bool
    live: bool
    quiet: bool


def _carry_out(
    prepared: Prepared,
    run: RunDirectory,
    snapshot: Snapshot | None,
    config: EsperConfig,
    shown: _Shown,
) -> int:
    status = StatusFile(
        run.path / "status.yaml",
        prepared.manifest.session,
        layers={n: layer_kind(m) for n, m in prepared.model.morphology.layers.items()},
        refused=prepared.model.morphology.refused,
        parameters_base=sum(p.numel() for p in prepared.model.parameters()),
        seeds=SeedBook.from_state(snapshot.state["book"]).records if snapshot else (),
    )
    try:
        result = asyncio.run(
            _session(prepared, run, snapshot, config.inside(run.path), status, shown)
        )
    except Interrupted as error:
        status.finish(SessionOutcome.INTERRUPTED, str(error))
        if shown.json:
            _show_broken_off(prepared, SessionOutcome.INTERRUPTED, str(error))
        raise Interrupted(
            f"interrupted; a checkpoint was written. Go on with: {_resuming(run)}"
        ) from error
    except Exception as error:
        failure = error
        if _disk_is_full(error):
            failure = StorageFull(
                f"no room left for {run.path}: {one_line(str(error))}; free some and go on with: "
                f"{_resuming(run)}"
            )
        _failed(status, run, failure)
        if shown.json and not isinstance(failure, BadInput):
            _show_broken_off(prepared, SessionOutcome.FAILED, str(failure))
        if failure is error:
            raise
        raise failure from error
    _shown_end(result, run.path, shown)
    return 0


@asynccontextmanager
async def embedded_trainer(
    prepared: Prepared,
    config: EsperConfig,
    *,
    observers: Sequence[Observer] = (),
    recorded: Sequence[AdaptationDecision] = (),
    snapshot: Snapshot | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> AsyncIterator[TolariaTrainer]:
    """A trainer with every service it talks to, all on the running loop; closed at the end.

    `config` names real places (see `EsperConfig.inside`); `snapshot` is where to go on from.
    """
    seed = prepared.config.training.seed
    name = prepared.config.session
    bus = InProcessOona()
    async with in_process_urza(config.database, Path(config.storage.folder)) as hub:
        cache = KernelCache(hub, max_bytes=config.component.kernel_cache_bytes)
        services = (TezzeretService(bus, hub), TamiyoService(bus))
        trainer = TolariaTrainer(
            prepared.config,
            prepared.model,
            prepared.datasets,
            prepared.objective,
            prepared.documents,
            controller=await BusController.over(bus),
            kernels=await HubKernels.over(name, seed, bus, hub, cache),
            observers=observers,
            recorded=recorded,
            stopping=stopping,
        )
        for document in prepared.documents:
            await hub.put_blueprint(document)
        await _register(hub, prepared)
        if snapshot is not None:
            prepared.model.morphology.restore(snapshot.structure, partial(_rebuilt, prepared.model))
            trainer.restore(snapshot)
        try:
            for service in services:
                await service.start()
            yield trainer
        finally:
            for service in reversed(services):
                await service.stop()
            await bus.close()


async def _session(
    prepared: Prepared,
    run: RunDirectory,
    snapshot: Snapshot | None,
    config: EsperConfig,
    status: StatusFile,
    shown: _Shown,
) -> dict[str, Any]:
    """Train the session in its directory, shown as it goes."""
    training = prepared.config.training
    log = RunLog(run, training.checkpoint.keep)
    recorded = log.rewind(snapshot)
    tolaria = TolariaService()
    observers: list[Observer] = [log, status]
    with ExitStack() as stack:
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
        async with embedded_trainer(
            prepared,
            config,
            observers=observers,
            recorded=recorded,
            snapshot=snapshot,
            stopping=tolaria.stopping,
        ) as trainer:
            status.write()
            result = await tolaria.run(trainer)
            return _finished(prepared, run, status, result)


def _rebuilt(model: MorphableModel, entry: Mapping[str, Any]) -> nn.Module:
    """The module of a seed in a checkpoint; its weights are loaded afterwards."""
    target = model.morphology.target(entry["layer"])
    return build(Graph.model_validate(entry["graph"]), target, generator_seed=0)


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
        prepared.model,
        prepared.config.model.entrypoint,
        dict(prepared.config.model.arguments),
        run.path,
        {"session": prepared.config.session, "grown": summary["grown"]},
    )
    status.finish(
        SessionOutcome.SUCCEEDED,
        f"{result.epochs} epochs; parts grown: {len(result.grown)}",
        changes={
            "metrics": status.test_metric(result.test.metric),
            "parameters": result.parameters,
            "flops": result.flops,
        },
    )
    run.write_result(summary)
    write_report(run.path)
    return summary


def _resuming(run: RunDirectory) -> str:
    """The command that goes on with `run`, as a shell takes it."""
    return f"esper run --resume {shlex.quote(str(run.path))}"


def _shown_end(result: Mapping[str, Any], path: Path, shown: _Shown) -> None:
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


def _refuse_unserved(manifest: Manifest) -> None:
    """Refuse what this version can't do, rather than train something else than was asked for."""
    training = manifest.session.spec.training
    if training.logical_shards is not None:
        raise ManifestError(
            "spec.training.logicalShards",
            training.logical_shards,
            "nothing; this version computes a batch in one piece",
        )
    if training.checkpoint.resume_from is not None:
        raise ManifestError(
            "spec.training.checkpoint.resumeFrom",
            training.checkpoint.resume_from,
            "nothing; this version resumes a run with: esper run --resume D",
        )


def _refuse_other_services(config: EsperConfig) -> None:
    """An embedded run has bus and hub in itself; a setting that it would pass over is refused."""
    for name, url in (("redis.url", config.redis.url), ("hub.url", config.hub.url)):
        if url is not None:
            raise ConfigError(name, "a URL", "null: this version runs in one process")


def _own_manifest(prepared: Prepared) -> str:
    """The manifest as the run keeps it: every default written out, and where it came from."""
    session = prepared.manifest.session
    annotations = dict(session.metadata.annotations) | {
        SOURCE_ANNOTATION: str(prepared.folder.resolve())
    }
    metadata = session.metadata.model_copy(update={"annotations": annotations})
    own = session.model_copy(update={"metadata": metadata})
    return "---\n".join(map(session_document, (own, *prepared.manifest.blueprints)))


async def _register(hub: UrzaClient, prepared: Prepared) -> None:
    growth = prepared.config.growth
    await hub.register_session(
        assets.TrainingSession(
            name=prepared.config.session,
            epochs=prepared.config.training.epochs,
            num_layers=len(prepared.model.morphology.layers),
            num_slots=growth.seeds_per_layer,
        )
    )
