"""The frame of `make bench-distributed`: what it times, and what it makes of the times."""

import math

import pytest
import torch

from benchmarks import distributed
from benchmarks.distributed_checkpoint import Clock, example_01, stall_of, without_growth
from benchmarks.distributed_models import engine, manifest, prepared, trained
from benchmarks.distributed_steps import ALPHA, SEEDS, graft_seeds, share_of, with_questions
from benchmarks.distributed_turns import Paced, at_edge, turns
from esper.contracts.enums import SeedState
from esper.services.tolaria.distribution import CHECK_SECONDS, Alone


def test_eight_seeds_of_rank_8_are_grafted_and_learn():
    own = engine(Alone(), prepared(manifest("mlp-1024", train=64)))
    graft_seeds(own)
    assert len(own.book.records) == SEEDS == 8
    seeds = [own.model.morphology.seed_parameters(*site) for site in own.book.records]
    before = [[p.clone() for p in seed] for seed in seeds]
    assert {(1024, 8), (8, 1024)} >= {tuple(p.shape) for row in before for p in row}
    own.train_epoch(1)
    for record in own.book.records.values():
        assert (record.state, record.alpha) == (SeedState.GRAFTING, ALPHA)
    for seed, old in zip(seeds, before, strict=True):
        assert any(not torch.equal(p, q) for p, q in zip(seed, old, strict=True))


def test_tolarias_own_loop_takes_turns_with_another():
    ticks = []

    def counting(gate):
        while True:
            gate()
            ticks.append(len(ticks))

    loops = {"own": trained(Alone(), manifest("mlp", train=4096)), "counting": counting}
    found = turns(Alone(), loops, 64, seconds=1.5, process=0).processes[0]
    assert len(found["own"]) == len(found["counting"]) > 0
    assert all(seconds > 0 for row in found.values() for seconds in row)
    assert len(ticks) > len(found["counting"])


def test_an_error_in_a_loop_reaches_whoever_gives_the_turn():
    def broken(gate):
        gate()
        raise ArithmeticError

    loop = Paced(broken)
    with pytest.raises(ArithmeticError):
        loop.run(1)


def test_the_ends_of_an_epoch_are_left_out():
    # The last block of five steps, in epochs of twenty: its first three steps and its last.
    kept = [steps for steps in range(25, 45) if not at_edge(steps, 5, 20)]
    assert kept == list(range(28, 40))


def test_a_share_is_that_of_the_whole_step():
    figure = share_of([{"step": [2.0, 4.0, 8.0], "reduction": [0.1, 0.2, 0.8]}], 0.05)
    assert figure["figure"] == pytest.approx(0.05)
    assert figure["holds"]
    assert not share_of([{"step": [1.0], "reduction": [0.06]}], 0.05)["holds"]


def test_a_step_has_its_share_of_the_question():
    assert with_questions([2.0], CHECK_SECONDS / 10) == [pytest.approx(2.2)]


def test_what_a_checkpoint_holds_up_is_told_apart_from_the_epoch(monkeypatch):
    now = [1.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def take(seconds):
        now[0] += seconds

    clock = Clock()
    capture = clock.part("capture", take)
    clock.end_epoch()
    for _ in range(2):
        take(9.0)
        capture(0.5)
        capture(0.5)
        clock.end_epoch()
    assert clock.epochs == [9.0, 9.0]
    assert clock.stalls == [{"capture": 1.0}] * 2
    figure = stall_of([clock])
    assert figure["figure"] == pytest.approx(1 / 9)
    assert not figure["holds"]


def test_the_session_without_growth_writes_every_second_epoch():
    session = without_growth(example_01(4))[0]["spec"]
    assert session["growth"] == {"controller": {"policy": "none"}}
    assert session["training"]["epochs"] == 9
    assert session["training"]["checkpoint"]["everyEpochs"] == 2


def test_a_missing_pair_is_no_figure():
    from benchmarks.distributed_checkpoint import _slower

    assert math.isnan(_slower(Clock(epochs=[1.0], stalls=[{}])))


def test_every_bar_of_every_case_is_told():
    figures = {"a": {"bars": {"6.5.a": {"holds": True}}}, "b": {"bars": {"6.5.b": {}}}}
    assert set(distributed.found_bars(figures)) == {"6.5.a", "6.5.b"}
    assert set(distributed.MEASURES) == {"dormant", "grafting", "checkpoint", "shards", "counts"}
