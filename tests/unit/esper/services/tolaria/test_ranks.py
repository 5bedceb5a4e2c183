"""One contract for a session's ranks: alone in a process, and as several over gloo."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from esper.errors import (
    BadInput,
    Interrupted,
    KernelError,
    StorageFull,
    Unavailable,
    WorkFailed,
)
from esper.services.tolaria.distribution import (
    CHECK_SECONDS,
    MOST_BATCHES,
    Alone,
    Ranks,
    Rhythm,
    as_wire,
    first_failure,
    raised_elsewhere,
)
from esper.services.tolaria.process_group import BEAT_SECONDS, ProcessGroup, process_group
from tests.ranks import RankFailure, run_ranks


def what_ranks_tell(ranks: Ranks) -> dict[str, Any]:
    """Every way of telling once; what this rank heard."""
    rank, found = ranks.rank, {}
    found["told"] = ranks.told({"from": 0, "text": "α"} if rank == 0 else None)
    found["bytes"] = ranks.told_bytes(bytes(range(256)) * 3 if rank == 0 else None)
    found["nothing"] = ranks.told_bytes(b"" if rank == 0 else None)
    found["exchanged"] = ranks.exchanged({"rank": rank, "text": "x" * (10 * rank)})
    found["gathered"] = ranks.gathered(torch.tensor([rank, rank + 1])).tolist()
    found["scalar"] = ranks.gathered(torch.tensor(float(rank))).tolist()
    found["summed"] = ranks.summed(torch.tensor([1.0 + rank, 2.0])).tolist()
    spread = torch.full((2, 2), rank + 5)
    ranks.spread(spread)
    found["spread"] = spread.tolist()
    owner = ranks.size - 1
    relayed = ranks.relayed(torch.tensor([[1.5, rank]]) if rank == owner else None, owner)
    found["relayed"] = relayed.tolist()
    for name, dtype in (("short", torch.int16), ("flag", torch.bool), ("pair", torch.complex64)):
        value = torch.ones((), dtype=dtype) if rank == owner else None
        found[name] = ranks.relayed(value, owner).item()
    return found


def heard(size: int) -> list[dict[str, Any]]:
    return [what_ranks_tell(Alone())] if size == 1 else run_ranks(size, what_ranks_tell)


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_hears_the_same(size: int) -> None:
    expected = {
        "told": {"from": 0, "text": "α"},
        "bytes": bytes(range(256)) * 3,
        "nothing": b"",
        "exchanged": [{"rank": rank, "text": "x" * (10 * rank)} for rank in range(size)],
        "gathered": [[rank, rank + 1] for rank in range(size)],
        "scalar": [float(rank) for rank in range(size)],
        "summed": [sum(1.0 + rank for rank in range(size)), 2.0 * size],
        "spread": [[5, 5], [5, 5]],
        "relayed": [[1.5, size - 1.0]],
        "short": 1,
        "flag": True,
        "pair": 1 + 0j,
    }
    assert heard(size) == [expected] * size


def awaiting(ranks: Ranks, seconds: float) -> Any:
    """What rank 0 waits for, longer than the group's time limit."""

    async def work() -> str:
        assert ranks.rank == 0
        await asyncio.sleep(seconds)
        return "at last"

    return asyncio.run(ranks.awaited(work)), ranks.led(lambda: ranks.rank)


def test_rank_0_may_wait_longer_than_a_collective_may_take() -> None:
    found = run_ranks(2, awaiting, 4 * BEAT_SECONDS + 1, timeout_seconds=1.5)
    assert found == [("at last", 0), ("at last", 0)]


class UnforeseenError(Exception):
    pass


ERRORS = {
    "interrupted": (lambda: Interrupted("stop"), Interrupted, "stop"),
    "full": (lambda: StorageFull("no room"), StorageFull, "no room"),
    "kernel": (lambda: KernelError("kernel k: bad"), KernelError, "kernel k: bad"),
    "away": (lambda: Unavailable("away"), Unavailable, "away"),
    "input": (lambda: BadInput("field", 1, "2"), WorkFailed, "field: got 1; allowed: 2"),
    "bug": (
        lambda: UnforeseenError("two\nlines"),
        WorkFailed,
        "unexpected UnforeseenError: two lines",
    ),
}


def failing(ranks: Ranks) -> list[Any]:
    """The same failures of rank 0, as each rank sees them."""
    found = []
    for make, _, _ in ERRORS.values():

        def raising(make: Any = make) -> Any:
            raise make()

        async def later(raising: Any = raising) -> Any:
            await asyncio.sleep(0)
            raising()

        for attempt in (lambda: ranks.led(raising), lambda: asyncio.run(ranks.awaited(later))):
            try:
                attempt()
            except Exception as error:
                found.append((type(error).__name__, str(error)))
    return found


def test_what_rank_0_raises_is_raised_on_all() -> None:
    first, second = run_ranks(2, failing)
    assert second == [
        (kind.__name__, message) for _, kind, message in ERRORS.values() for _ in range(2)
    ]
    assert first == [
        (type(make()).__name__, str(make())) for make, _, _ in ERRORS.values() for _ in range(2)
    ]


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_that_was_told_is_as_permanent_as_it_was(name: str) -> None:
    make, kind, message = ERRORS[name]
    found = raised_elsewhere(as_wire(make()))
    assert type(found) is kind
    assert str(found) == message
    assert found.permanent == getattr(make(), "permanent", True)


def test_the_first_failure_names_its_rank() -> None:
    outcomes = [{"digest": "d"}, as_wire(KernelError("bad bytes")), as_wire(Unavailable("away"))]
    failure = first_failure(outcomes)
    assert isinstance(failure, KernelError)
    assert str(failure) == "rank 1: bad bytes"
    assert first_failure([{"digest": "d"}]) is None
    assert str(first_failure([as_wire(KernelError("bad bytes"))])) == "bad bytes"


def stopping(group: ProcessGroup, asked: int) -> list[bool]:
    """One rank is asked to stop before its third batch; what each rank answers."""
    batches = 0
    group._asked = lambda: group.rank == asked and batches >= 3
    answers = []
    for _ in range(60):
        batches += 1
        answers.append(group.agree_to_stop())
        time.sleep(0.02 if group.rank else 0.005)
        if answers[-1]:
            break
    return answers


def test_ranks_stop_at_the_same_batch_whichever_was_asked() -> None:
    first, second = run_ranks(2, stopping, 1)
    assert first == second
    assert first[-1]
    assert not any(first[:2])
    assert len(first) < 60


def test_a_rank_that_never_comes_is_not_waited_for_for_ever() -> None:
    first, second = run_ranks(2, absent, timeout_seconds=1.0, failing=True)
    assert isinstance(first, RankFailure)
    assert isinstance(first.error, Unavailable)
    assert "a rank is gone or did not answer" in str(first.error)
    assert isinstance(second, RankFailure)


def absent(group: ProcessGroup) -> None:
    if group.rank == 1:
        time.sleep(3)
        raise UnforeseenError
    group.exchanged("anybody?")


def test_questions_come_now_and_then() -> None:
    rhythm = Rhythm()
    asked = []
    for batch in range(10 * MOST_BATCHES):
        if rhythm.due():
            asked.append(batch)
            rhythm.asked(1e-9)
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert asked[0] == 0
    assert gaps == sorted(gaps)
    assert gaps[-1] == MOST_BATCHES
    slow = Rhythm()
    for _ in range(5):
        assert slow.due()
        slow.asked(10 * CHECK_SECONDS)


@pytest.mark.parametrize(("present", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_what_lies_on_gpus_goes_over_nccl(
    monkeypatch: pytest.MonkeyPatch, present: bool, backend: str
) -> None:
    """No machine of these tests has a GPU: what is asked of PyTorch is looked at."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **_: asked.append(name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    with process_group(timeout_seconds=1.0):
        assert asked == [backend]
