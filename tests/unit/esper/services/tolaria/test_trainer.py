from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import (
    AdaptationDecision,
    SeedTransition,
    SessionEvent,
    SystemStatePacket,
)
from esper.services.tolaria.news import News
from esper.services.tolaria.objective import Classification
from esper.services.tolaria.snapshots import Snapshot
from esper.services.tolaria.trainer import TolariaTrainer, TrainingResult
from tests.unit.esper.services.tolaria.sessions import (
    BuiltHere,
    config,
    datasets,
    documents,
    wrapped_mlp,
)

S = SeedState
SITE = ("hidden.1", 0)


class Poisoned(Classification):
    """Cross-entropy, or not a number while `spoilt` is set."""

    spoilt = False

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(outputs, targets)
        return loss * torch.nan if self.spoilt else loss


class GraftsOnce:
    """Germinates one seed, opens its gate and grafts it; then waits. Observes what follows."""

    def __init__(self, objective: Poisoned) -> None:
        self.trainer: TolariaTrainer | None = None
        self.objective = objective
        self.rows: list[Mapping[str, Any]] = []
        self.told: list[tuple[SeedState, str]] = []
        self.events: list[str] = []
        self.published: list[SeedTransition | SessionEvent] = []

    async def tell(self, news: Sequence[News]) -> None:
        self.published.extend(one.item for one in news)

    async def decide(self, packet: SystemStatePacket) -> AdaptationDecision:
        assert self.trainer is not None
        record = self.trainer.growth.book.records.get(SITE)
        action, why = DecisionAction.WAIT, "nothing to do"
        if record is None:
            action, why = DecisionAction.GERMINATE, "the first seed"
        elif record.state is S.TRAINING:
            record.ready = True
            action, why = DecisionAction.GRAFT, "its gate is open"
        layer, slot = SITE
        return AdaptationDecision.make(
            packet, action, why, layer=layer, slot=slot, blueprint="bottleneck-mlp"
        )

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def transition(self, transition: SeedTransition) -> None:
        self.told.append((transition.current, transition.reason))
        # Without ramp and hold, the interval after this boundary is the recovery trial.
        self.objective.spoilt = transition.current is S.GRAFTING

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        assert applied, outcome

    def event(self, epoch: int, reason: str, message: str) -> None:
        self.events.append(f"{epoch} {reason}: {message}")
        self.objective.spoilt = False

    def checkpoint(self, snapshot: Snapshot) -> None:
        pass


def test_a_recovery_trial_without_a_finite_loss_in_either_arm_is_rolled_back() -> None:
    settings = config(
        {"epochs": 6},
        {
            "budget": {"parametersPercent": 200},
            "gates": {"dwellEpochs": 0, "rampEpochs": 0, "holdEpochs": 0},
        },
    )
    objective = Poisoned()
    watching = GraftsOnce(objective)
    trainer = watching.trainer = TolariaTrainer(
        settings,
        wrapped_mlp(),
        datasets(),
        objective,
        documents("bottleneck-mlp"),
        controller=watching,
        kernels=BuiltHere(),
        observers=[watching],
    )
    result: TrainingResult = asyncio.run(trainer.run())
    states = [state for state, _ in watching.told]
    assert states == [S.GERMINATED, S.TRAINING, S.GRAFTING, S.CULLED]
    assert watching.told[-1][1] == "the loss was not finite"
    assert [event.partition(":")[0] for event in watching.events] == ["2 RolledBack"]
    assert [row["epoch"] for row in watching.rows] == [1, 2, 3, 4, 5, 6]
    assert result.grown == ()
    assert result.parameters == result.parameters_base
    # Everything told to those who watch was published too, in the same order.
    published = [item for item in watching.published if isinstance(item, SeedTransition)]
    assert [(item.current, item.reason) for item in published] == watching.told
    assert [item.reason for item in watching.published if isinstance(item, SessionEvent)] == [
        "RolledBack"
    ]
