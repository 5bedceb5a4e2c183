"""The frame of `make bench-operator`: what histograms say, and which bars hold."""

from __future__ import annotations

from typing import Any

from benchmarks.operator import bars_of, means, spread
from benchmarks.operator_creations import acknowledged, share_of

NAME = "esper_operator_reconcile_seconds"
KIND = {"kind": "TrainingSession"}


def histogram(counts: dict[str, float], seconds: float) -> list[tuple[str, dict[str, str], float]]:
    found = [(f"{NAME}_bucket", {**KIND, "le": bound}, n) for bound, n in counts.items()]
    return [
        *found,
        (f"{NAME}_count", KIND, counts["+Inf"]),
        (f"{NAME}_sum", KIND, seconds),
        (f"{NAME}_bucket", {"kind": "Blueprint", "le": "+Inf"}, 1e6),
    ]


def test_shares_are_bounded_by_the_buckets_that_they_fall_into() -> None:
    before = histogram({"0.1": 10, "1.0": 10, "+Inf": 10}, 0.5)
    after = histogram({"0.1": 70, "1.0": 109, "+Inf": 110}, 20.5)
    found = spread(before, after, NAME)
    assert found == {"count": 100, "mean": 0.2, "p50": 0.1, "p90": 1.0, "p99": 1.0}
    assert spread([], histogram({"0.1": 0, "+Inf": 10}, 50.0), NAME)["p50"] == float("inf")


def test_means_are_by_verb_and_kind() -> None:
    labels = {"verb": "apply", "kind": "Job"}
    samples = [("w_sum", labels, 3.0), ("w_count", labels, 2.0)]
    assert means(samples, "w") == {"Job apply": 1.5}


def figures(**load: Any) -> dict[str, Any]:
    return {
        "load": {
            "seconds": 50.0,
            "sessionsPerSecond": 20.0,
            "reconcileSeconds": {"p99": 1.0},
            "queueWaitSeconds": {"p99": 10.0},
            **load,
        },
        "idle": {"writesPerSecond": 0.0, "cpuShare": 0.01, "mostRssMegabytes": 120.0},
        "creations": {"firstConditionSeconds": {"p99": 2.0, "p100": 9.0}},
    }


def test_every_figure_that_is_asked_for_has_its_bar() -> None:
    bars = bars_of(figures())
    assert all(bar["holds"] for bar in bars.values())
    assert set(bars) == {
        "7.3.made-seconds",
        "7.3.sessions-per-second",
        "7.3.reconcile-p99-seconds",
        "7.3.queue-wait-p99-seconds",
        "7.3.rss-megabytes",
        "7.3.idle-writes-per-second",
        "7.3.idle-cpu-share",
        "7.2.first-condition-p99-seconds",
    }


def test_a_bar_that_is_missed_says_so() -> None:
    bars = bars_of(figures(sessionsPerSecond=16.6, seconds=60.1))
    missed = {name for name, bar in bars.items() if not bar["holds"]}
    assert missed == {"7.3.made-seconds", "7.3.sessions-per-second"}


def test_a_first_condition_that_comes_late_misses_its_bar() -> None:
    late = {**figures(), "creations": {"firstConditionSeconds": {"p99": 2.1}}}
    assert not bars_of(late)["7.2.first-condition-p99-seconds"]["holds"]


def heard(name: str, *conditions: tuple[str, str, int], generation: int = 1) -> dict[str, Any]:
    said = [{"type": t, "status": s, "observedGeneration": g} for t, s, g in conditions]
    return {
        "metadata": {"name": name, "generation": generation},
        "status": {"conditions": said} if said else {},
    }


def test_a_session_is_acknowledged_by_its_summary_of_what_it_is_now() -> None:
    told = [
        (1.0, heard("a")),
        (2.0, heard("a", ("WorkersReady", "Unknown", 1))),
        (3.0, heard("a", ("Succeeded", "Unknown", 1), generation=2)),
        (4.0, heard("a", ("Succeeded", "False", 2), generation=2)),
        (5.0, heard("a", ("Succeeded", "Unknown", 2), generation=2)),
        (6.0, heard("b", ("WorkersReady", "False", 1), ("Succeeded", "Unknown", 1))),
    ]
    assert list(acknowledged(told)) == [("a", 5.0), ("b", 6.0)]


def test_a_share_is_one_of_the_values_and_leaves_no_more_above_it() -> None:
    values = [float(n) for n in range(1, 201)]
    assert share_of(reversed(values), 0.99) == 198.0
    assert share_of(values, 1.0) == 200.0
    assert share_of([3.0], 0.5) == 3.0
