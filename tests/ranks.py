"""Ranks of a session as processes: forked from one that has imported torch and Esper already.

Each joins a real process group (gloo over loopback), as under torchrun, and runs one function. Run
as a module, this file is what they are forked from: imports take longer than a small session.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from esper.errors import Unavailable
from esper.services.tolaria.process_group import ProcessGroup, process_group
from tests.integration.processes import ROOT, environment, preload

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
    source = _source()
    source.send((size, timeout_seconds, work, arguments))
    found = [_outcome(rank, answer) for rank, answer in enumerate(source.recv())]
    failures = [outcome for outcome in found if isinstance(outcome, RankFailure)]
    # A rank whose peer is gone says so; the one that went says why.
    failures.sort(key=lambda failure: isinstance(failure.error, Unavailable))
    if failures and not failing:
        raise failures[0]
    return found


def _outcome(rank: int, answer: bytes | str) -> Any:
    if isinstance(answer, str):
        return RankFailure(rank, None, answer)
    good, value, text = pickle.loads(answer)
    return value if good else RankFailure(rank, value, text)


@functools.cache
def _source() -> Connection:
    """The process that ranks are forked from; it ends with this one."""
    mine, its = multiprocessing.Pipe()
    command = [sys.executable, "-m", __name__, str(its.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), pass_fds=[its.fileno()])
    its.close()

    def end() -> None:
        mine.close()
        process.wait()

    atexit.register(end)
    return mine


def _serve(asking: Connection) -> None:
    preload()
    while True:
        try:
            request = asking.recv()
        except EOFError:
            return
        asking.send(_forked(*request))


def _forked(
    size: int, timeout_seconds: float, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> list[bytes | str]:
    """What each rank sent, or why it sent nothing."""
    fork = multiprocessing.get_context("fork")
    port = _free_port()
    ends, processes = [], []
    for rank in range(size):
        receiving, sending = fork.Pipe(duplex=False)
        process = fork.Process(
            target=_rank, args=(sending, rank, size, port, timeout_seconds, work, arguments)
        )
        process.start()
        sending.close()
        ends.append(receiving)
        processes.append(process)
    end = time.monotonic() + SECONDS
    try:
        return [_sent(receiving, end) for receiving in ends]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def _sent(receiving: Connection, end: float) -> bytes | str:
    if not receiving.poll(max(0.0, end - time.monotonic())):
        return "no answer in time"
    try:
        return receiving.recv_bytes()
    except EOFError:
        return "it ended without a word"


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

if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
