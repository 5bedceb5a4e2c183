"""A trainer and what it talks to: every service in this process, or services elsewhere."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from esper.cli.closing import Closing
from esper.cli.outcomes import is_crash
from esper.cli.preparing import Prepared
from esper.cli.wiring import bus_elsewhere, hub_elsewhere
from esper.configs import EsperConfig
from esper.contracts.assets import TrainingSession
from esper.contracts.enums import SessionOutcome
from esper.contracts.operational import AdaptationDecision, SeedTransition, SessionEvent
from esper.errors import EsperError, Interrupted
from esper.execution.kernel_cache import KernelCache, KernelSource
from esper.services.oona_client import InProcessOona, Oona
from esper.services.tamiyo.main import TamiyoService
from esper.services.tezzeret.main import TezzeretService
from esper.services.tolaria.boundary import BusController, HubKernels
from esper.services.tolaria.distribution import Alone, Ranks
from esper.services.tolaria.growth import KernelSupply
from esper.services.tolaria.model_state import rebuild_seeds
from esper.services.tolaria.patience import HUB, IN_PROCESS, REGISTERING_SECONDS, Patience
from esper.services.tolaria.sharing import SharedController, SharedKernels
from esper.services.tolaria.snapshots import PARTS, Snapshot, parts_of, snapshot_of
from esper.services.tolaria.trainer import Controller, Observer, TolariaTrainer
from esper.services.urza.client import UrzaClient, in_process_urza

FAREWELL_SECONDS = 4.0
"""For the last word to the hub of a session that breaks off, while what it listened on closes."""

_log = logging.getLogger(__name__)


class Hub(UrzaClient, KernelSource, Protocol):
    """A hub that also gives out the kernels that it keeps."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an interrupted run stood: nowhere, by default.

    `snapshot` is its newest checkpoint, `told` what it had told by then, and `recorded` the
    decisions that were made afterwards.
    """

    snapshot: Snapshot | None = None
    told: Sequence[SeedTransition | SessionEvent] = ()
    recorded: Sequence[AdaptationDecision] = ()


def share_progress(ranks: Ranks, progress: Progress | None = None) -> Progress:
    """Where rank 0 goes on, on every rank; what was told before is known to that one alone."""
    if ranks.size == 1:
        return progress or Progress()
    snapshot, recorded = (progress.snapshot, progress.recorded) if progress else (None, ())
    told = ranks.told(
        {"going": snapshot is not None, "recorded": [decision.to_wire() for decision in recorded]}
    )
    if told["going"]:
        mine = parts_of(snapshot) if snapshot is not None else {}
        parts = {name: ranks.told_bytes(mine.get(name)) for name in PARTS}
        snapshot = snapshot or snapshot_of(parts)
    if progress is not None:
        return progress
    decisions = [AdaptationDecision.model_validate(one) for one in told["recorded"]]
    return Progress(snapshot=snapshot, recorded=decisions)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Who watches a trainer, the ranks it is one of, and how long the run's files are.

    The ranks know whether one of them was asked to stop. Those but the first have no observers.
    `lasting`: a crash is no end of the session, because whoever has started it starts it again.
    """

    observers: Sequence[Observer] = ()
    ranks: Ranks = field(default_factory=Alone)
    positions: Callable[[], Mapping[str, int]] = dict
    lasting: bool = False


@asynccontextmanager
async def embedded_trainer(
    prepared: Prepared,
    config: EsperConfig,
    *,
    progress: Progress = Progress(),
    attention: Attention = Attention(),
) -> AsyncIterator[TolariaTrainer]:
    """A trainer with every service it talks to, all on the running loop; closed at the end.

    `config` names real places (see `EsperConfig.inside`).
    """
    bus = InProcessOona()
    async with in_process_urza(config.database, config.storage) as hub:
        services = (TezzeretService(bus, hub), TamiyoService(bus))
        try:
            for service in services:
                await service.start()
            async with _trainer(
                prepared, config, bus, hub, IN_PROCESS, progress, attention, Closing()
            ) as trainer:
                yield trainer
        finally:
            for service in reversed(services):
                await service.stop()
            await bus.close()


@asynccontextmanager
async def wired_trainer(
    prepared: Prepared,
    config: EsperConfig,
    *,
    progress: Progress = Progress(),
    attention: Attention = Attention(),
) -> AsyncIterator[TolariaTrainer]:
    """A trainer whose services are elsewhere, at `hub.url` and `redis.url`.

    Raises:
        ConfigError: either is missing.
    """
    patience = Patience(
        lasting=True,
        seconds=prepared.config.growth.controller.patience_seconds,
        ask_again_seconds=config.tolaria.republish_seconds,
        look_seconds=config.tolaria.kernel_poll_seconds,
        stopping=attention.ranks.stopping,
    )
    closing = Closing()
    async with (
        bus_elsewhere(config, prepared.uid, closing) as bus,
        hub_elsewhere(config) as hub,
        _trainer(prepared, config, bus, hub, patience, progress, attention, closing) as trainer,
    ):
        yield trainer


@asynccontextmanager
async def _trainer(
    prepared: Prepared,
    config: EsperConfig,
    bus: Oona,
    hub: Hub,
    patience: Patience,
    progress: Progress,
    attention: Attention,
    closing: Closing,
) -> AsyncIterator[TolariaTrainer]:
    """A trainer between `bus` and `hub`, which knows the session and its blueprints.

    Of several ranks it is the first's, and the only one that has bus and hub.
    """
    scope, ranks = prepared.uid, attention.ranks
    cache = KernelCache(hub, max_bytes=config.component.kernel_cache_bytes)
    controller = await BusController.over(bus, scope=scope, patience=patience)
    kernels = await HubKernels.over(
        prepared.config.session,
        prepared.config.training.seed,
        bus,
        hub,
        cache,
        scope=scope,
        patience=patience,
    )
    last_words: list[Awaitable[None]] = []
    session = prepared.asset()

    async def registered() -> None:
        nonlocal session
        wait = patience.begin(at_least=REGISTERING_SECONDS)
        session = await wait.outlast(partial(hub.register_session, session), by=HUB)
        if session.outcome is not SessionOutcome.RUNNING:
            # An earlier part of it ended; live again, what it uses is kept.
            alive = session.changed(outcome=SessionOutcome.RUNNING)
            session = await wait.outlast(partial(hub.update_session, alive))
        for document in prepared.documents:
            await wait.outlast(partial(hub.put_blueprint, document, session=scope))

    try:
        await ranks.awaited(registered)
        if ranks.size == 1:
            trainer = _made(prepared, controller, kernels, progress, attention)
        else:
            trainer = _made(
                prepared,
                SharedController(ranks, controller),
                _shared(prepared, config, ranks, kernels),
                progress,
                attention,
            )
        try:
            yield trainer
        except Exception as error:
            if attention.lasting and is_crash(error):
                raise
            interrupted = isinstance(error, Interrupted)
            outcome = SessionOutcome.INTERRUPTED if interrupted else SessionOutcome.FAILED
            broken = session.changed(outcome=outcome, epoch=trainer.epoch)
            last_words.append(_try_to_tell(hub, broken))
            raise
        succeeded = session.changed(outcome=SessionOutcome.SUCCEEDED, epoch=trainer.epoch)
        await ranks.awaited(partial(tell_success, succeeded, hub, controller, patience))
    finally:
        await closing.do(*last_words, controller.close(), kernels.close(), most=FAREWELL_SECONDS)


@asynccontextmanager
async def following_trainer(
    prepared: Prepared, config: EsperConfig, *, progress: Progress, ranks: Ranks
) -> AsyncIterator[TolariaTrainer]:
    """The trainer of a rank that is not the first: it hears of bus and hub from that one."""
    await ranks.awaited(done_elsewhere)  # the session is registered
    yield _made(
        prepared,
        SharedController(ranks, None),
        _shared(prepared, config, ranks, None),
        progress,
        Attention(ranks=ranks),
    )
    await ranks.awaited(done_elsewhere)  # its success is told


async def done_elsewhere() -> None:
    """What a rank that is not the first gives to `Ranks.awaited`: it only hears."""
    raise AssertionError("rank 0 alone talks to bus, hub and store")


def _shared(
    prepared: Prepared, config: EsperConfig, ranks: Ranks, kernels: HubKernels | None
) -> SharedKernels:
    max_bytes = config.component.kernel_cache_bytes
    return SharedKernels(ranks, prepared.config.training.seed, kernels, max_bytes)


def _made(
    prepared: Prepared,
    controller: Controller,
    kernels: KernelSupply,
    progress: Progress,
    attention: Attention,
) -> TolariaTrainer:
    """A trainer that stands where `progress` says."""
    trainer = TolariaTrainer(
        prepared.config,
        prepared.model,
        prepared.datasets,
        prepared.objective,
        prepared.documents,
        controller=controller,
        kernels=kernels,
        observers=attention.observers,
        recorded=progress.recorded,
        ranks=attention.ranks,
        positions=attention.positions,
        scope=prepared.uid,
    )
    if progress.snapshot is not None:
        rebuild_seeds(trainer.engine.model, progress.snapshot.structure)
        trainer.restore(progress.snapshot, progress.told)
    return trainer


async def tell_success(
    session: TrainingSession, hub: UrzaClient, controller: BusController, patience: Patience
) -> None:
    """Tell bus and hub of a session that succeeded, while patience lasts.

    Its result is written by now, so what can't be told does not make it fail: it is logged, and
    told by a resumption.
    """
    for what, tell in (
        ("all of its news", controller.finish),
        (
            "that it succeeded",
            partial(patience.begin().outlast, partial(hub.update_session, session)),
        ),
    ):
        try:
            await tell()
        except EsperError as error:
            _log.warning(
                "session %s could not tell %s: %s; `esper run --resume` tells it again",
                *(session.name, what, error),
            )


async def _try_to_tell(hub: UrzaClient, session: TrainingSession) -> None:
    """Tell the hub how a session broke off; a hub that is away does not hold up the end."""
    try:
        await hub.update_session(session)
    except EsperError as error:
        # Whoever runs it is told why it broke off; that the hub is not is of less weight.
        _log.info("the hub does not know that the session %s: %s", session.outcome, error)
