import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.cli import formats
from esper.contracts.enums import SeedState


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0 FLOP"),
        (999_999, "999,999 FLOP"),
        (1_500_000, "1.5 MFLOP"),
        (2_340_000_000, "2.34 GFLOP"),
        (8 * 10**12, "8 TFLOP"),
        (10**15, "1 PFLOP"),
        (10**22, "1.00e+22 FLOP"),
    ],
)
def test_flops_take_the_largest_unit_that_leaves_a_whole_one(value, shown):
    assert formats.flops(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1.0, "0:00"), (7.9, "0:07"), (754.0, "12:34"), (3723.0, "1:02:03"), (90_000.0, "25:00:00")],
)
def test_durations(seconds, shown):
    assert formats.duration(seconds) == shown


@pytest.mark.parametrize(
    ("share", "shown"), [(None, "–"), (0.601, "60.1 %"), (1.0, "100.0 %"), (float("nan"), "–")]
)
def test_percentages(share, shown):
    assert formats.percent(share) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0812, "+0.0812"), (-0.5, "−0.5000"), (float("inf"), "inf")],
)
def test_contributions_are_signed(value, shown):
    assert formats.nats(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), (1.0, "1.0000"), (float("nan"), "nan")])
def test_figures_say_when_they_are_not_finite(value, shown):
    assert formats.figure(value) == shown


def test_counts():
    assert formats.count(1234567) == "1,234,567"
    assert formats.count(None) == formats.ABSENT


def test_places():
    assert formats.where("net.0", 1) == "net.0[1]"
    assert formats.where("net.0", None) == "net.0"
    assert formats.where(None, 1) == ""


def test_long_layer_names_keep_their_end():
    assert formats.tail("encoder.layers.3.linear1", 11) == "….3.linear1"
    assert formats.tail("net.0", 11) == "net.0"


@given(st.text(), st.integers(2, 40))
def test_a_tail_fits(text, limit):
    assert len(formats.tail(text, limit)) <= limit


@given(st.text())
def test_printable_text_holds_nothing_that_a_terminal_obeys(text):
    shown = formats.printable(text)
    assert shown.isprintable()
    assert formats.printable(shown) == shown


def test_every_state_has_its_own_colour():
    assert set(formats.STATE_COLOURS) == set(SeedState)
    assert len(set(formats.STATE_COLOURS.values())) == len(SeedState)
