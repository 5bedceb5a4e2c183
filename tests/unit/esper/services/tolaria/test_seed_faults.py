"""A seed goes wrong in the middle of a session: training goes on, and the seed says why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import (
    AdaptationDecision,
    SeedTransition,
    SystemStatePacket,
)
from esper.errors import HubUnavailable, KernelError
from esper.services.tolaria.growth import BuiltSeed
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

S = SeedState
SITE = ("hidden.1", 0)


class Spoiling(BuiltHere):
    """Gives a seed that is spoilt in the way of `spoil`, or sound ones once that is None."""

    def __init__(self, spoil: Callable[[nn.Module], None] | None) -> None:
        super().__init__()
        self.spoil = spoil

    async def build(
        self, document: BlueprintDocument, target: KernelTarget, layer: str, slot: int
    ) -> BuiltSeed:
        built = await super().build(document, target, layer, slot)
        if self.spoil is not None:
            self.spoil(built.module)
        return built


class Germinates:
    """Germinates wherever the slot is free; never grafts. Observes what follows."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.events: list[tuple[str, str]] = []
        self.transitions: list[SeedTransition] = []

    async def tell(self, news: Sequence[News]) -> None:
        """Nothing to learn from."""

    async def decide(self, packet: SystemStatePacket) -> AdaptationDecision:
        layer, slot = SITE
        seeds = {(seed.layer, seed.slot): seed.state for seed in packet.seeds}
        free = seeds.get(SITE, S.DORMANT) is S.DORMANT
        action = DecisionAction.GERMINATE if free else DecisionAction.WAIT
        return AdaptationDecision.make(
            packet, action, "because", layer=layer, slot=slot, blueprint="bottleneck-mlp"
        )

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def transition(self, transition: SeedTransition) -> None:
        self.transitions.append(transition)

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        """Seen in what it leads to."""

    def event(self, epoch: int, reason: str, message: str) -> None:
        self.events.append((reason, message))

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Nothing is kept."""


def run(kernels: BuiltHere, mend: Callable[[Germinates], None] = lambda _: None) -> Germinates:
    """Twelve epochs; `mend` is called after each."""
    torch.manual_seed(0)
    told = Germinates()
    gates = {"embargoEpochs": 1, "ageEpochs": 20, "dwellEpochs": 20}
    settings = config(
        {"epochs": 12}, {"gates": gates, "budget": {"parametersPercent": 200, "activeSeeds": 1}}
    )
    trainer = TolariaTrainer(
        settings,
        wrapped_mlp(),
        datasets(),
        Classification(),
        documents("bottleneck-mlp"),
        controller=told,
        kernels=kernels,
        observers=[told, Mending(told, mend)],
    )
    asyncio.run(trainer.run())
    return told


class Mending(Germinates):
    """Calls `mend` after every epoch."""

    def __init__(self, told: Germinates, mend: Callable[[Germinates], None]) -> None:
        super().__init__()
        self._told, self._mend = told, mend

    def epoch(self, row: Mapping[str, Any]) -> None:
        self._mend(self._told)


def losses(told: Germinates) -> list[float]:
    return [row["trainLoss"] for row in told.rows]


def nan_weights(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)


def infinite_weights(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.inf)


def no_memory(module: nn.Module) -> None:
    def forward(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    module.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (nan_weights, "its output is not finite"),
        (infinite_weights, "its output is not finite"),
        (no_memory, "OutOfMemoryError: tried to allocate 2.00 GiB"),
    ],
)
def test_a_seed_that_fails_is_culled_its_host_undisturbed_and_a_later_one_succeeds(
    spoil: Callable[[nn.Module], None], fault: str
) -> None:
    kernels = Spoiling(spoil)

    def mend(told: Germinates) -> None:
        if any(one.current is S.CULLED for one in told.transitions):
            kernels.spoil = None

    told = run(kernels, mend)
    undisturbed = run(BuiltHere(HubUnavailable("no kernels today")))
    assert losses(told) == losses(undisturbed), "the host has not felt a thing"
    (culled,) = [one for one in told.transitions if one.current is S.CULLED and one.epoch < 12]
    assert culled.reason == f"3 faults in a row, the last: {fault}"
    assert [reason for reason, _ in told.events].count("CircuitOpened") == 1
    assert ("SeedFault", f"hidden.1[0]: {fault}") in told.events
    shown = [seed for row in told.rows for seed in row["active"] if seed["state"] == "training"]
    assert fault in {seed["reason"] for seed in shown} or spoil is no_memory
    last = [seed for seed in told.rows[-1]["active"] if (seed["layer"], seed["slot"]) == SITE]
    assert last[0]["state"] == "training", "the next seed in the slot is well"
    assert last[0]["cycle"] == 1


def test_a_hub_that_is_away_for_a_while_is_asked_again() -> None:
    kernels = BuiltHere(HubUnavailable("hub: got connection refused"))

    def mend(told: Germinates) -> None:
        if len(told.rows) == 4:
            kernels.refusal = None

    told = run(kernels, mend)
    reasons = [row["active"][0]["reason"] for row in told.rows[1:4]]
    assert reasons == ["hub: got connection refused"] * 3
    assert ("KernelPutOff", "hidden.1[0]: hub: got connection refused") in told.events
    assert told.transitions[0].current is S.GERMINATED
    assert told.rows[-1]["active"][0]["state"] == "training"


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (KernelError("kernel k: got SHA-256 1; allowed: 2"), "kernel k: got SHA-256 1; allowed: 2"),
        (LookupError("F4"), "unexpected LookupError: F4"),
    ],
)
def test_a_kernel_that_can_not_be_had_is_a_trial_that_failed(
    refusal: Exception, reason: str
) -> None:
    kernels = BuiltHere(refusal)

    def mend(told: Germinates) -> None:
        if len(told.rows) == 3:
            kernels.refusal = None

    told = run(kernels, mend)
    assert losses(told) == losses(run(BuiltHere(HubUnavailable("no kernels today"))))
    assert ("KernelFailed", f"hidden.1[0]: {reason}") in told.events
    moves = [(one.previous, one.current, one.reason) for one in told.transitions]
    assert moves[:2] == [
        (S.DORMANT, S.CULLED, reason),
        (S.CULLED, S.DORMANT, "the embargo is over"),
    ]
    assert told.rows[-1]["active"][0]["state"] == "training", "a later retry succeeds"
