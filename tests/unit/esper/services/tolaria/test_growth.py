from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import AdaptationDecision, SeedTransition
from esper.errors import EsperError, HubUnavailable, KernelError
from esper.execution.state_layout import SeedLifecycleState
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.gates import Verdict, rent_of
from esper.services.tolaria.growth import Growth
from esper.services.tolaria.seeds import SeedRecord
from tests.unit.esper.services.tolaria.sessions import BuiltHere, config, documents, engine

S = SeedState
BASE = (6 * 5 + 5) + (5 * 4 + 4) + (4 * 3 + 3)


@dataclass
class Grown:
    """A growth on the small MLP, and what it told."""

    growth: Growth
    engine: Engine
    kernels: BuiltHere
    told: list[SeedTransition] = field(default_factory=list)
    heard: list[tuple[str, str]] = field(default_factory=list)

    def decide(
        self,
        action: DecisionAction,
        layer: str | None = "hidden.1",
        slot: int | None = 0,
        blueprint: str | None = "bottleneck-mlp",
        epoch: int = 1,
    ) -> tuple[bool, str]:
        decision = AdaptationDecision(
            id="0" * 32,
            session="small",
            epoch=epoch,
            action=action,
            layer=layer,
            slot=slot,
            blueprint=blueprint,
            confidence=1.0,
            reason="because",
        )
        return asyncio.run(self.growth.apply(decision, epoch))

    def germinate(self, *site: Any, **rest: Any) -> SeedRecord:
        applied, outcome = self.decide(DecisionAction.GERMINATE, *site, **rest)
        assert applied, outcome
        return list(self.growth.book.records.values())[-1]

    def trained(self, *site: Any, **rest: Any) -> SeedRecord:
        record = self.germinate(*site, **rest)
        self.growth.begin_trials(1)
        assert record.state is S.TRAINING
        return record

    def grafting(self, *site: Any, **rest: Any) -> SeedRecord:
        record = self.trained(*site, **rest)
        record.ready = True
        applied, outcome = self.decide(DecisionAction.GRAFT, record.layer, record.slot)
        assert applied, outcome
        return record

    def twin(self, record: SeedRecord) -> SeedLifecycleState:
        return self.engine.model.morphology.state(*record.site)


def grown(
    growth: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    names: tuple[str, ...] = ("noop", "low-rank", "bottleneck-mlp", "widen"),
    refusal: EsperError | None = None,
) -> Grown:
    budget = {"parametersPercent": 200, "activeSeeds": 1}
    settings = config(training, {"budget": budget, **(growth or {})})
    found = engine(settings)
    kernels = BuiltHere(refusal)
    told: list[SeedTransition] = []
    heard: list[tuple[str, str]] = []
    growth_of = Growth(
        settings,
        found,
        documents(*names),
        kernels,
        told.append,
        lambda reason, message: heard.append((reason, message)),
    )
    return Grown(growth_of, found, kernels, told, heard)


# -- what the controller sees -------------------------------------------------------------------


def test_candidates_are_what_fits_where_with_its_price() -> None:
    found = grown().growth
    by_place = {(one.layer, one.blueprint): one for one in found.candidates}
    # The first layer has no producer, so there is nothing to widen in front of it.
    assert set(by_place) == {
        (layer, name)
        for layer in ("hidden.0", "hidden.1", "head")
        for name in ("noop", "low-rank", "bottleneck-mlp", "widen")
    } - {("hidden.0", "widen")}
    assert by_place["hidden.1", "noop"].parameters == 0
    assert by_place["hidden.1", "low-rank"].parameters == 2 * (5 + 4)
    assert {name: one.folds for (layer, name), one in by_place.items() if layer == "head"} == {
        "noop": True,
        "low-rank": True,
        "bottleneck-mlp": False,
        "widen": False,
    }
    widen = by_place["hidden.1", "widen"]
    assert widen.parameters == 2 * (6 + 1) + 2 * 4
    assert widen.flops > 0


def test_layers_and_budget() -> None:
    found = grown().growth
    described = found.layer_descriptions()
    assert [(one.name, one.kind, one.slots) for one in described] == [
        ("hidden.0", "Linear", 2),
        ("hidden.1", "Linear", 2),
        ("head", "Linear", 2),
    ]
    assert sum(one.parameters for one in described) == BASE == found.parameters_base
    assert (found.parameters(), found.remaining_parameters()) == (BASE, 2 * BASE)


def test_parameters_count_from_grafting_on_and_hosts_keep_their_own() -> None:
    case = grown()
    record = case.trained()
    assert case.growth.parameters() == BASE
    record.ready = True
    case.decide(DecisionAction.GRAFT)
    assert case.growth.parameters() == BASE + record.parameters
    assert case.growth.remaining_parameters() == 2 * BASE - record.parameters
    assert sum(one.parameters for one in case.growth.layer_descriptions()) == BASE


# -- germinating --------------------------------------------------------------------------------


def test_a_germinated_seed_stands_in_the_book_and_in_the_model() -> None:
    case = grown({"gates": {"rentPerGigaflop": 3.0}})
    record = case.germinate()
    assert (record.state, record.site, record.cycle) == (S.GERMINATED, ("hidden.1", 0), 0)
    assert len(record.kernel) == 40
    gates = case.engine.config.growth.gates
    assert record.rent == rent_of(record.parameters, record.flops, gates) > 0
    assert case.twin(record) is SeedLifecycleState.GERMINATED
    built = case.engine.model.morphology.seed_parameters(*record.site)
    assert sum(p.numel() for p in built) == record.parameters
    (told,) = case.told
    assert (told.previous, told.current, told.reason) == (S.DORMANT, S.GERMINATED, "because")
    assert (told.epoch, told.kernel) == (1, record.kernel)
    (trial,) = case.growth.book.trials
    assert (trial.started_epoch, trial.ended_epoch) == (1, None)


def test_waiting_is_always_possible() -> None:
    assert grown().decide(DecisionAction.WAIT, None, None) == (True, "waited")


REFUSED = [
    ((DecisionAction.GERMINATE, None, 0), "names no layer and slot"),
    ((DecisionAction.GERMINATE, "head", None), "names no layer and slot"),
    ((DecisionAction.GERMINATE, "nowhere", 0), "no candidate at nowhere"),
    ((DecisionAction.GERMINATE, "hidden.0", 0, "widen"), "widen is no candidate at hidden.0"),
    ((DecisionAction.GERMINATE, "head", 0, None), "None is no candidate"),
    ((DecisionAction.GERMINATE, "head", 2), "has no slot 2"),
    ((DecisionAction.GRAFT, "head", 0), "no seed at head/0"),
    ((DecisionAction.CULL, "head", 0), "no seed at head/0"),
]


@pytest.mark.parametrize(("decision", "outcome"), REFUSED)
def test_decisions_that_make_no_sense_are_refused(decision: tuple[Any, ...], outcome: str) -> None:
    case = grown()
    applied, told = case.decide(*decision)
    assert not applied
    assert outcome in told
    assert (case.told, case.growth.book.records) == ([], {})


def test_a_taken_slot_or_a_spent_budget_is_refused() -> None:
    case = grown()
    case.germinate()
    assert case.decide(DecisionAction.GERMINATE) == (
        False,
        "refused: slot 0 of hidden.1 is germinated",
    )
    poor = grown({"budget": {"parametersPercent": 10}})
    applied, outcome = poor.decide(DecisionAction.GERMINATE)
    assert not applied
    assert f"the budget leaves {int(BASE * 0.1)}" in outcome
    assert poor.decide(DecisionAction.GERMINATE, "head", 0, "noop")[0]


def test_a_kernel_that_fails_for_good_is_a_trial_that_failed() -> None:
    case = grown(refusal=KernelError("does not compile"))
    assert case.decide(DecisionAction.GERMINATE) == (False, "failed: does not compile")
    (record,) = case.growth.book.records.values()
    assert (record.state, record.opens_epoch) == (S.CULLED, 6)
    assert record.reason == "does not compile"
    assert case.heard == [("KernelFailed", "hidden.1[0]: does not compile")]
    (trial,) = case.growth.book.trials
    assert (trial.state, trial.ended_epoch) == (S.CULLED, 1)
    assert case.twin(record) is SeedLifecycleState.DORMANT
    case.growth.reopen(6)
    assert (record.state, record.cycle) == (S.DORMANT, 1)
    case.kernels.refusal = None
    assert case.germinate(epoch=6).cycle == 1


def test_a_service_that_does_not_answer_leaves_the_slot_as_it_was_and_says_why() -> None:
    case = grown(refusal=HubUnavailable("no answer"))
    assert case.decide(DecisionAction.GERMINATE) == (False, "put off: no answer")
    (record,) = case.growth.book.records.values()
    assert (record.state, record.reason) == (S.DORMANT, "no answer")
    assert case.twin(record) is SeedLifecycleState.DORMANT
    assert (case.growth.book.trials, case.told) == ([], [])
    assert case.heard == [("KernelPutOff", "hidden.1[0]: no answer")]
    case.kernels.refusal = None
    assert case.germinate().reason == "because"


# -- faults -------------------------------------------------------------------------------------


def test_three_boundaries_with_an_output_that_is_not_finite_cull_the_seed() -> None:
    case = grown()
    record = case.trained("hidden.1", 0)
    for epoch in (1, 2):
        case.growth.watch({"hidden.1": 0.5}, {record.site: False}, epoch)
        assert record.state is S.TRAINING
    case.growth.watch({"hidden.1": 0.5}, {record.site: False}, 3)
    assert record.state is S.CULLED
    assert record.reason == "3 faults in a row, the last: its output is not finite"
    assert [reason for reason, _ in case.heard] == ["SeedFault"] * 3 + ["CircuitOpened"]
    assert case.told[-1].current is S.CULLED


def test_faults_that_are_not_in_a_row_cull_nothing() -> None:
    case = grown()
    record = case.trained("hidden.1", 0)
    for epoch, finite in enumerate((False, False, True, False, False, True), start=1):
        case.growth.watch({}, {record.site: finite}, epoch)
    assert record.state is S.TRAINING
    assert record.faults == 4


def test_a_seed_that_raises_is_answered_by_its_host_and_culled_at_the_boundary() -> None:
    case = grown()
    record = case.grafting("hidden.1", 0)
    model, x = case.engine.model, torch.randn(3, 6)
    with model.morphology.without(*record.site):
        without_seed = model(x)
    case.engine.model.morphology.seed_module(*record.site).forward = refuse
    for _ in range(3):
        assert torch.equal(model(x), without_seed)
    case.growth.watch({}, {record.site: True}, 2)
    assert record.state is S.CULLED
    assert "3 faults in a row, the last: MemoryError: no room" in record.reason


def test_a_new_seed_in_a_slot_is_not_blamed_for_an_earlier_one() -> None:
    case = grown()
    record = case.trained("hidden.1", 0)
    for epoch in (1, 2, 3):
        case.growth.watch({}, {record.site: False}, epoch)
    case.growth.reopen(record.opens_epoch)
    case.heard.clear()
    again = case.trained("hidden.1", 0, epoch=record.opens_epoch)
    case.growth.watch({}, {again.site: True}, record.opens_epoch)
    assert case.heard == []


def test_what_the_probes_saw_is_kept_in_the_layout() -> None:
    case = grown()
    record = case.trained("hidden.1", 0)
    twin = case.engine.model.morphology.record(*record.site)
    case.growth.grow_older(2)
    case.growth.watch({"hidden.1": 0.5}, {}, 2)
    assert (twin.age, twin.health) == (2, 0.5)
    case.growth.watch({"hidden.1": 1.0}, {}, 3)
    assert twin.health == pytest.approx(0.7 * 0.5 + 0.3)
    case.growth.judge_trials(3)
    assert record.measurement is not None
    assert twin.contribution == pytest.approx(record.measurement.mean)


def refuse(_: torch.Tensor) -> torch.Tensor:
    raise MemoryError("no room")


# -- shadow trials ------------------------------------------------------------------------------


@pytest.mark.parametrize(("active", "training"), [(1, 1), (2, 2), (5, 3)])
def test_as_many_seeds_learn_at_once_as_the_budget_allows(active: int, training: int) -> None:
    case = grown({"budget": {"parametersPercent": 1000, "activeSeeds": active}})
    seeds = [case.germinate(layer, 0) for layer in ("hidden.0", "hidden.1", "head")]
    case.growth.begin_trials(1)
    assert [one.state is S.TRAINING for one in seeds] == [True] * training + [False] * (
        3 - training
    )
    assert list(case.engine.seed_optimizers) == [one.site for one in seeds[:training]]
    case.growth.begin_trials(1)
    assert len(case.growth.book.learning()) == training


def test_a_ready_seed_makes_room_for_the_next() -> None:
    case = grown()
    first, second = case.germinate("head", 0), case.germinate("hidden.1", 0)
    case.growth.begin_trials(1)
    first.ready = True
    case.growth.begin_trials(2)
    assert second.state is S.TRAINING


def test_measuring_a_newborn_seed_finds_that_it_changes_nothing() -> None:
    case = grown()
    record = case.trained()
    before = [p.detach().clone() for p in case.engine.model.parameters()]
    case.growth.judge_trials(1)
    assert record.measurement is not None
    assert (record.measurement.mean, record.measurement.lower) == (0.0, 0.0)
    assert record.measurement.rent == record.rent
    assert (record.passes, record.ready, record.state) == (0, False, S.TRAINING)
    assert case.growth.book.trials[0].measurement == record.measurement
    assert all(map(torch.equal, before, case.engine.model.parameters()))


def test_without_learning_seeds_nothing_is_measured() -> None:
    case = grown()
    case.germinate()
    case.growth.judge_trials(1)
    assert case.engine.meter.total == 0


def test_a_seed_that_does_not_pass_is_culled_at_its_age_limit() -> None:
    case = grown({"gates": {"dwellEpochs": 1, "ageEpochs": 2}})
    record = case.trained()
    case.growth.grow_older(1)
    case.growth.judge_trials(2)
    assert record.state is S.TRAINING
    case.growth.grow_older(1)
    case.growth.judge_trials(3)
    assert record.state is S.CULLED
    assert case.told[-1].reason.endswith("at the age limit of 2 epochs")
    assert case.told[-1].measurement == record.measurement
    assert record.opens_epoch == 3 + 5
    assert case.engine.seed_optimizers == {}
    assert case.growth.book.trials[0].ended_epoch == 3


def test_a_seed_that_helps_opens_its_gate() -> None:
    case = grown({"gates": {"dwellEpochs": 1, "ageEpochs": 30, "rentPerMillionParameters": 0}})
    record = case.trained("head", 0)
    for epoch in range(1, 30):
        case.engine.train_epoch(epoch)
        case.growth.grow_older(1)
        case.growth.judge_trials(epoch)
        if record.ready:
            break
    assert record.ready
    assert record.passes >= 2
    assert record.measurement is not None
    assert record.measurement.passes()


# -- grafting, recovery, fossilising ------------------------------------------------------------


def test_a_closed_gate_or_too_little_time_or_budget_refuses_a_graft() -> None:
    case = grown()
    record = case.trained()
    assert case.decide(DecisionAction.GRAFT)[1] == ("refused: the gate of hidden.1/0 is not open")
    record.ready = True
    # 40 epochs; ramp 3, hold 2 and one interval of recovery need 6.
    assert case.decide(DecisionAction.GRAFT, epoch=35) == (
        False,
        "refused: ramp, hold and recovery need 6 epochs, 5 are left",
    )
    record.parameters = 10 * BASE
    assert "the budget leaves" in case.decide(DecisionAction.GRAFT)[1]
    assert record.state is S.TRAINING
    record.parameters = 1
    assert case.decide(DecisionAction.GRAFT, epoch=34)[0]


def test_a_grafting_seed_blends_in_along_its_ramp() -> None:
    case = grown({"gates": {"rampEpochs": 3, "holdEpochs": 2}})
    record = case.grafting()
    assert (record.state, record.ready, record.age_epochs) == (S.GRAFTING, False, 0)
    alphas = [record.alpha]
    due = []
    for _ in range(6):
        due.append(case.growth.recovery_due() is record)
        case.growth.grow_older(1)
        case.growth.blend()
        alphas.append(record.alpha)
        assert case.engine.model.morphology.record(*record.site).alpha == record.alpha
    assert alphas == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert due == [False] * 5 + [True]


def test_a_recovery_trial_that_passes_makes_the_seed_part_of_the_model() -> None:
    case = grown()
    record = case.grafting()
    judgement = case.growth.judge_recovery(record, [1.0, 1.2, 1.1], [0.5, 0.6, 0.55])
    assert judgement.verdict is Verdict.FOSSILIZE
    case.growth.fossilize(record, 9, judgement.reason)
    assert (record.state, record.alpha, record.fossilized_epoch) == (S.FOSSILIZED, 1.0, 9)
    assert case.twin(record) is SeedLifecycleState.FOSSILIZED
    assert len(case.engine.host_optimizer.param_groups) == 2
    assert case.engine.seed_optimizers == {}
    assert case.growth.book.trials[0].ended_epoch == 9
    assert case.growth.parameters() == BASE + record.parameters
    assert case.told[-1].measurement == record.measurement
    assert case.decide(DecisionAction.CULL)[1] == (
        "refused: a fossilized seed is not culled by decision"
    )


@pytest.mark.parametrize("with_seed", [[], [1.0, 1.2, 1.1], [float("nan")] * 3])
def test_a_recovery_trial_without_a_gain_or_a_measurement_fails(with_seed: list[float]) -> None:
    case = grown()
    record = case.grafting()
    judgement = case.growth.judge_recovery(record, [1.0, 1.2, 1.1], with_seed)
    assert judgement.verdict is Verdict.CULL
    case.growth.cull(record, 9, judgement.reason)
    assert case.growth.parameters() == BASE
    assert (record.alpha, record.ready) == (0.0, False)


# -- culling ------------------------------------------------------------------------------------


def test_a_decision_culls_seeds_before_grafting_only() -> None:
    for make in ("germinate", "trained"):
        case = grown()
        record = getattr(case, make)()
        assert case.decide(DecisionAction.CULL) == (True, "culled")
        assert record.state is S.CULLED
    case = grown()
    case.grafting()
    assert case.decide(DecisionAction.CULL)[1] == (
        "refused: a grafting seed is not culled by decision"
    )


def test_a_culled_slot_opens_when_its_embargo_ends_and_longer_every_time() -> None:
    case = grown({"gates": {"embargoEpochs": 2}})
    epoch, waits = 1, []
    for cycle in range(3):
        record = case.germinate(epoch=epoch)
        assert record.cycle == cycle
        case.growth.cull(record, epoch, "enough")
        waits.append(record.opens_epoch - epoch)
        case.growth.reopen(record.opens_epoch - 1)
        assert record.state is S.CULLED
        assert "is culled" in case.decide(DecisionAction.GERMINATE)[1]
        epoch = record.opens_epoch
        case.growth.reopen(epoch)
        assert record.state is S.DORMANT
        assert case.twin(record) is SeedLifecycleState.DORMANT
        # The step back to dormancy belongs to the cycle that ends with it.
        assert case.told[-1].cycle == cycle
    assert waits == [2, 4, 8]
    assert [trial.cycle for trial in case.growth.book.trials] == [0, 1, 2]


def test_a_culled_seed_leaves_the_model_as_it_was_to_the_bit() -> None:
    case = grown()
    x = torch.randn(4, 6)
    before, keys = case.engine.model(x), list(case.engine.model.state_dict())
    record = case.trained()
    assert torch.equal(case.engine.model(x), before)
    case.growth.cull(record, 1, "enough")
    assert torch.equal(case.engine.model(x), before)
    assert list(case.engine.model.state_dict()) == keys


def test_active_seeds_are_those_whose_fate_is_open() -> None:
    case = grown({"budget": {"parametersPercent": 1000, "activeSeeds": 4}})
    kept = case.grafting("head", 0)
    culled = case.germinate("hidden.1", 0)
    case.growth.cull(culled, 1, "enough")
    waiting = case.germinate("hidden.0", 1)
    assert case.growth.active() == [kept, waiting]


def test_every_step_is_told_once_in_order() -> None:
    case = grown()
    record = case.grafting()
    case.growth.fossilize(record, 9, "kept")
    steps = [(one.previous, one.current) for one in case.told]
    assert steps == [
        (S.DORMANT, S.GERMINATED),
        (S.GERMINATED, S.TRAINING),
        (S.TRAINING, S.GRAFTING),
        (S.GRAFTING, S.FOSSILIZED),
    ]
