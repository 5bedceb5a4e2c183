"""Ranks as new processes, one thread each, that meet over the loopback as under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from esper.services.tolaria.distribution import Alone
from esper.services.tolaria.process_group import process_group

SECONDS = 900.0
"""How long a rank may take to answer."""
COLLECTIVE_SECONDS = 120.0


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(ranks, *arguments)` gives on each of `size` ranks, each a new process.

    Raises:
        RuntimeError: a rank failed; the message has its traceback.
    """
    context = multiprocessing.get_context("spawn")
    port, ends, processes = _free_port(), [], []
    for rank in range(size):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(sending, rank, size, port, work, arguments), daemon=True
        )
        process.start()
        sending.close()
        ends.append(receiving)
        processes.append(process)
    try:
        found = [_answer(rank, end) for rank, end in enumerate(ends)]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    failures = [text for text, _ in found if text]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [value for _, value in found]


def _answer(rank: int, end: Connection) -> tuple[str, Any]:
    try:
        if end.poll(SECONDS):
            found: tuple[str, Any] = end.recv()
            return found
    except EOFError:
        pass
    return f"rank {rank} gave no answer", None


def _rank(
    sending: Connection,
    rank: int,
    size: int,
    port: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        if size == 1:
            value = work(Alone(), *arguments)
        else:
            with process_group(timeout_seconds=COLLECTIVE_SECONDS) as group:
                value = work(group, *arguments)
                group.exchanged(None)  # no rank leaves while another still talks to it
        sending.send(("", value))
    except BaseException:
        sending.send((f"rank {rank}:\n{traceback.format_exc()}", None))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
