"""Ranks of a session as processes: forked from one that has imported torch and Esper already.

Each joins a real process group (gloo over loopback), as under torchrun, and runs one function.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from esper.errors import Unavailable
from esper.services.tolaria.process_group import ProcessGroup, process_group

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["esper.cli.embedded", "tests.ranks", "tests.integration.sessions"])

SECONDS = 240.0


@dataclass
class RankFailure(Exception):  # noqa: N818
    """What a rank raised, with its traceback as text."""

    rank: int
    error: BaseException | None
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank}:\n{self.text}"


def run_ranks(
    size: int,
    work: Callable[..., Any],
    *arguments: Any,
    timeout_seconds: float = 60.0,
    failing: bool = False,
) -> list[Any]:
    """What `work(group, *arguments)` gives on each of `size` ranks.

    `failing`: a rank's exception stands in its place, as a RankFailure; else it is raised.
    """
    port = _free_port()
    ends, processes = [], []
    for rank in range(size):
        receiving, sending = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_rank, args=(sending, rank, size, port, timeout_seconds, work, arguments)
        )
        process.start()
        sending.close()
        ends.append(receiving)
        processes.append(process)
    found: list[Any] = []
    end = time.monotonic() + SECONDS
    try:
        for rank, receiving in enumerate(ends):
            found.append(_outcome(rank, receiving, end))
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
    failures = [outcome for outcome in found if isinstance(outcome, RankFailure)]
    # A rank whose peer is gone says so; the one that went says why.
    failures.sort(key=lambda failure: isinstance(failure.error, Unavailable))
    if failures and not failing:
        raise failures[0]
    return found


def _outcome(rank: int, receiving: Connection, end: float) -> Any:
    if not receiving.poll(max(0.0, end - time.monotonic())):
        return RankFailure(rank, TimeoutError(), "no answer in time")
    try:
        good, value, text = receiving.recv()
    except EOFError:
        return RankFailure(rank, None, "it ended without a word")
    return value if good else RankFailure(rank, value, text)


def _rank(
    sending: Connection,
    rank: int,
    size: int,
    port: int,
    timeout_seconds: float,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with process_group(timeout_seconds=timeout_seconds) as group:
            value = work(group, *arguments)
            group.exchanged(None)  # no rank leaves while another still talks to it
        sending.send((True, value, ""))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(str(error))
        sending.send((False, error, text))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


__all__ = ["ProcessGroup", "RankFailure", "run_ranks"]
