from __future__ import annotations

from typing import Any

import pytest

from benchmarks.births import ARMS, CASE, UNITS, shadow_gains, summary
from benchmarks.growth import CASES
from benchmarks.growth_arms import read_case, seeded


def test_both_arms_learn_beside_one_host_at_every_place() -> None:
    document, _ = read_case(CASES[CASE])
    document = seeded(document, 3)
    document["spec"]["data"]["arguments"] = {"train": 256, "validation": 100, "test": 50, "seed": 3}
    gains = shadow_gains(document, 1, (1, 2))
    # Nothing feeds the first layer, so that there is nothing to widen in front of it.
    assert set(gains) == {
        f"{blueprint} at {layer} after 1"
        for blueprint in UNITS
        for layer in ("hidden.0", "hidden.1", "head")
    } - {"widen at hidden.0 after 1"}
    for arms in gains.values():
        assert tuple(arms) == ARMS
        assert len(arms["default"]) == len(arms["gradient"]) == 2
        assert arms["default"] != arms["gradient"]


def test_the_summary_pairs_the_arms() -> None:
    def pair(default: float, gradient: float) -> dict[str, Any]:
        figures = {
            arm: {"accuracy": value, "parameters": 10, "flops": 100, "flops_trials": 1}
            for arm, value in (("default", default), ("gradient", gradient))
        }
        gains = {"default": [default, 2 * default], "gradient": [gradient, 2 * gradient]}
        return {"trials": {"place": gains}, "sessions": dict.fromkeys(UNITS, figures)}

    found = summary([pair(0.1, 0.3), pair(0.5, 0.6), pair(0.2, 0.4)])
    first, second = found["shadowGainNats"]["place"]
    assert (first["age"], second["age"]) == (1, 2)
    assert first["default"] == pytest.approx(0.8 / 3)
    assert first["difference"] == pytest.approx(0.5 / 3)
    assert first["interval"][0] == pytest.approx(0.1)
    assert first["interval"][1] == pytest.approx(0.2)
    assert second["difference"] == pytest.approx(1 / 3)
    accuracy = found["sessions"]["widen"]["accuracy"]
    assert accuracy["difference"] == pytest.approx(0.5 / 3)
    assert found["sessions"]["widen"]["flops"]["difference"] == 0
