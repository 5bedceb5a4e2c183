"""The frame of `make bench-operator`: what histograms say, and which bars hold."""

from __future__ import annotations

from typing import Any

from benchmarks.operator import bars_of, means, spread

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
    }


def test_a_bar_that_is_missed_says_so() -> None:
    bars = bars_of(figures(sessionsPerSecond=16.6, seconds=60.1))
    missed = {name for name, bar in bars.items() if not bar["holds"]}
    assert missed == {"7.3.made-seconds", "7.3.sessions-per-second"}
