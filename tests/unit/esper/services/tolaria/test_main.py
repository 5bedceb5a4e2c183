from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from esper.contracts.enums import DecisionAction
from esper.contracts.operational import (
    AdaptationDecision,
    SeedTransition,
    SystemStatePacket,
)
from esper.errors import Interrupted
from esper.services.tolaria.distribution import Alone
from esper.services.tolaria.main import SIGNALS, TolariaService
from esper.services.tolaria.news import News
from esper.services.tolaria.objective import Classification
from esper.services.tolaria.snapshots import Snapshot
from esper.services.tolaria.trainer import TolariaTrainer
from tests.unit.esper.services.tolaria.sessions import (
    BuiltHere,
    config,
    datasets,
    documents,
    wrapped_mlp,
)


class Waiting:
    """A controller that waits."""

    async def tell(self, news: Sequence[News]) -> None:
        """Nobody listens."""

    async def decide(self, packet: SystemStatePacket) -> AdaptationDecision:
        return AdaptationDecision.make(packet, DecisionAction.WAIT, "waits")


class Watching:
    """An observer that does something after an epoch, and remembers the checkpoints."""

    def __init__(self, after: Callable[[int], None] = lambda epoch: None) -> None:
        self.after = after
        self.epochs: list[int] = []
        self.checkpoints: list[int] = []

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.epochs.append(row["epoch"])
        self.after(row["epoch"])

    def transition(self, transition: SeedTransition) -> None: ...

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None: ...

    def event(self, epoch: int, reason: str, message: str) -> None: ...

    def checkpoint(self, snapshot: Snapshot) -> None:
        self.checkpoints.append(snapshot.epoch)


def trainer(service: TolariaService, observer: Watching, epochs: int = 4) -> TolariaTrainer:
    settings = config({"epochs": epochs, "checkpoint": {"everyEpochs": 100}})
    return TolariaTrainer(
        settings,
        wrapped_mlp(),
        datasets(),
        Classification(),
        documents("low-rank"),
        controller=Waiting(),
        kernels=BuiltHere(),
        observers=[observer],
        ranks=Alone(service.stopping),
    )


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_a_run_goes_to_its_end_and_leaves_the_handlers_as_they_were() -> None:
    service = TolariaService()
    before = handlers()
    running = []
    observer = Watching(lambda epoch: running.append(service.running))
    result = asyncio.run(service.run(trainer(service, observer)))
    assert result.epochs == 4
    assert observer.epochs == [1, 2, 3, 4]
    assert observer.checkpoints == [4]
    assert running == [True] * 4
    assert not service.running
    assert not service.stopping()
    assert handlers() == before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_stops_between_two_batches_after_a_checkpoint(number: int) -> None:
    service = TolariaService()
    before = handlers()
    observer = Watching(lambda epoch: signal.raise_signal(number) if epoch == 2 else None)
    with pytest.raises(Interrupted):
        asyncio.run(service.run(trainer(service, observer)))
    assert observer.epochs == [1, 2]
    assert observer.checkpoints == [2]
    assert service.stopping()
    assert not service.running
    assert handlers() == before


def test_a_second_signal_does_what_it_would_have_done() -> None:
    service = TolariaService()
    heard: list[int] = []
    own = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:

        def after(epoch: int) -> None:
            signal.raise_signal(signal.SIGTERM)
            assert heard == []
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]

        with pytest.raises(Interrupted):
            asyncio.run(service.run(trainer(service, Watching(after))))
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, own)


def test_outside_the_main_thread_stop_is_the_way() -> None:
    service = TolariaService()
    before = handlers()
    observer = Watching(lambda epoch: service.stop())
    raised: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(service.run(trainer(service, observer)))
        except Interrupted as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(raised) == 1
    assert observer.epochs == [1]
    assert handlers() == before
