"""Sessions of several ranks: what they agree on to the bit, and what faults of one do to all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from esper.errors import Unavailable
from esper.execution import kernel_cache
from esper.execution.kernel_cache import KernelCache
from esper.services.tolaria import sharing
from esper.services.tolaria.distribution import Alone, Ranks
from tests.integration.rank_sessions import (
    awkward,
    differences,
    lives,
    of_type,
    session,
    train,
)
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The session in logical shards, by one rank."""
    return train(Alone(), session(logicalShards=4))


def test_the_session_has_what_makes_ranks_disagree(alone: dict[str, Any]) -> None:
    states = {life[4] for life in lives(alone)}
    assert {"germinated", "training", "grafting", "fossilized", "culled"} <= states
    assert len({life[5] for life in lives(alone) if life[4] == "fossilized"}) >= 2


@pytest.mark.parametrize("size", [2, 4])
def test_logical_shards_give_any_number_of_ranks_the_same_bits(
    alone: dict[str, Any], size: int
) -> None:
    found = run_ranks(size, train, session(logicalShards=4))
    assert {one["digest"] for one in found} == {alone["digest"]}
    assert found[0] == alone


def test_without_logical_shards_ranks_are_equal_and_runs_repeat() -> None:
    first, again = (run_ranks(2, train, session()) for _ in range(2))
    assert len({one["digest"] for one in first + again}) == 1
    assert first[0] == again[0]
    states = {life[4] for life in lives(first[0])}
    assert {"grafting", "fossilized", "culled"} <= states


def test_whatever_a_model_keeps_and_a_dataset_draws() -> None:
    made = awkward(logicalShards=4)
    whole = train(Alone(), made)
    assert "training" in {life[4] for life in lives(whole)}
    assert run_ranks(2, train, made)[0] == whole
    replicas = run_ranks(3, train, awkward())
    assert len({one["digest"] for one in replicas}) == 1


def test_a_sharded_model_decides_as_a_whole_one_does() -> None:
    made = of_type(session(logicalShards=4), "float64", norm=False)
    whole = train(Alone(), made)
    made["spec"]["training"]["sharding"] = "full"
    made["spec"]["workers"] = {"processesPerWorker": 2}
    sharded = run_ranks(2, train, made)
    assert len({one["digest"] for one in sharded}) == 1
    assert lives(sharded[0]) == lives(whole)
    assert "fossilized" in {life[4] for life in lives(whole)}
    for one, other in zip(sharded[0]["rows"], whole["rows"], strict=True):
        assert list(differences(one, other)) == []
    assert list(differences(sharded[0]["test"], whole["test"])) == []
    assert sharded[0]["flops"] == whole["flops"]


def test_a_rank_with_one_sample_is_refused_where_a_layer_normalises() -> None:
    found = run_ranks(2, train, session(batchSize=3), failing=True)
    for one in found:
        said = str(one)
        assert "ManifestError: spec.training.batchSize: got 3, a sample a shard, and Val" in said
        assert "allowed: at least 4 with this model" in said
    made = of_type(session(batchSize=3, epochs=1), "float32", norm=False)
    assert len({one["digest"] for one in run_ranks(2, train, made)}) == 1


def compile_eagerly(ranks: Ranks) -> None:
    """Blocks are traced and guarded as for inductor, which takes too long to be asked here."""
    del ranks
    from esper.cli import preparing
    from esper.core.compilation import compile_blocks

    def eager(graph: Any, inputs: Any) -> Any:
        del inputs
        return graph.forward

    preparing.compile_blocks = lambda model: compile_blocks(model, eager)


def compiled(ranks: Ranks) -> list[dict[str, Any]]:
    """Compiled sessions, the host in DDP and in logical shards."""
    sessions = session(compile=True), session(logicalShards=4, compile=True)
    return [train(ranks, made, compile_eagerly) for made in sessions]


def test_ranks_that_compile_grow_alike(alone: dict[str, Any]) -> None:
    first, second = run_ranks(2, compiled)
    assert [one["digest"] for one in first] == [one["digest"] for one in second]
    for one in first:
        assert {"grafting", "fossilized"} <= {life[4] for life in lives(one)}
    # Its graphs have the operations of the model itself.
    assert first[1]["digest"] == alone["digest"]
    assert lives(first[1]) == lives(alone)


# -- faults of one rank ---------------------------------------------------------------------------


def slow_to_tell(ranks: Ranks) -> None:
    """The bus takes the last news later than a collective may take."""
    from esper.cli import trainers

    own = trainers.tell_success

    async def telling(*arguments: Any) -> None:
        await asyncio.sleep(4.5)
        await own(*arguments)

    trainers.tell_success = telling


def test_the_others_wait_while_rank_0_tells_how_it_ended() -> None:
    found = run_ranks(2, train, session(epochs=1), slow_to_tell, timeout_seconds=4.0)
    assert found[0]["digest"] == found[1]["digest"]


class Breaking:
    """On one rank, the first seeds break in one way each, in the order of FAULTS."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, ranks: Ranks) -> None:
        if ranks.rank != self.rank:
            return
        seeds = iter([*FAULTS, *[""] * 1000])
        now = [""]
        load, unpack = KernelCache.load, kernel_cache.unpack
        instantiated, stable_seed = kernel_cache._instantiated, sharing.stable_seed

        async def loading(cache: KernelCache, kernel: str) -> Any:
            now[0] = next(seeds)
            if now[0] == "fetch":
                raise Unavailable("the bytes did not come")
            return await load(cache, kernel)

        def unpacking(data: bytes, digest: str) -> Any:
            return unpack(bytes([data[0] ^ (now[0] == "verify")]) + data[1:], digest)

        def instantiating(*arguments: Any) -> Any:
            if now[0] == "build":
                raise MemoryError
            return instantiated(*arguments)

        def drawing(*parts: object) -> int:
            return stable_seed(*parts) + (now[0] == "draw")

        KernelCache.load = loading  # type: ignore[method-assign]
        kernel_cache.unpack = unpacking
        kernel_cache._instantiated = instantiating
        sharing.stable_seed = drawing


FAULTS = {
    "fetch": ("KernelPutOff", "rank {}: the bytes did not come"),
    "verify": ("KernelFailed", "rank {}: artifact: got SHA-256"),
    "build": ("KernelPutOff", "rank {}: kernel"),
    "draw": ("KernelFailed", "got modules of digests"),
}


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_can_not_graft_none_does(rank: int) -> None:
    only = {"matchLabels": {"esper.dev/blueprint": "bottleneck-mlp"}}
    made = session()
    made["spec"]["growth"]["blueprints"] = only
    found = run_ranks(2, train, made, Breaking(rank))
    assert found[0]["digest"] == found[1]["digest"]
    assert len(found[0]["rows"]) == made["spec"]["training"]["epochs"], "training goes on"
    broken = [(reason, told) for _, reason, told in found[0]["events"] if "Kernel" in reason]
    assert [reason for reason, _ in broken] == [reason for reason, _ in FAULTS.values()]
    for (_, told), (_, expected) in zip(broken, FAULTS.values(), strict=True):
        assert expected.format(rank) in told
    assert "grafting" in {life[4] for life in lives(found[0])}, "what comes later is grafted"


def break_grafted(ranks: Ranks) -> None:
    """On rank 1 alone, grafted branches fail in training for a while."""
    if ranks.rank != 1:
        return
    from esper.execution.branches import Branch

    own, calls = Branch.join, [0]

    def failing(branch: Any, *arguments: Any) -> Any:
        if branch.scaled and calls[0] < 3:
            calls[0] += 1
            raise RuntimeError("broken on this rank")
        return own(branch, *arguments)

    Branch.join = failing  # type: ignore[method-assign]


def test_a_seed_that_fails_on_one_rank_is_culled_on_all() -> None:
    found = run_ranks(2, train, session(), break_grafted)
    assert found[0]["digest"] == found[1]["digest"]
    opened = [message for _, reason, message in found[0]["events"] if reason == "CircuitOpened"]
    assert len(opened) == 1
    assert "broken on this rank" in opened[0]


def unlike(ranks: Ranks) -> None:
    """Rank 1's optimiser steps a little further, as one on another kind of machine might."""
    from esper.services.tolaria import optimization

    if ranks.rank == 1:
        own = optimization.step

        def further(optimizer: Any, *arguments: Any) -> None:
            own(optimizer, *arguments)
            optimizer.param_groups[0]["params"][0].data.mul_(1.0001)

        optimization.step = further


def test_ranks_that_drift_apart_are_found_out() -> None:
    found = run_ranks(2, train, session(), unlike, failing=True)
    for one in found:
        assert "the ranks' models: got digests" in str(one), one
