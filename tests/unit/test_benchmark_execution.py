"""The execution benchmark's own arithmetic, its arms, and a very quick run of it."""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks import bars as results
from benchmarks import gpu
from benchmarks.execution import FLAGGED, MEASURES, PREFIXES, Comparing, bars, options, report
from benchmarks.execution_dormant import (
    LIMIT,
    PROBE_INTERVAL,
    SEEDS,
    dormant,
    dormant_figures,
    many_seeds,
    many_seeds_figures,
    monitored,
    monitored_figures,
)
from benchmarks.execution_grafting import (
    COMPARED,
    grafting,
    grafting_figures,
    grafting_makers,
    host_of,
    refuse_different,
    shadow,
    shadow_figures,
    shadow_step,
    share,
)
from benchmarks.execution_handwritten import SEEDS as WRITTEN
from benchmarks.execution_models import CASES, FlagWrapper, flag_wrapped, twin
from benchmarks.execution_running import built, running
from benchmarks.execution_timing import (
    Bench,
    Ratio,
    Timings,
    at_most,
    collecting_no_garbage,
    comparison,
    joined,
    pooled_median,
    processor_seconds,
    timed,
    timer_for,
    wall_seconds,
)
from benchmarks.execution_wrapping import wrapping
from esper.contracts.blueprints import CATALOGUE
from esper.core import wrap
from esper.execution.state_layout import SeedLifecycleState as S

# One worker measures, once for all tests that look at the figures.
pytestmark = pytest.mark.xdist_group("benchmark")

BRIEF = Bench(device="cpu", timer=processor_seconds, seconds=0, rounds=1)


def ratio(low: float, median: float, high: float) -> Ratio:
    return Ratio(median=median, low=low, high=high)


SAME = ratio(0.99, 1.0, 1.02)


@pytest.mark.parametrize(
    ("measured", "same", "holds"),
    [
        (ratio(0.99, 1.00, 1.01), SAME, True),
        (ratio(1.01, 1.01, 1.01), SAME, True),
        (ratio(1.005, 1.02, 1.03), SAME, True),  # the baseline scatters as far as that
        (ratio(1.005, 1.021, 1.03), SAME, False),  # the median is beyond bar and scatter
        (ratio(1.011, 1.015, 1.02), SAME, False),  # the whole interval is above the bar
        (ratio(1.005, 1.02, 1.03), ratio(1, 1, 1), False),
    ],
)
def test_the_rule_for_ratios_is_the_designs(measured: Ratio, same: Ratio, holds: bool) -> None:
    assert at_most(measured, same, 1.01) is holds


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), min_size=1, max_size=6),
    factor=st.sampled_from([0.5, 2.0, 4.0]),
)
def test_an_interval_holds_its_median_and_scales(groups: list[list[float]], factor: float) -> None:
    found = pooled_median([np.array(group) for group in groups])
    values = np.concatenate(groups)
    assert found.median == np.median(values)
    assert values.min() <= found.low <= found.high <= values.max()
    scaled = pooled_median([factor * np.array(group) for group in groups])
    assert (scaled.low, scaled.median, scaled.high) == pytest.approx(
        (factor * found.low, factor * found.median, factor * found.high)
    )


def test_what_a_process_adds_widens_the_interval_and_rounds_do_not_narrow_it() -> None:
    generator = np.random.default_rng(1)
    shifts = generator.normal(0, 0.01, size=8)
    widths = []
    for rounds in (50, 5000):
        noise = [1 + shift + generator.normal(0, 0.01, size=rounds) for shift in shifts]
        found = pooled_median(noise)
        assert found.low < 1.0 + shifts.mean() + 0.005
        assert found.high > 1.0 + shifts.mean() - 0.005
        widths.append(found.high - found.low)
    assert min(widths) > 0.003
    still = pooled_median([1 + generator.normal(0, 0.01, size=5000) for _ in shifts])
    assert still.high - still.low < 0.001


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is ten times slower in some rounds; the arm is always a fifth slower.
    weathers = ((1.0, 10.0, 1.0, 10.0, 10.0), (3.0, 1.0))
    timings = Timings(
        processes=tuple(
            {"base": one, "again": one, "arm": [1.2 * seconds for seconds in one]}
            for one in weathers
        )
    )
    found = comparison(timings, "arm", "base", "again", 1.05)
    assert found["ratio"] == pytest.approx(1.2)
    assert found["interval"] == pytest.approx([1.2, 1.2])
    assert found["baselineAgainstItself"]["ratio"] == 1
    assert found["rounds"] == 7
    assert found["baselineMicroseconds"] == 3e6
    assert not found["holds"]
    assert comparison(timings, "again", "base", "again", 1.0)["holds"]
    assert "bar" not in comparison(timings, "arm", "base", "again")


def test_the_processes_of_a_comparison_are_put_together() -> None:
    one, two = ({"a": [1.0]}, {"a": [2.0, 3.0]})
    parts = [{"x": Timings(processes=(p,)), "y": Timings(processes=(p,))} for p in (one, two)]
    assert joined(parts) == {name: Timings(processes=(one, two)) for name in "xy"}


def test_each_process_makes_the_arms_in_an_order_of_its_own() -> None:
    made: list[str] = []
    makers = {name: lambda name=name: made.append(name) or nn.Identity() for name in "abcd"}
    for number in range(10):
        assert list(built(makers, replace(BRIEF, process=number))) == list("abcd")
    orders = {tuple(made[start : start + 4]) for start in range(0, 40, 4)}
    assert len(orders) > 5
    assert len({order[0] for order in orders}) > 2


def test_every_round_runs_every_arm_in_an_order_of_its_own() -> None:
    ran: list[str] = []
    clock = Counter()

    def counting(call, count: int) -> float:
        for _ in range(count):
            call()
        clock["blocks"] += 1
        return count * 1.0  # a second a call: blocks of one

    arms = {name: lambda name=name: ran.append(name) for name in "abcd"}
    timings = timed(arms, replace(BRIEF, timer=counting, rounds=12))
    assert timings.rounds == 12
    assert set(timings.processes[0]) == set("abcd")
    rounds = [tuple(ran[start : start + 4]) for start in range(len(ran) - 48, len(ran), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 6
    assert len({order[0] for order in rounds}) == 4


def test_short_calls_are_timed_in_blocks_after_one_that_is_not() -> None:
    calls: list[int] = []
    counts: list[int] = []

    def pretending(call, count: int) -> float:
        counts.append(count)
        for _ in range(count):
            call()
        return count * 1e-5

    timings = timed({"a": lambda: calls.append(1)}, replace(BRIEF, timer=pretending, rounds=3))
    assert counts[2:] == [50, 50, 50]
    assert len(calls) == sum(counts) + 3
    assert timings.processes[0]["a"] == pytest.approx([1e-5] * 3)


def test_garbage_waits_while_arms_are_timed() -> None:
    seen: list[bool] = []
    timed({"a": lambda: seen.append(gc.isenabled())}, BRIEF)
    assert seen[-1] is False
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collecting_no_garbage():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_timers_count_what_they_should() -> None:
    assert wall_seconds(lambda: time.sleep(0.02), 2) >= 0.04
    assert processor_seconds(lambda: time.sleep(0.02), 2) < 0.04
    assert timer_for("cpu", 1) is processor_seconds
    assert timer_for("cpu", 2) is wall_seconds
    assert timer_for("cuda:0", 1) not in {processor_seconds, wall_seconds}


def test_the_wrapper_arm_wraps_what_could_host_and_computes_the_same() -> None:
    for case in CASES:
        bare, x = case.seeded(), case.inputs(2)
        names = wrap(bare, x, copy=True).morphology.layers
        boxed = flag_wrapped(twin(bare), names)
        count = sum(isinstance(module, FlagWrapper) for module in boxed.modules())
        fused = sum("linear1" in name or "linear2" in name for name in names)
        assert count == len(names) - fused > 0
        with running("forward", {"bare": bare, "boxed": boxed}):
            assert torch.equal(bare(x), boxed(x))


def test_a_flag_wrapper_with_a_seed_adds_it() -> None:
    layer, seed, x = nn.Linear(3, 3), nn.Linear(3, 3), torch.randn(2, 3)
    assert torch.equal(FlagWrapper(layer, seed)(x), layer(x) + seed(x))


def test_every_blueprint_has_a_form_written_by_hand() -> None:
    wanted = {(name, kind) for name, kind in COMPARED if name != "low-rank"}
    assert set(WRITTEN) == wanted
    assert {name for name, _ in COMPARED} == {entry.name for entry in CATALOGUE}


@pytest.mark.parametrize(("blueprint", "kind"), COMPARED, ids="-".join)
def test_grafting_arms_share_their_weights_and_compute_the_same(blueprint: str, kind: str) -> None:
    bare, x = host_of(blueprint, kind, 2, "cpu")
    arms = built(grafting_makers(bare, x, blueprint, kind), BRIEF)
    refuse_different(arms, x)
    owned = [[id(p) for p in model.parameters()] for model in arms.values()]
    assert owned[0] == owned[1] == owned[2]
    with running("forward", arms):
        written, again, grafted = (model(x) for model in arms.values())
    torch.testing.assert_close(grafted, written, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, written)
    model = arms["grafted"]
    assert model.morphology.layout.counts()["grafting"] == 1
    layer = list(model.morphology.layers)[-1]
    with running("forward", arms), model.morphology.without(layer, 0):
        same = torch.equal(model(x), written)
    assert same == (blueprint == "noop")
    for arm in arms.values():
        arm.zero_grad()
        arm.train()
        arm(x).square().sum().backward()
        assert all(p.grad is not None for p in arm.parameters())


def test_arms_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        share(nn.Linear(2, 3), nn.Linear(3, 2))


def test_a_shadow_step_moves_the_seed_alone() -> None:
    model, x = wrap(CASES[0].seeded()), CASES[0].inputs(4)
    model.morphology.probe(x)
    layer = next(iter(model.morphology.layers))
    seed = nn.Linear(256, 256)
    model.morphology.germinate(layer, 0, seed, kernel="k")
    model.morphology.transition(layer, 0, S.TRAINING)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    shadow_step(model, layer, x)()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"{layer}.grown.0.weight", f"{layer}.grown.0.bias"}


def test_wrapping_is_measured_and_its_state_counted() -> None:
    found = wrapping("cpu")
    assert found["layout-bytes-a-seed"] == {
        "figure": 33, "tensors": 8, "bar": "<= 64", "holds": True,
    }  # fmt: skip
    for name in ("wrap-resnet18-milliseconds", "probes-resnet18-milliseconds"):
        assert found[name]["figure"] == min(found[name]["repeats"]) > 0
    assert "bar" not in found["probes-resnet18-milliseconds"]


@pytest.fixture(scope="module")
def figures() -> dict[str, dict]:
    """One round of the smallest of every case."""
    case = CASES[:1]
    cases = {
        "dormant": (dormant_figures, dormant(BRIEF, case)),
        "seeds": (many_seeds_figures, many_seeds(BRIEF, case)),
        "telemetry": (monitored_figures, monitored(BRIEF, case)),
        "grafting": (grafting_figures, grafting(BRIEF, COMPARED[:1])),
        "shadow": (shadow_figures, shadow(BRIEF, case)),
    }
    return {
        case: {name: figure(name, timings) for name, timings in found.items()}
        for case, (figure, found) in cases.items()
    }


def test_one_round_of_every_case_gives_its_figures(figures) -> None:
    names = {f"mlp-{way}-{batch}" for way in ("forward", "step") for batch in (1, 64)}
    assert set(figures["dormant"]) == set(figures["seeds"]) == names
    assert set(figures["telemetry"]) == set(figures["shadow"]) == {"mlp-1", "mlp-64"}
    assert len(figures["grafting"]) == 4
    assert figures["telemetry"]["mlp-1"]["probeMicroseconds"] > 0
    for case in figures.values():
        for figure in case.values():
            assert figure["rounds"] == 1
            assert figure["interval"] == [figure["ratio"]] * 2
            assert figure["microseconds"] > 0


def test_an_epoch_is_fifty_steps_and_its_share_of_a_probe() -> None:
    process = {arm: [1.0, 2.0] for arm in ("bare", "again", "dormant", "validation")}
    process["watched"] = [9.0, 18.0]
    found = monitored_figures("mlp-1", Timings(processes=(process,)))
    assert found["ratio"] == pytest.approx((50 + 8 * 50 / PROBE_INTERVAL) / 50)
    assert found["everyBoundary"]["ratio"] == pytest.approx(58 / 50)
    assert found["probeMicroseconds"] == 12e6
    assert not found["holds"]


def test_the_crowded_model_has_ten_thousand_seeds(monkeypatch) -> None:
    counts = []

    def counting(makers, x, bench):
        model = makers["crowded"]()
        counts.append(model.morphology.layout.alpha.numel())
        return {}

    monkeypatch.setattr("benchmarks.execution_dormant.timed_ways", counting)
    many_seeds(BRIEF)
    assert min(counts) >= SEEDS


def test_low_rank_has_the_strict_bar() -> None:
    process = {"written": [1.0], "again": [1.0], "grafted": [1.02]}
    bars_of = {
        name: grafting_figures(name, Timings(processes=(process,)))
        for name in ("low-rank-linear-step-1", "attention-linear-step-1")
    }
    assert [figure["bar"] for figure in bars_of.values()] == ["<= 1.0", "<= 1.05"]
    assert [figure["holds"] for figure in bars_of.values()] == [False, True]


def test_a_full_measurement_joins_processes_of_their_own(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.execution.PROCESSES", 2)
    found = Comparing(_process_ids, _number_of_processes, 0.0)("cpu", quick=False)
    assert found == {"x": {"processes": 2, "distinct": 2, "here": 0}}
    found = Comparing(_process_ids, _number_of_processes, 0.0)("cpu", quick=True)
    assert found == {"x": {"processes": 1, "distinct": 1, "here": 1}}


def _process_ids(bench: Bench) -> dict[str, Timings]:
    return {"x": Timings(processes=({"pid": [os.getpid()]},))}


def _number_of_processes(name: str, timings: Timings) -> dict:
    ids = [process["pid"][0] for process in timings.processes]
    return {"processes": len(ids), "distinct": len({*ids}), "here": ids.count(os.getpid())}


def test_every_figure_with_a_bar_is_a_key_of_its_line(figures) -> None:
    found = bars(figures, PREFIXES)
    assert {key.rsplit("-", 1)[0] for key in found} == {
        "4.1.mlp-forward", "4.1.mlp-step", "4.1.seeds-mlp-forward", "4.1.seeds-mlp-step",
        "4.1.telemetry-mlp", "4.1.wrapper-flagged-mlp-forward", "4.1.wrapper-flagged-mlp-step",
        "4.2.noop-linear-forward", "4.2.noop-linear-step",
    }  # fmt: skip
    assert found["4.1.mlp-step-64"] == {
        "figure": figures["dormant"]["mlp-step-64"]["ratio"],
        "bar": "<= 1.01",
        "holds": figures["dormant"]["mlp-step-64"]["holds"],
    }


@pytest.mark.parametrize("low", [LIMIT - 0.001, LIMIT + 0.001])
def test_a_bench_that_does_not_flag_wrappers_misses_a_bar(low: float) -> None:
    wrapper = {"ratio": 1.1, "interval": [low, 1.2], "flagged": low > LIMIT}
    found = bars({"dormant": {name: {"wrapper": wrapper} for name in FLAGGED}}, PREFIXES)
    assert len(found) == len(FLAGGED)
    assert {bar["holds"] for bar in found.values()} == {low > LIMIT}


def test_a_run_of_one_case_keeps_the_others_and_exits_0(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    missed = {"figure": 2.0, "bar": "<= 1.01", "holds": False}

    def measure(device: str, quick: bool) -> dict:
        assert (device, quick) == ("cpu", True)
        return {"x": missed}

    measures = {"wrapping": measure, "seeds": measure}
    for case in measures:
        arguments = argparse.Namespace(quick=True, cases=[case], threads=1)
        assert report("execution", "cpu", arguments, measures, PREFIXES) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads((tmp_path / "execution-quick.json").read_text())
    assert written["bars"] == told["bars"] == {"4.4.x": missed, "4.1.seeds-x": missed}
    assert written["figures"]["seeds"]["measured"] == {"x": missed}
    assert written["name"] == "execution-quick"


def test_all_cases_are_measured_unless_some_are_named() -> None:
    parser = options(None, MEASURES)
    assert parser.parse_args([]).cases == list(MEASURES)
    assert parser.parse_args(["--cases", "seeds", "cache"]).cases == ["seeds", "cache"]
    assert parser.parse_args([]).threads == 1


def test_without_a_gpu_the_gpu_benchmark_says_so_and_keeps_what_is_there(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {"results": None, "notRun": "no CUDA device"}
    assert told.err == "gpu: not run: no CUDA device\n"
    assert not list(tmp_path.iterdir())


def test_the_gpu_benchmark_has_the_same_comparisons_and_counts_waits() -> None:
    assert set(MEASURES) - set(gpu.MEASURES) == {"cache"}
    assert set(gpu.MEASURES) - set(MEASURES) == {"synchronising"}
    x = torch.randn(3, 6)
    model = wrap(nn.Sequential(nn.Linear(6, 6)), x)
    assert gpu.waits_in(lambda: model(x)) == []
    assert gpu.waits_in(lambda: model(x).sum().item()) == ["aten::_local_scalar_dense"]
