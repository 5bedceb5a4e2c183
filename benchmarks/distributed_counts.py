"""What the ranks of a real session send each other, and rank 0 the bus and the hub: counted.

Every call of torch.distributed in a whole run is counted, by the function of Esper's that made it,
with the bytes that one rank gives or gets in it (an all-gather brings each rank as many from every
other one). docs/scale.md makes its formulas of these figures.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks.distributed_checkpoint import Documents, example_01, train_in
from benchmarks.distributed_ranks import on_ranks
from benchmarks.services_timing import Bars, Figures
from esper.cli import trainers
from esper.services.oona_client import InProcessOona
from esper.services.tolaria import parallel
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.flat import module_digest
from esper.services.tolaria.trainer import TolariaTrainer

EPOCHS = 100
QUICK_EPOCHS = 12
REPEATS = 200
MEBIBYTE = 2**20

_PLAIN = ("process_group.py", "distribution.py", "distributed_counts.py")
"""Files that pass on what others send."""


class Ledger:
    """Calls and bytes by what they were for."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, name: str, size: int) -> None:
        """Count one call."""
        self.calls[name] += 1
        self.bytes[name] += size

    def plain(self) -> dict[str, dict[str, int]]:
        """JSON-ready, by name."""
        return {
            name: {"calls": calls, "bytes": self.bytes[name]}
            for name, calls in sorted(self.calls.items())
        }


def counts(quick: bool) -> tuple[Figures, Bars]:
    """Example 01 in each way to cut a batch, and what one message takes."""
    epochs = QUICK_EPOCHS if quick else EPOCHS
    ways: dict[str, tuple[int, dict[str, Any]]] = {"replicas-2": (2, {})}
    if not quick:
        ways["replicas-4"] = (4, {})
        ways["logical-shards-2"] = (2, {"logicalShards": 4})
        ways["full-2"] = (2, {"sharding": "full"})
    figures: Figures = {"latency": {f"ranks-{size}": latency_of(size) for size in (2, 4)}}
    for name, (size, training) in ways.items():
        made = example_01(epochs)
        made[0]["spec"]["training"] |= training
        made[0]["spec"]["workers"] = {"processesPerWorker": size}
        figures[name] = on_ranks(size, counted, made)[0]
    return figures, {}


def counted(ranks: Ranks, made: Documents) -> Figures:
    """What one rank of a session sends, and what it is about."""
    collectives, messages, requests = Ledger(), Ledger(), Ledger()
    facts: dict[str, int] = {}
    _count_collectives(collectives)
    _count_messages(messages)
    _count_requests(requests)
    _keep_facts(facts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(ranks.told(temporary))
        facts["checkpointBytes"] = train_in(folder, ranks, made)
        facts["statusBytes"] = _size(folder / "run" / "status.yaml")
        ranks.told(0)
    return {
        "session": facts,
        "collectives": collectives.plain(),
        "bus": messages.plain(),
        "hub": requests.plain(),
    }


def latency_of(size: int) -> Figures:
    """What messages between so many ranks take, in microseconds: the best of the repeats."""
    found: Figures = on_ranks(size, _latency)[0]
    return found


def purpose() -> str:
    """The function of Esper's that a collective is for, as module.function; "": the benchmark's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "fsdp" in path.parts:
            return "FSDP2"
        if path.name == "default_hooks.py":
            return "DDP"
        if path.name not in _PLAIN and "tolaria" in path.parts:
            return f"{path.stem}.{frame.f_code.co_name}"
        if path.name not in _PLAIN and path.parent.name == "cli":
            return f"{path.stem}.{frame.f_code.co_name}"
        if frame.f_back is None:
            break
        if path.name == "process_group.py" and frame.f_code.co_name == "agree_to_stop":
            return "process_group.agree_to_stop"
        frame = frame.f_back
    return ""


def _count_collectives(ledger: Ledger) -> None:
    def watch(name: str, size: Callable[..., int]) -> None:
        work = getattr(dist, name)

        @wraps(work)
        def counting(*arguments: Any, **named: Any) -> Any:
            asking = purpose()
            if asking:
                ledger.add(f"{asking} {name.strip('_')}", size(*arguments, **named))
            return work(*arguments, **named)

        setattr(dist, name, counting)

    watch("all_reduce", lambda tensor, *_, **__: tensor.nbytes)
    watch("broadcast", lambda tensor, *_, **__: tensor.nbytes)
    watch("all_gather_into_tensor", _gathered_bytes)
    watch("reduce_scatter_tensor", _scattered_bytes)
    watch(
        "_broadcast_coalesced",
        lambda _group, tensors, *_, **__: sum(tensor.nbytes for tensor in tensors),
    )
    # DDP reduces in C++, unless it is given a hook: this one does the same in Python.
    made = parallel._replica

    def hooked(*arguments: Any, **named: Any) -> Any:
        replica = made(*arguments, **named)

        # Without annotations: DDP compares them with types, and here they are text.
        def own(state, bucket):  # type: ignore[no-untyped-def]
            return allreduce_hook(state, bucket)

        replica.register_comm_hook(None, own)
        return replica

    parallel._replica = hooked


def _gathered_bytes(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, *_: Any, **__: Any
) -> int:
    del output_tensor
    return input_tensor.nbytes


def _scattered_bytes(*arguments: Any, **named: Any) -> int:
    given: torch.Tensor = named["input"] if "input" in named else arguments[1]
    return given.nbytes


def _count_messages(ledger: Ledger) -> None:
    publish = InProcessOona.publish

    async def counting(self: InProcessOona, *messages: Any) -> None:
        for message in messages:
            ledger.add(str(message.topic), len(message.model_dump_json(by_alias=True)))
        await publish(self, *messages)

    InProcessOona.publish = counting  # type: ignore[method-assign, assignment]


class Counted:
    """A hub whose requests are counted, by their name, with the bytes of artifacts."""

    def __init__(self, hub: Any, ledger: Ledger) -> None:
        self._hub, self._ledger = hub, ledger

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._hub, name)

        async def counting(*arguments: Any, **named: Any) -> Any:
            value = await work(*arguments, **named)
            self._ledger.add(name, len(value) if isinstance(value, bytes) else 0)
            return value

        return counting


def _count_requests(ledger: Ledger) -> None:
    made = trainers._trainer

    def counting(prepared: Any, config: Any, bus: Any, hub: Any, *rest: Any) -> Any:
        return made(prepared, config, bus, Counted(hub, ledger), *rest)  # type: ignore[arg-type]

    trainers._trainer = counting  # type: ignore[assignment]


def _keep_facts(facts: dict[str, int]) -> None:
    """What the session has, and how often it did what its messages go with."""
    train, finish, decide = Engine.train_epoch, TolariaTrainer._finish, TolariaTrainer._decide

    def training(self: Engine, epoch: int, *, trial: bool = False) -> float:
        pieces = -(-len(self.datasets.train) // self.config.training.batch_size)
        facts["epochsTrained"] = facts.get("epochsTrained", 0) + 1
        facts["batches"] = facts.get("batches", 0) + pieces
        learning = len(self.book.learning())
        facts["shadowPasses"] = facts.get("shadowPasses", 0) + learning * pieces
        live = sum(p.numel() for p in self.learning.seed_parameters())
        facts["seedParametersTimesBatches"] = (
            facts.get("seedParametersTimesBatches", 0) + live * pieces
        )
        return train(self, epoch, trial=trial)

    async def deciding(self: TolariaTrainer, *arguments: Any) -> None:
        facts["boundaries"] = facts.get("boundaries", 0) + 1
        await decide(self, *arguments)

    def finishing(self: TolariaTrainer) -> Any:
        result = finish(self)
        facts["hostParametersBase"] = result.parameters_base
        facts["hostParameters"] = result.parameters
        facts["packets"] = self._sequence
        facts["layers"] = len(self.engine.model.morphology.layers)
        facts["seedsTried"] = len(self.growth.book.trials)
        facts["epochs"] = result.epochs
        return result

    Engine.train_epoch = training  # type: ignore[method-assign]
    TolariaTrainer._decide = deciding  # type: ignore[method-assign, assignment]
    TolariaTrainer._finish = finishing  # type: ignore[method-assign]


def _latency(ranks: Ranks) -> Figures:
    small, rows = torch.zeros(1), {}
    large = torch.zeros(16 * MEBIBYTE // 4)
    medium = torch.zeros(MEBIBYTE // 4)
    one = {"reason": "a decision is about this long" * 20}
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "told": (lambda: ranks.told(one), REPEATS),
        "exchanged": (lambda: ranks.exchanged({"digest": "0" * 64}), REPEATS),
        "summed-4-bytes": (lambda: ranks.summed(small), REPEATS),
        "summed-1-MiB": (lambda: ranks.summed(medium), 20),
        "summed-16-MiB": (lambda: ranks.summed(large), 5),
        "spread-16-MiB": (lambda: ranks.spread(large), 5),
        "gathered-16-MiB": (lambda: ranks.gathered(large), 5),
    }
    for name, (work, repeats) in works.items():
        work()
        taken = []
        for _ in range(repeats):
            ranks.gathered(small)
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
        rows[name] = {
            "microseconds": round(min(taken) * 1e6, 1),
            "median": round(float(np.median(taken)) * 1e6, 1),
        }
    module = torch.nn.Linear(2048, 2048)
    began = time.perf_counter()
    module_digest(module)
    size = sum(p.nbytes for p in module.parameters())
    rows["digest"] = {"megabytesASecond": round(size / (time.perf_counter() - began) / 1e6)}
    return rows


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
