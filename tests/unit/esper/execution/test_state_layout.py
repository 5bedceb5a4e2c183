from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.enums import SeedState
from esper.errors import BadInput, EsperError
from esper.execution.state_layout import (
    ACTIVE_STATES,
    TRANSITIONS,
    KasminaStateLayout,
    SeedLifecycleState,
    check_transition,
    kernel_number,
)

S = SeedLifecycleState

LEGAL = {
    (S.DORMANT, S.GERMINATED),
    (S.GERMINATED, S.TRAINING),
    (S.GERMINATED, S.CULLED),
    (S.TRAINING, S.GRAFTING),
    (S.TRAINING, S.CULLED),
    (S.GRAFTING, S.FOSSILIZED),
    (S.GRAFTING, S.CULLED),
    (S.CULLED, S.DORMANT),
}


@pytest.mark.parametrize(("previous", "current"), list(itertools.product(S, S)))
def test_the_lifecycle_has_these_steps_and_no_others(previous: S, current: S) -> None:
    if (previous, current) in LEGAL:
        check_transition(previous, current)
    else:
        with pytest.raises(BadInput, match=f"{previous.seed_state} seed's next state"):
            check_transition(previous, current)


def test_every_state_has_a_row_and_fossilized_is_the_end() -> None:
    assert set(TRANSITIONS) == set(S)
    assert not TRANSITIONS[S.FOSSILIZED]
    with pytest.raises(EsperError, match="got culled; allowed: nothing"):
        check_transition(S.FOSSILIZED, S.CULLED)


def test_the_integer_and_the_word_are_twins() -> None:
    assert [state.seed_state for state in S] == list(SeedState)
    assert [S.of(state) for state in SeedState] == list(S)
    assert list(map(int, S)) == [0, 1, 2, 3, 4, 5]


def test_eight_tensors_one_entry_a_slot() -> None:
    tensors = KasminaStateLayout(3, 2).tensors()
    assert len(tensors) == 8
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(3, 2)}


def assert_twins_agree(layout: KasminaStateLayout) -> None:
    for layer, slot, record in layout.records():
        at = (layer, slot)
        assert layout.lifecycle[at].item() == record.state
        assert layout.kernel_id[at].item() == kernel_number(record.kernel)
        assert layout.alpha[at].item() == torch.tensor(record.alpha).item()
        assert layout.age[at].item() == record.age
        assert layout.error_count[at].item() == record.errors
        assert layout.fallback[at].item() == record.fallbacks
        assert torch.allclose(layout.health[at], torch.tensor(record.health), equal_nan=True)
        kept, twin = layout.contribution[at], torch.tensor(record.contribution)
        assert torch.allclose(kept, twin, equal_nan=True)
    states = [record.state for _, _, record in layout.records()]
    assert layout.active == sum(state in ACTIVE_STATES for state in states)
    assert sum(layout.counts().values()) == len(states)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("transition"), st.sampled_from(list(S))),
        st.tuples(st.just("alpha"), st.floats(0, 1)),
        st.tuples(st.just("observe"), st.floats(0, 1)),
        st.tuples(st.just("contribution"), st.floats(-3, 3)),
        st.tuples(st.just("fault"), st.none()),
        st.tuples(st.just("clear"), st.none()),
        st.tuples(st.just("advance"), st.none()),
        st.tuples(st.just("kernel"), st.text(max_size=8)),
    ),
    max_size=40,
)


@given(steps=steps, slots=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=40))
def test_tensors_and_twin_never_part(steps: list, slots: list) -> None:
    layout = KasminaStateLayout(2, 3)
    for (what, value), (layer, slot) in zip(steps, slots, strict=False):
        match what:
            case "transition":
                if value in TRANSITIONS[layout.record(layer, slot).state]:
                    layout.transition(layer, slot, value)
            case "alpha":
                layout.write(layer, slot, alpha=value)
            case "observe":
                layout.observe(layer, slot, value)
            case "contribution":
                layout.observe_contribution(layer, slot, value)
            case "fault":
                layout.record_fault(layer, slot, "it broke")
            case "clear":
                layout.clear_faults(layer, slot)
            case "advance":
                layout.advance()
            case "kernel":
                layout.write(layer, slot, kernel=value)
    assert_twins_agree(layout)


def test_an_illegal_step_changes_nothing() -> None:
    layout = KasminaStateLayout(1, 1)
    with pytest.raises(BadInput):
        layout.transition(0, 0, S.GRAFTING)
    assert layout.record(0, 0).state is S.DORMANT
    assert_twins_agree(layout)


def test_a_life_ends_in_a_new_cycle_with_nothing_left_of_it() -> None:
    layout = KasminaStateLayout(1, 1)
    layout.transition(0, 0, S.GERMINATED)
    layout.write(0, 0, kernel="abc")
    layout.observe(0, 0, 0.5)
    layout.record_fault(0, 0, "it broke")
    layout.transition(0, 0, S.CULLED)
    record = layout.transition(0, 0, S.DORMANT)
    assert (record.cycle, record.kernel, record.errors, record.age) == (1, None, 0, 0)
    assert math.isnan(record.health)
    assert record.fallbacks == 1
    assert_twins_agree(layout)


def test_health_is_an_exponential_average_that_starts_at_the_first_value() -> None:
    layout = KasminaStateLayout(1, 1, decay=0.7)
    assert layout.observe(0, 0, 0.8) == 0.8
    assert layout.observe(0, 0, 0.3) == pytest.approx(0.7 * 0.8 + 0.3 * 0.3)


def test_a_health_that_is_not_finite_counts_as_zero() -> None:
    layout = KasminaStateLayout(1, 1)
    assert layout.observe(0, 0, math.nan) == 0.0
    assert layout.observe(0, 0, math.inf) == 0.0


def test_a_missing_contribution_leaves_no_average() -> None:
    layout = KasminaStateLayout(1, 1)
    layout.observe_contribution(0, 0, 0.1)
    assert math.isnan(layout.observe_contribution(0, 0, math.nan))
    assert layout.observe_contribution(0, 0, 0.2) == 0.2


def test_three_faults_in_a_row_open_the_circuit() -> None:
    layout = KasminaStateLayout(1, 1)
    assert [layout.record_fault(0, 0, "it broke") for _ in range(2)] == [False, False]
    layout.clear_faults(0, 0)
    assert [layout.record_fault(0, 0, "it broke") for _ in range(3)] == [False, False, True]
    assert layout.record(0, 0).circuit_open
    assert layout.record(0, 0).fallbacks == 5


def test_only_slots_that_live_grow_older() -> None:
    layout = KasminaStateLayout(1, 2)
    layout.transition(0, 1, S.GERMINATED)
    layout.advance()
    layout.advance()
    assert layout.age.tolist() == [[0, 2]]
    layout.transition(0, 1, S.TRAINING)
    assert layout.age.tolist() == [[0, 0]]


@pytest.mark.parametrize("slot", [-1, 2, True, 0.0, "0"])
def test_a_slot_that_is_not_there_is_refused(slot: object) -> None:
    with pytest.raises(BadInput, match="0 to 1"):
        KasminaStateLayout(1, 2).record(0, slot)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_stays_between_nothing_and_all(alpha: float) -> None:
    with pytest.raises(BadInput, match="alpha"):
        KasminaStateLayout(1, 1).write(0, 0, alpha=alpha)


def test_a_decay_of_one_would_never_learn() -> None:
    with pytest.raises(BadInput, match="decay"):
        KasminaStateLayout(1, 1, decay=1.0)


@given(st.text())
def test_kernel_numbers_fit_an_int64_and_differ_from_none(kernel: str) -> None:
    assert 0 < kernel_number(kernel) < 2**63


def test_moving_keeps_types_and_values() -> None:
    layout = KasminaStateLayout(1, 1)
    layout.write(0, 0, alpha=0.25)
    types = {name: tensor.dtype for name, tensor in layout.tensors().items()}
    layout.to("meta")
    assert layout.device == torch.device("meta")
    assert {name: tensor.dtype for name, tensor in layout.tensors().items()} == types
    assert layout.record(0, 0).alpha == 0.25


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_apart(copied) -> None:
    layout = KasminaStateLayout(1, 1)
    layout.transition(0, 0, S.GERMINATED)
    other = copied(layout)
    other.transition(0, 0, S.TRAINING)
    assert layout.record(0, 0).state is S.GERMINATED
    assert_twins_agree(layout)
    assert_twins_agree(other)
