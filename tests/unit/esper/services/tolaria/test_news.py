"""What a session tells: numbered, under the trace it began with, and told again after a kill."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import (
    AdaptationDecision,
    Measurement,
    SeedTransition,
    SessionEvent,
    SystemStatePacket,
)
from esper.errors import Interrupted
from esper.execution.builders import build
from esper.services.tolaria.news import News, Numbering, packet_trace
from esper.services.tolaria.objective import Classification
from esper.services.tolaria.run_directory import LOGS, RunDirectory, RunLog
from esper.services.tolaria.trainer import TolariaTrainer
from esper.utils.logging import current_trace_id
from tests.unit.esper.services.tolaria.checkpointing import in_run, newest
from tests.unit.esper.services.tolaria.sessions import (
    BuiltHere,
    config,
    datasets,
    documents,
    wrapped_mlp,
)

SITE = ("hidden.0", 0)
EPOCHS = 8


class Germinating:
    """Germinates one seed as soon as it can; interrupts at an epoch's boundary where told to."""

    def __init__(self, interrupted_at: int = 0) -> None:
        self.interrupted_at = interrupted_at
        self.news: list[News] = []
        self.traces: dict[int, str | None] = {}

    async def tell(self, news: Sequence[News]) -> None:
        self.news.extend(news)

    async def decide(self, packet: SystemStatePacket) -> AdaptationDecision:
        self.traces[packet.sequence] = current_trace_id()
        if packet.epoch == self.interrupted_at:
            raise Interrupted("stopped while waiting")
        action = DecisionAction.WAIT if packet.seeds else DecisionAction.GERMINATE
        layer, slot = SITE
        return AdaptationDecision.make(
            packet, action, "because", layer=layer, slot=slot, blueprint="bottleneck-mlp"
        )


class Session:
    """A session in a directory, trained by one trainer after the other."""

    def __init__(self, folder: Path, scope: str = "uid-1") -> None:
        self.run = RunDirectory.create(folder, "the manifest", overwrite=False)
        self.checkpoints = in_run(folder, keep=3)
        self.log = RunLog(self.run, self.checkpoints)
        self.scope = scope

    def train(
        self, controller: Germinating, before: Callable[[TolariaTrainer], None] = lambda _: None
    ) -> None:
        settings = config({"epochs": EPOCHS, "checkpoint": {"everyEpochs": 3}})
        found = self.checkpoints.newest()
        recorded = self.log.rewind(found)
        told = self.run.told("small") if found else []
        self.log.open()
        model = wrapped_mlp()
        trainer = TolariaTrainer(
            settings,
            model,
            datasets(),
            Classification(),
            documents("bottleneck-mlp"),
            controller=controller,
            kernels=BuiltHere(),
            observers=[self.log],
            recorded=recorded,
            positions=self.log.lengths,
            scope=self.scope,
        )
        if found is not None:
            structure = found.snapshot.structure
            model.morphology.restore(structure, lambda entry: rebuilt(model, entry))
            trainer.restore(found.snapshot, told)
        before(trainer)
        try:
            with self.log.draining():
                asyncio.run(trainer.run())
        finally:
            self.log.close()

    def lines(self) -> dict[str, list[bytes]]:
        return {name: (self.run.path / name).read_bytes().splitlines() for name in LOGS}


def rebuilt(model: Any, entry: Mapping[str, Any]) -> Any:
    from esper.contracts.blueprints import Graph

    target = model.morphology.target(entry["layer"])
    return build(Graph.model_validate(entry["graph"]), target, generator_seed=0)


class DeathError(Exception):
    """A process dies."""


def die(trainer: TolariaTrainer, at_epoch: int) -> None:
    """Have the process die as it begins to train that epoch."""
    train_epoch = trainer.engine.train_epoch

    def mortal(epoch: int, **options: Any) -> float:
        if epoch == at_epoch:
            raise DeathError
        return train_epoch(epoch, **options)

    trainer.engine.train_epoch = mortal  # type: ignore[method-assign]


def heard(news: Sequence[News], scope: str = "uid-1") -> dict[str, SeedTransition | SessionEvent]:
    """By message id, as a receiver that drops what it has heard already keeps it."""
    return {one.message_id(scope): one.item for one in reversed(news)}


def test_a_seed_is_told_under_the_trace_of_the_signals_it_began_with(tmp_path, caplog):
    controller = Germinating()
    with caplog.at_level(logging.INFO, logger="esper"):
        Session(tmp_path / "run").train(controller)
    transitions = [one for one in controller.news if isinstance(one.item, SeedTransition)]
    assert len({one.item.current for one in transitions}) > 2
    first = packet_trace("uid-1", "small", 1)
    assert controller.traces[1] == first
    assert {one.trace_id for one in transitions} == {first}
    assert len(set(controller.traces.values())) == len(controller.traces)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "packet 1 of epoch 1: health signals of 3 layers" in said
    assert "dormant → germinated: because" in said


def test_what_is_told_has_ids_of_its_own(tmp_path):
    controller = Germinating()
    Session(tmp_path / "run").train(controller)
    assert {one.number for one in controller.news} == {0}
    assert len(heard(controller.news)) == len(controller.news)
    one = controller.news[0]
    assert one.message_id("uid-1") != one.message_id("uid-2")


def test_a_run_stopped_at_a_boundary_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, parts = Session(tmp_path / "whole"), Session(tmp_path / "parts")
    undisturbed = Germinating()
    whole.train(undisturbed)
    news: list[News] = []
    for epoch in (1, 2, 5):
        controller = Germinating(interrupted_at=epoch)
        with pytest.raises(Interrupted):
            parts.train(controller)
        news += controller.news
        assert newest(parts.checkpoints).epoch == epoch - 1
    controller = Germinating()
    parts.train(controller)
    news += controller.news

    def timeless(lines: dict[str, list[bytes]]) -> dict[str, list[dict[str, Any]]]:
        import json

        return {
            name: [
                {k: v for k, v in json.loads(line).items() if k not in ("time", "seconds")}
                for line in found
            ]
            for name, found in lines.items()
        }

    assert timeless(whole.lines()) == timeless(parts.lines())
    assert heard(undisturbed.news) == heard(news)


def test_what_was_told_but_not_got_out_is_told_again_after_a_kill(tmp_path):
    """The bus takes nothing, the process dies after a checkpoint; nothing may be lost."""
    whole, killed = Session(tmp_path / "whole"), Session(tmp_path / "killed")
    undisturbed = Germinating()
    whole.train(undisturbed)

    with pytest.raises(DeathError):
        killed.train(
            Germinating(), before=partial(die, at_epoch=7)
        )  # whatever it told went nowhere
    after = Germinating()
    killed.train(after)
    assert heard(after.news) == heard(undisturbed.news)
    early = [one for one in after.news if one.item.epoch <= 6]
    assert any(
        isinstance(one.item, SeedTransition) and one.item.current is SeedState.GERMINATED
        for one in early
    )
    assert {one.trace_id for one in early} == {packet_trace("uid-1", "small", 1)}


def test_what_only_an_attempt_told_that_was_lost_hides_nothing_of_the_next(tmp_path):
    """A kernel is put off while the hub is away; the next attempt, from before that, has it."""
    whole, killed = Session(tmp_path / "whole"), Session(tmp_path / "killed")
    undisturbed, before, after = Germinating(), Germinating(), Germinating()
    whole.train(undisturbed)

    def put_off_and_die(trainer: TolariaTrainer) -> None:
        trainer._tell_event("KernelPutOff", "hidden.0[0]: the hub does not answer")
        die(trainer, at_epoch=3)

    with pytest.raises(DeathError):
        killed.train(before, before=put_off_and_die)
    killed.train(after)
    assert any(isinstance(one.item, SeedTransition) for one in before.news)
    first: dict[str, SeedTransition | SessionEvent] = {}
    for one in (*before.news, *after.news):
        first.setdefault(one.message_id("uid-1"), one.item)
    transitions = [item for item in first.values() if isinstance(item, SeedTransition)]
    assert transitions == [one.item for one in undisturbed.news]


def test_the_same_told_twice_is_two_news_and_a_run_that_goes_on_knows_which():
    event = SessionEvent(session="small", epoch=4, reason="KernelPutOff", message="later")
    first, second = Numbering(), Numbering()
    told = [first.news(event, None) for _ in range(2)]
    assert len(heard(told)) == 2
    assert [second.news(event, None) for _ in range(2)] == told


@pytest.mark.parametrize("figure", [0.125, math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_is_told_and_comes_back_under_its_id(tmp_path, figure):
    measured = Measurement(mean=figure, lower=figure, upper=figure, rent=0.0, samples=8)
    transition = SeedTransition(
        session="small", epoch=3, layer="head", slot=0, cycle=0, previous=SeedState.TRAINING,
        current=SeedState.CULLED, blueprint="noop", reason="because", measurement=measured,
    )  # fmt: skip
    run = RunDirectory.create(tmp_path / "run", "the manifest", overwrite=False)
    log = RunLog(run, in_run(run.path))
    log.open()
    log.transition(transition)
    log.close()
    (again,) = run.told("small")
    ids = {Numbering().news(item, None).message_id("uid-1") for item in (transition, again)}
    assert len(ids) == 1


def test_events_come_back_from_their_file_as_they_were_told(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "the manifest", overwrite=False)
    log = RunLog(run, in_run(run.path))
    transition = SeedTransition(
        session="small", epoch=3, layer="head", slot=0, cycle=0, previous=SeedState.DORMANT,
        current=SeedState.GERMINATED, blueprint="noop", kernel="k", reason="because",
    )  # fmt: skip
    log.open()
    log.transition(transition)
    log.event(4, "RolledBack", "the loss was not finite")
    lengths = log.lengths()
    log.close()
    assert lengths["events.jsonl"] == (run.path / "events.jsonl").stat().st_size
    event = SessionEvent(
        session="small", epoch=4, reason="RolledBack", message="the loss was not finite"
    )
    assert run.told("small") == [transition, event]
    assert RunDirectory(tmp_path / "none").told("small") == []


def test_a_checkpoint_keeps_the_lengths_of_its_boundary(tmp_path):
    session = Session(tmp_path / "run")
    with pytest.raises(Interrupted):
        session.train(Germinating(interrupted_at=5))
    found = newest(session.checkpoints)
    written = session.lines()["metrics.jsonl"]
    assert len(written) == 5
    # The interval before the boundary is trained again: its line is cut off.
    assert found.state["lengths"]["metrics.jsonl"] == sum(len(line) + 1 for line in written[:4])
