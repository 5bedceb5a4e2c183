"""`validate_seed_id`: what passes, what doesn't, and what the message says."""

from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, ValidationError

from esper.contracts.validators import SeedIdError, validate_seed_id
from esper.errors import BadInput


@given(st.data(), st.integers(1, 1000), st.integers(1, 16))
def test_every_id_within_the_bounds_comes_back(data, num_layers, num_slots):
    seed_id = (
        data.draw(st.integers(0, num_layers - 1)),
        data.draw(st.integers(0, num_slots - 1)),
    )

    assert validate_seed_id(seed_id, num_layers, num_slots) == seed_id


@given(st.integers(1, 100), st.integers(1, 16), st.integers(), st.integers())
def test_an_id_passes_exactly_when_both_parts_are_within(num_layers, num_slots, layer, slot):
    within = 0 <= layer < num_layers and 0 <= slot < num_slots

    try:
        validate_seed_id((layer, slot), num_layers, num_slots)
    except SeedIdError:
        assert not within
    else:
        assert within


@pytest.mark.parametrize(
    ("seed_id", "message"),
    [
        ((3, 0), "seedId.layer: got 3; allowed: an integer from 0 to 2"),
        ((-1, 0), "seedId.layer: got -1; allowed: an integer from 0 to 2"),
        ((0, 2), "seedId.slot: got 2; allowed: an integer from 0 to 1"),
        ((0, -1), "seedId.slot: got -1; allowed: an integer from 0 to 1"),
        ((True, 0), "seedId.layer: got True; allowed: an integer from 0 to 2"),
        ((0, False), "seedId.slot: got False; allowed: an integer from 0 to 1"),
        ((1.0, 0), "seedId.layer: got 1.0; allowed: an integer from 0 to 2"),
        (("1", 0), "seedId.layer: got 1; allowed: an integer from 0 to 2"),
        ((0, None), "seedId.slot: got None; allowed: an integer from 0 to 1"),
        ((0,), "seedId: got (0,); allowed: a pair (layer, slot)"),
        ((0, 0, 0), "seedId: got (0, 0, 0); allowed: a pair (layer, slot)"),
        ([0, 0], "seedId: got [0, 0]; allowed: a pair (layer, slot)"),
        (None, "seedId: got None; allowed: a pair (layer, slot)"),
        ("01", "seedId: got 01; allowed: a pair (layer, slot)"),
    ],
)
def test_the_message_names_what_came_and_what_is_allowed(seed_id, message):
    with pytest.raises(SeedIdError) as caught:
        validate_seed_id(seed_id, num_layers=3, num_slots=2)

    assert str(caught.value) == message


def test_the_first_fault_is_the_one_reported():
    with pytest.raises(SeedIdError, match=r"^seedId\.layer"):
        validate_seed_id((9, 9), num_layers=3, num_slots=2)


@pytest.mark.parametrize(("bounds", "field"), [((0, 1), "layer"), ((1, 0), "slot")])
def test_a_model_without_hosts_allows_nothing(bounds, field):
    with pytest.raises(SeedIdError, match=rf"^seedId\.{field}: got 0; allowed: nothing"):
        validate_seed_id((0, 0), *bounds)


def test_the_error_is_bad_input_and_a_value_error():
    assert issubclass(SeedIdError, BadInput)
    assert issubclass(SeedIdError, ValueError)
    assert SeedIdError.exit_code == 2


def test_pydantic_reports_it_on_the_field_it_guards():
    class Request(BaseModel):
        seed: Annotated[tuple[int, int], AfterValidator(lambda seed: validate_seed_id(seed, 3, 1))]

    assert Request(seed=(2, 0)).seed == (2, 0)
    with pytest.raises(ValidationError, match="an integer from 0 to 2") as caught:
        Request(seed=(3, 0))
    assert caught.value.errors()[0]["loc"] == ("seed",)
