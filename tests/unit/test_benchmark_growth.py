"""The growth benchmark's own arithmetic: arms, sizes and bars."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.growth import CASES, bars, measure_pair, summary
from benchmarks.growth_arms import SHAPES, merged, read_case, seeded, static, widths_for
from esper.zoo.models import MLP


def mlp(widths: list[int]) -> MLP:
    with torch.device("meta"):
        return MLP(40, widths, 10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parameters", [500, 1098, 2132, 3150, 20_000])
def test_a_static_shape_meets_the_size_as_nearly_as_whole_widths_can(
    shape: str, parameters: int
) -> None:
    widths = widths_for(mlp, [16, 16], shape, parameters)
    counts = [
        sum(p.numel() for p in mlp(near).parameters())
        for step in (-1, 0, 1)
        for near in [[max(1, w + step * (w != 16 or shape == "both")) for w in widths]]
    ]
    assert abs(counts[1] - parameters) <= max(abs(c - parameters) for c in counts)
    if parameters >= 1098:
        assert abs(counts[1] - parameters) < 0.06 * parameters


@pytest.mark.parametrize("case", CASES)
def test_a_case_is_seeded_without_touching_the_rest(case: str) -> None:
    session, _ = read_case(CASES[case])
    other = seeded(session, 7)
    assert other["spec"]["training"]["seed"] == other["spec"]["data"]["arguments"]["seed"] == 7
    assert merged(
        other, {"spec": {"training": {"seed": 0}, "data": {"arguments": {"seed": 0}}}}
    ) == (seeded(session, 0))


def test_a_static_arm_is_repeatable_and_buys_epochs_with_flops() -> None:
    session, _ = read_case(CASES["digits-mlp"])
    short = merged(session, {"spec": {"training": {"epochs": 3}}})
    once, again = static(short), static(short)
    assert once == again
    longer = static(short, flops=2 * once.flops)
    assert longer.flops == 2 * once.flops
    assert longer.parameters == once.parameters


def test_a_pair_runs_every_arm_and_sleeping_seeds_change_nothing() -> None:
    arms = measure_pair("digits-mlp", 3, quick=True)
    assert arms["seeds-off"]["accuracy"] == arms["static-small"]["accuracy"]
    assert arms["seeds-off"]["parameters"] == arms["static-small"]["parameters"]
    assert arms["static-equal-flops"]["flops"] >= arms["static-small"]["flops"]
    for shape in SHAPES:
        sized = arms[f"static-equal-parameters-{shape}"]["parameters"]
        assert sized == pytest.approx(arms["heuristic"]["parameters"], rel=0.1)
    assert arms["heuristic"]["tried"]


def pair(seed: int, **accuracies: float) -> dict[str, Any]:
    arms = {
        "static-small": 0.5, "static-equal-flops": 0.52, "seeds-off": 0.5, "fixed-site": 0.55,
        "periodic": 0.56, "random": 0.55, "heuristic": 0.6, "static-equal-parameters-both": 0.57,
        "static-equal-parameters-first": 0.58, "static-equal-parameters-last": 0.54,
    } | accuracies  # fmt: skip
    return {"seed": seed} | {
        arm: {
            "accuracy": accuracy + 0.001 * (seed % 3),
            "parameters": 1000,
            "flops": 70 if arm == "heuristic" else 100,
            "flops_trials": 0,
            "worst_drop": 0.0,
            "tried": [],
            "fossilised": [],
        }
        for arm, accuracy in arms.items()
    }


def test_the_bars_hold_where_they_should() -> None:
    found = bars(summary([pair(seed) for seed in range(20)], 100))
    assert all(bar["holds"] for bar in found.values())
    assert found["3.5.flops-over-equal-parameters"]["figure"] == pytest.approx(0.7)
    assert found["3.5.accuracy-minus-equal-parameters"]["figure"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"heuristic": 0.52}, "3.5.accuracy-over-static-small"),
        ({"static-equal-parameters-last": 0.62}, "3.5.accuracy-minus-equal-parameters"),
        ({"random": 0.61}, "3.5.accuracy-minus-random"),
    ],
)
def test_a_bar_that_is_missed_says_so(changes: dict[str, float], missed: str) -> None:
    found = bars(summary([pair(seed, **changes) for seed in range(20)], 100))
    assert not found[missed]["holds"]


def test_fossilised_placebos_and_low_rank_parts_are_counted_by_run() -> None:
    pairs = [pair(seed) for seed in range(20)]
    for index in (0, 1):
        pairs[index]["heuristic"]["fossilised"] = [("a", "noop"), ("b", "noop"), ("a", "low-rank")]
    found = bars(summary(pairs, 100))
    assert found["3.5.placebo-fossilised"]["figure"] == 0.1
    assert not found["3.5.low-rank-fossilised"]["holds"]
