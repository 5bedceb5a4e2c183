"""The frame of `make bench-services`, and its cases store and log in the small."""

import json

import pytest

from benchmarks import bars as results
from benchmarks import services, services_log, services_store
from benchmarks.execution_timing import Ratio, Timings
from benchmarks.services_timing import at_least, bars_of, below, rounds_of, speed


def ratio(median, spread=0.0):
    return Ratio(median=median, low=median - spread, high=median + spread)


@pytest.mark.parametrize(
    ("found", "same", "holds"),
    [
        (ratio(0.95), ratio(1.0), True),
        (ratio(0.94), ratio(1.0), False),
        (ratio(0.94, 0.02), ratio(1.0), False),
        (ratio(0.94, 0.02), ratio(0.96, 0.03), True),
        (ratio(0.80, 0.01), ratio(0.80, 0.1), False),
        (ratio(1.2), ratio(1.0, 0.2), True),
    ],
)
def test_more_is_better_is_the_rule_turned(found, same, holds):
    assert at_least(found, same, 0.95) is holds


def test_half_the_time_is_twice_the_speed():
    timings = Timings(processes=({"fast": [0.1, 0.2], "slow": [0.2, 0.4], "again": [0.2, 0.4]},))
    figure = speed(timings, "fast", "slow", "again", 0.95)
    assert figure["ratio"] == 2.0
    assert figure["baselineAgainstItself"]["ratio"] == 1.0
    assert figure["holds"]
    assert bars_of({"case": figure, "other": {"ratio": 1}}, "5.3.") == {
        "5.3.case": {"figure": 2.0, "bar": ">= 0.95", "holds": True}
    }


def test_a_figure_stays_below_its_limit():
    assert below(99.9, 100)["holds"]
    assert not below(100.0, 100)["holds"]


def test_every_arm_runs_once_a_round_and_the_first_round_is_not_kept():
    calls = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = rounds_of(arms, 5, process=0)
    assert timings.rounds == 5
    assert all(calls.count(name) == 6 for name in arms)
    assert len({tuple(calls[at : at + 3]) for at in range(0, 18, 3)}) > 1


def test_artifacts_are_compared_over_a_real_server(monkeypatch):
    monkeypatch.setattr(services_store, "WHOLE", {"1KiB": 2**10})
    monkeypatch.setattr(services_store, "AWAITED", {"1KiB": 2**10})
    monkeypatch.setattr(services_store, "STREAMED", {"64KiB": 2**16})
    monkeypatch.setattr(services_store, "QUICK_SECONDS", 0.01)
    figures, bars = services_store.measure(quick=True)
    ways = ("", "-awaited")
    names = {f"{verb}{way}-1KiB" for verb in ("put", "get") for way in ways}
    assert set(figures) == names | {"put-streamed-64KiB", "get-streamed-64KiB"}
    assert set(bars) == {f"5.3.store-{name}" for name in figures}
    assert all(figure["ratio"] > 0 and figure["rounds"] >= 5 for figure in figures.values())


def test_log_calls_are_compared_and_every_line_is_written(monkeypatch):
    monkeypatch.setattr(services_log, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(services_log, "QUICK_SINGLE_CALLS", 20)
    monkeypatch.setattr(services_log, "REPEATS", 1)
    figures, bars = services_log.measure(quick=True)
    assert set(bars) == {
        "5.3.log-cost",
        "5.3.log-p99-burst-microseconds",
        "5.3.log-p99-paced-microseconds",
    }
    assert figures["cost"]["rounds"] == 2
    arms = {"esper", "queueHandler", "queueHandlerAgain", "structlog"}
    assert set(figures["p99-paced-microseconds"]["arms"]) == arms


def test_results_keep_the_cases_that_were_not_run_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    measured = {
        case: ({"figure": 1}, {f"5.3.{case}": {"figure": 1, "bar": "< 2", "holds": True}})
        for case in services.CASES
    }
    monkeypatch.setattr(services, "measure", lambda case, quick: measured[case])
    for cases in (["store"], ["log", "bus"]):
        monkeypatch.setattr("sys.argv", ["services", "--quick", "--cases", *cases])
        assert services.main() == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["results"] == "services-quick.json"
    written = json.loads((tmp_path / "services-quick.json").read_text())
    assert set(written["bars"]) == set(told["bars"]) == {"5.3.store", "5.3.log", "5.3.bus"}
    assert set(written["figures"]) == {"store", "log", "bus"}
