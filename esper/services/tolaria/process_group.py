"""The ranks of a session under torchrun, over torch.distributed: gloo on CPU, NCCL on GPU.

Values between ranks are JSON, never pickled objects. Control messages always go over gloo, also
where tensors go over NCCL: they must not wait for a device.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper.errors import Unavailable, one_line
from esper.services.tolaria.backends import backend
from esper.services.tolaria.distribution import Rhythm, as_wire, raised_elsewhere

BEAT_SECONDS = 0.5
"""How often rank 0 tells the others that it still waits."""

_WAITING, _DONE, _FAILED = 0, 1, 2


@contextmanager
def process_group(
    stopping: Callable[[], bool] = lambda: False, *, timeout_seconds: float
) -> Iterator[ProcessGroup]:
    """The group that torchrun's environment describes; left at the end.

    A collective in which a rank is missing for `timeout_seconds` fails on the others.

    Raises:
        Unavailable: the ranks did not find each other in that time.
    """
    over = backend(gpus=torch.cuda.is_available())
    try:
        dist.init_process_group(over, timeout=timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:
        raise Unavailable(f"the ranks did not meet: {one_line(str(error))}") from error
    try:
        yield ProcessGroup(stopping)
    finally:
        # A group whose other ranks are gone must not be waited for.
        dist.destroy_process_group()


class ProcessGroup:
    """`distribution.Ranks` over torch's default process group."""

    def __init__(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """`stopping` says whether this process was asked to stop."""
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._asked = stopping
        self._stopping = False
        self._rhythm = Rhythm()

    def told(self, value: Any = None) -> Any:
        """Rank 0's `value`, on every rank."""
        return json.loads(self.told_bytes(json.dumps(value).encode() if self.rank == 0 else None))

    def told_bytes(self, data: bytes | None = None) -> bytes:
        """Rank 0's `data`, on every rank."""
        assert (data is not None) == (self.rank == 0), "rank 0 tells, the others listen"
        return self._received(self._begun(_DONE, data or b"")[1], data)

    def exchanged(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of the ranks."""
        own = json.dumps(value).encode()
        sizes = [int(size) for size in self.gathered(torch.tensor([len(own)]))[:, 0]]
        padded = own.ljust(max(sizes))
        rows = self.gathered(torch.frombuffer(bytearray(padded), dtype=torch.uint8))
        found = zip(rows, sizes, strict=True)
        return [json.loads(row[:size].numpy().tobytes()) for row, size in found]

    def gathered(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor of one shape and type, stacked in their order: [W, ...]."""
        tensor = tensor.contiguous()
        rows = tensor.new_empty((self.size, *tensor.shape))
        with _translating():
            dist.all_gather_into_tensor(rows.view(-1), tensor.view(-1))
        return rows

    def relayed(self, tensor: Tensor | None, owner: int) -> Tensor:
        """The tensor that rank `owner` gives, on every rank."""
        shapes = self.exchanged(
            None if tensor is None else [str(tensor.dtype), list(tensor.shape), str(tensor.device)]
        )
        dtype, shape, device = shapes[owner]
        if self.rank != owner or tensor is None:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            if not device.startswith("cpu"):
                tensor = tensor.to("cuda")
        tensor = tensor.detach().contiguous()
        with _translating():
            # As bytes: gloo does not know all types of numbers.
            dist.broadcast(tensor.view(-1).view(torch.uint8), owner)
        return tensor

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        with _translating():
            dist.all_reduce(tensor)
        return tensor

    def spread(self, tensor: Tensor) -> None:
        """Give every rank the contents of rank 0's tensor, in place."""
        with _translating():
            dist.broadcast(tensor, 0)

    async def awaited(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """What `work` comes to on rank 0, told to all; the others hear meanwhile that it waits.

        Raises:
            EsperError: `work` raised, there or here.
        """
        if self.rank:
            return self._heard()
        task = asyncio.ensure_future(work())
        try:
            while True:
                await asyncio.wait({task}, timeout=BEAT_SECONDS)
                if task.done():
                    break
                self._begun(_WAITING, b"")
                self._stopping |= self._any_asked()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        return self._shared(task.result)

    def led(self, work: Callable[[], Any]) -> Any:
        """What `work` comes to on rank 0, told to all.

        Raises:
            EsperError: `work` raised, there or here.
        """
        return self._heard() if self.rank else self._shared(work)

    def stopping(self) -> bool:
        """Whether a rank was asked to stop, as far as this one knows."""
        return self._stopping or self._asked()

    def agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop, asked about every CHECK_SECONDS."""
        if self._rhythm.due():
            seen = torch.tensor([float(self.stopping()), self._rhythm.seconds], dtype=torch.float64)
            with _translating():
                dist.all_reduce(seen, dist.ReduceOp.MAX)
            stop, seconds = seen.tolist()
            self._rhythm.asked(seconds)
            self._stopping |= bool(stop)
            # Only here: whoever was asked meanwhile waits for the others.
            return self._stopping
        return False

    # -- parts ------------------------------------------------------------------------------

    def _shared(self, work: Callable[[], Any]) -> Any:
        """What `work` comes to on this rank, 0, told to the others."""
        try:
            value = work()
            data = json.dumps(value).encode()
        except BaseException as error:
            data = json.dumps(as_wire(error)).encode()
            self._received(self._begun(_FAILED, data)[1], data)
            raise
        self._received(self._begun(_DONE, data)[1], data)
        return value

    def _heard(self) -> Any:
        while True:
            kind, size = self._begun(_WAITING, b"")
            if kind == _WAITING:
                self._stopping |= self._any_asked()
                continue
            value = json.loads(self._received(size, None))
            if kind == _FAILED:
                raise raised_elsewhere(value)
            return value

    def _any_asked(self) -> bool:
        asked = torch.tensor([float(self.stopping())])
        with _translating():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())

    def _begun(self, kind: int, data: bytes) -> tuple[int, int]:
        """What rank 0 is about to tell: its kind, and how many bytes."""
        header = torch.tensor([kind, len(data)], dtype=torch.int64)
        self.spread(header)
        kind, size = header.tolist()
        return kind, size

    def _received(self, size: int, data: bytes | None) -> bytes:
        if data is None:
            held = torch.empty(size, dtype=torch.uint8)
        else:
            held = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[:size]
        if size:
            self.spread(held)
        return data if data is not None else held.numpy().tobytes()


@contextmanager
def _translating() -> Iterator[None]:
    """What torch raises where a rank is gone or late, as one of Esper's errors."""
    try:
        yield
    except RuntimeError as error:
        raise Unavailable(f"a rank is gone or did not answer: {one_line(str(error))}") from error
