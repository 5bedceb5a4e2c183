from __future__ import annotations

import asyncio

import pytest
import torch
from torch import Tensor

from esper.contracts.blueprints import BlueprintDocument, builtin
from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import AdaptationDecision
from esper.execution.births import ROW_NORM
from esper.execution.isolation import RandomState
from esper.services.tolaria.births import BIRTH_SAMPLES, give_birth
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.growth import Growth
from esper.services.tolaria.seeds import SeedRecord
from tests.unit.esper.core.growing import graph_of
from tests.unit.esper.services.tolaria.sessions import BuiltHere, config, engine

ARGUMENTS = {
    "bottleneck-mlp": {"units": 3},
    "low-rank": {"rank": 2},
    "widen": {"units": 2},
}


def germinated(
    blueprint: str | BlueprintDocument, initialisation: str = "gradient", seed: int = 0
) -> tuple[Engine, bool, str]:
    """An engine whose hidden.1 was told to germinate the blueprint; whether it did, and how."""
    settings = config({"seed": seed}, {"budget": {"parametersPercent": 300}})
    found = engine(settings)
    if isinstance(blueprint, str):
        arguments = ARGUMENTS[blueprint] | {"initialisation": initialisation}
        blueprint = builtin(blueprint, arguments)
    growth = Growth(settings, found, [blueprint], BuiltHere(), lambda _: None, lambda *_: None)
    decision = AdaptationDecision(
        id="0" * 32,
        session="small",
        epoch=1,
        action=DecisionAction.GERMINATE,
        layer="hidden.1",
        slot=0,
        blueprint=blueprint.name,
        confidence=1.0,
        reason="because",
    )
    applied, outcome = asyncio.run(growth.apply(decision, 1))
    return found, applied, outcome


def weights(found: Engine) -> dict[str, Tensor]:
    return dict(found.model.morphology.seed_module("hidden.1", 0).named_parameters())


@pytest.mark.parametrize("blueprint", list(ARGUMENTS))
def test_a_seed_that_asks_is_born_on_data(blueprint: str) -> None:
    drawn, _, _ = germinated(blueprint, "default")
    found, applied, outcome = germinated(blueprint)
    assert applied, outcome
    different = [
        name
        for name, value in weights(found).items()
        if not torch.equal(value, weights(drawn)[name])
    ]
    assert len(different) == 1
    rows = weights(found)[different[0]].detach()
    norms = torch.full((len(rows),), ROW_NORM**2)
    torch.testing.assert_close(rows @ rows.T, norms.diag(), rtol=1e-4, atol=1e-5)


def test_the_pass_over_the_data_counts_as_a_trial() -> None:
    drawn, _, _ = germinated("bottleneck-mlp", "default")
    assert drawn.meter.total == 0
    found, _, _ = germinated("bottleneck-mlp")
    assert found.meter.trials == found.meter.total > 0
    # Every layer forward on all samples, and at least one product backward to reach hidden.1.
    samples = min(BIRTH_SAMPLES, len(found.datasets.train))
    assert found.meter.total >= 2 * samples * (6 * 5 + 5 * 4 + 4 * 3 + 4 * 3)


def test_it_is_repeatable_and_leaves_everything_else_alone() -> None:
    first, _, _ = germinated("bottleneck-mlp")
    second, _, _ = germinated("bottleneck-mlp")
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name])
    state = RandomState.capture()
    third = engine(config({"seed": 0}))
    before = {name: p.clone() for name, p in third.model.named_parameters()}
    graph = first.model.morphology.seed_graph("hidden.1", 0)
    assert graph is not None
    record = SeedRecord(layer="hidden.1", slot=1, state=SeedState.GERMINATED, cycle=0, kernel="k")
    give_birth(third, record, first.model.morphology.seed_module("hidden.1", 0), graph)
    assert torch.equal(RandomState.capture().torch_cpu, state.torch_cpu)
    for name, parameter in third.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_another_session_looks_at_other_samples() -> None:
    first, _, _ = germinated("bottleneck-mlp")
    graph = first.model.morphology.seed_graph("hidden.1", 0)
    assert graph is not None
    looked: list[Tensor] = []
    for seed in (1, 2, 2):
        found = engine(config({"seed": seed}))
        given: list[Tensor] = []
        found.loss_of = _recording(found, given)  # type: ignore[method-assign]
        record = SeedRecord(layer="hidden.1", slot=0, state=SeedState.GERMINATED, cycle=0)
        give_birth(found, record, first.model.morphology.seed_module("hidden.1", 0), graph)
        looked.append(torch.cat(given))
    assert not torch.equal(looked[0], looked[1])
    assert torch.equal(looked[1], looked[2])
    assert sorted(looked[0].tolist()) == list(range(48))


def _recording(found: Engine, given: list[Tensor]):  # type: ignore[no-untyped-def]
    loss_of = found.loss_of

    def recorded(indices: Tensor) -> Tensor:
        given.append(indices)
        return loss_of(indices)

    return recorded


def test_a_graph_without_meaning_for_it_is_a_failed_trial() -> None:
    graph = graph_of(
        {"op": "input", "id": "x"},
        {"op": "linear", "id": "y", "input": "x", "features": "out", "init": "gradient"},
    )
    document = BlueprintDocument(name="strange", hosts=("Linear",), graph=graph)
    found, applied, outcome = germinated(document)
    assert not applied
    assert "spec.graph.nodes[1].init" in outcome
    assert found.book.records["hidden.1", 0].state is SeedState.CULLED
    assert not found.model.morphology.active
