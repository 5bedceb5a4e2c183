import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from esper.cli.live import (
    PLAIN_EPOCH_LINES,
    PlainView,
    SessionFacts,
    decision_line,
    make_view,
    number,
    transition_line,
    whole,
)
from esper.cli.terminal import RECENT_LINES, TerminalView
from esper.contracts.enums import SeedState
from tests.unit.esper.cli.run_directories import write_run


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    directory = write_run(tmp_path_factory.mktemp("runs") / "run")
    names = ("metrics", "events", "decisions")
    return {
        name: [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]
        for name in names
    }


def replay(view, records, until=100):
    for row in records["metrics"][:until]:
        view.epoch(row)
        for decision in records["decisions"]:
            if decision["epoch"] == row["epoch"]:
                view.decision(decision)
        for event in records["events"]:
            if event["epoch"] == row["epoch"]:
                view.transition(event)


def frame(records, width, height=40, until=44):
    """The text of the terminal view's frame after some epochs."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, height=height)
    facts = SessionFacts("mnist1d-mlp", "heuristic", 100)
    view = TerminalView(console, facts)
    replay(view, records, until)
    plain = Console(file=io.StringIO(), width=width, height=height)
    with plain.capture() as capture:
        plain.print(view)
    return capture.get()


def test_a_stream_that_is_no_terminal_gets_plain_lines():
    assert isinstance(make_view(io.StringIO(), 3, "s"), PlainView)


def test_a_terminal_gets_the_live_view_unless_plain_is_forced(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    leader, follower = os.openpty()
    with os.fdopen(leader, "rb"), os.fdopen(follower, "w") as stream:
        assert isinstance(make_view(stream, 3, "s"), TerminalView)
        assert isinstance(make_view(stream, 3, "s", force_plain=True), PlainView)
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(make_view(stream, 3, "s"), PlainView)


def told(message):
    return {"type": "event", "epoch": 1, "reason": "Told", "message": message}


def test_plain_lines_tell_epochs_transitions_and_decisions(records):
    stream = io.StringIO()
    with make_view(stream, 100, "mnist1d-mlp", policy="heuristic", parameters_base=1098) as view:
        view.transition(told("resumed"))
        replay(view, records)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == [
        "session mnist1d-mlp: 100 epochs, policy heuristic",
        "epoch 1: Told resumed",
    ]
    assert sum(line.startswith("epoch ") and "  train " in line for line in lines) == 100
    assert "parameters 1,098 -> 5,202 (+374 %)" in stream.getvalue()
    assert any("layers.0[0] bottleneck-mlp grafting -> fossilized: recovery" in x for x in lines)
    assert any("decision germinate layers.0[0] noop" in line for line in lines)
    assert not any("decision wait" in line for line in lines)
    assert "epoch 1: HealthChanged degraded, after healthy" in lines


@pytest.mark.parametrize("epochs", [1, 99, 100, 101, 1000, 12345])
def test_long_sessions_keep_to_few_lines_and_show_the_last_epoch(epochs):
    stream = io.StringIO()
    view = make_view(stream, epochs, "s")
    for epoch in range(1, epochs + 1):
        view.epoch({"epoch": epoch})
    lines = stream.getvalue().splitlines()
    assert len(lines) <= PLAIN_EPOCH_LINES + 1
    assert lines[-1].startswith(f"epoch {epochs}/{epochs}")


def test_a_reader_that_went_away_does_not_end_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    view = make_view(stream, 3, "s")
    view.epoch({"epoch": 1})
    view.transition(told("still here"))
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_closed_stream_does_not_end_the_run():
    stream = io.StringIO()
    view = make_view(stream, 3, "s")
    stream.close()
    view.transition(told("still here"))


def test_text_that_the_stream_cannot_encode_is_replaced():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    make_view(stream, 3, "s").transition(told("α → 1"))
    assert raw.getvalue() == b"epoch 1: Told ? ? 1\n"


def test_plain_lines_obey_no_control_characters():
    stream = io.StringIO()
    make_view(stream, 3, "s").transition(told("red \x1b[31m\nnext"))
    assert stream.getvalue() == "epoch 1: Told red ?[31m next\n"


def test_a_metric_that_is_no_accuracy_is_a_plain_figure():
    stream = io.StringIO()
    make_view(stream, 3, "s", metric="rmse").epoch({"epoch": 1, "validationMetric": 0.25})
    assert "rmse 0.2500" in stream.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_frame_fits_and_shows_what_matters(records, width):
    shown = frame(records, width)
    assert max(map(len, shown.splitlines())) <= width
    for text in ("mnist1d-mlp", "policy heuristic", "epoch 44/100", "1,098 → 3,150 (+187 %)",
                 "48.7 %", "44 % trials", "● grafting", "bottleneck-mlp", "+0.0722", "0.0040",
                 "healthy", "Last events", "epoch 41"):  # fmt: skip
        assert text in shown


def test_a_narrow_frame_still_draws(records):
    assert max(map(len, frame(records, 40).splitlines())) <= 40


def test_a_low_terminal_shows_the_seeds_that_fit(records):
    facts = SessionFacts("s", "", 100)
    seeds = [
        {"layer": f"net.{index}", "slot": 0, "state": "training", "blueprint": "b"}
        for index in range(12)
    ]
    view = TerminalView(Console(file=io.StringIO(), width=80, height=24), facts)
    view.epoch({**records["metrics"][0], "active": seeds})
    console = Console(file=io.StringIO(), width=80, height=24)
    with console.capture() as capture:
        console.print(view)
    assert "and 7 more" in capture.get()


def test_the_frame_before_the_first_epoch():
    view = TerminalView(Console(file=io.StringIO(), width=80), SessionFacts("s", "", 5, 10))
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(view)
    assert "epoch 0/5" in capture.get()
    assert "Seeds" not in capture.get()


def test_the_frame_keeps_the_last_events_only(records):
    lines = frame(records, 120, until=100).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("Last events"))
    assert len([line for line in lines[start + 1 :] if line.strip()]) == RECENT_LINES


def test_the_live_view_on_a_terminal_leaves_its_last_frame(records):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=40, color_system=None)
    with TerminalView(console, SessionFacts("mnist1d-mlp", "heuristic", 100)) as view:
        replay(view, records)
        view.transition(told("[not markup]"))
    shown = stream.getvalue()
    assert "Told [not markup]" in shown
    assert "epoch 100/100" in shown
    assert "\x1b[?25h" in shown  # the cursor is back
    assert "left" not in shown.rsplit("epoch 100/100", 1)[1]


def transition(current, **fields):
    return {"layer": "a", "slot": 0, "current": current, "cycle": 0, **fields}


def test_transitions_move_seeds_between_epochs():
    facts = SessionFacts("s", "", 10)
    measurement = {"mean": 0.2, "lower": 0.1, "upper": 0.3, "rent": 0.0, "samples": 5}
    facts.take_transition(transition("germinated", blueprint="b"))
    facts.take_transition(transition("training", measurement=measurement))
    seed = facts.seeds["a", 0]
    assert (seed.state, seed.blueprint) == (SeedState.TRAINING, "b")
    facts.take_transition(transition("fossilized"))
    seed = facts.seeds["a", 0]
    assert (seed.alpha, seed.measurement.mean) == (1.0, 0.2)
    facts.take_transition(transition("germinated", cycle=1))
    assert facts.seeds["a", 0].blueprint is None
    facts.take_transition(transition("dormant", cycle=1))
    assert facts.seeds == {}


def test_records_that_are_no_seeds_are_left_out():
    facts = SessionFacts("s", "", 10)
    facts.take_transition({"reason": "HealthChanged"})
    facts.take_epoch({"epoch": 1, "active": [{"layer": "a"}, 7]})
    assert facts.seeds == {}


def test_lines():
    event = {"epoch": 3, "layer": "a", "slot": 0, "previous": "training", "current": "culled"}
    assert transition_line(event, "→") == "epoch 3: a[0] training → culled"
    decision = {"epoch": 3, "action": "germinate", "layer": "a", "blueprint": "b", "reason": "r"}
    assert decision_line(decision) == "epoch 3: decision germinate a b: r"
    refused = decision | {"applied": False, "outcome": "no room"}
    assert "(not applied: no room)" in decision_line(refused)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
def test_figures_of_any_record_are_numbers_or_absent(value):
    assert number(value) is None or isinstance(number(value), float)
    assert whole(value) is None or whole(value) == value


def test_non_finite_figures_arrive_as_strings():
    assert number("NaN") != number("NaN")
    assert number("Infinity") == float("inf")
