"""Fixed weights on their way to a GPU, without stopping whoever trains on it.

Bytes go through two pinned buffers, kept and used in turn, on a stream of their own; an event says
when they have arrived. Whoever reads them lets its own stream wait for the event, not itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock

import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20


class Staging:
    """Copies tensors to one CUDA device; safe to call from several threads.

    Args:
        device: a CUDA device.
        chunk_bytes: the size of each of the two pinned buffers.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [
            torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        self._emptied = [torch.cuda.Event() for _ in self._buffers]
        self._turn = 0
        self._lock = Lock()

    def copy(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        """The same tensors on the device, and the event after which they may be read.

        Raises:
            torch.OutOfMemoryError: the device has no room for them.
        """
        arrival = torch.cuda.Event()
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            landed = {name: self._copied(tensor) for name, tensor in tensors.items()}
            arrival.record(self._stream)
        return landed, arrival

    def _copied(self, tensor: Tensor) -> Tensor:
        landed = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source = tensor.contiguous().view(-1).view(torch.uint8)
        target = landed.view(-1).view(torch.uint8)
        for start in range(0, source.numel(), self._buffers[0].numel()):
            buffer, emptied = self._buffers[self._turn], self._emptied[self._turn]
            self._turn = (self._turn + 1) % len(self._buffers)
            piece = source[start : start + buffer.numel()]
            emptied.synchronize()  # waits for what the buffer held before, here and not on the GPU
            buffer[: piece.numel()].copy_(piece)
            target[start : start + piece.numel()].copy_(buffer[: piece.numel()], non_blocking=True)
            emptied.record(self._stream)
        return landed


def take(tensors: Mapping[str, Tensor], arrival: torch.cuda.Event) -> None:
    """Let the current stream wait for staged tensors, and their memory for the current stream."""
    for tensor in tensors.values():
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(arrival)
        tensor.record_stream(stream)
