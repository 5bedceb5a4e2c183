"""The composition root: what always runs, and what runs while the lease is held.

Probes, metrics and the election run from the first moment on. Everything that watches or writes
begins with the lease and ends with it: a process that has lost it ends, and is started anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from esper.configs import EsperConfig
from esper.errors import EsperError
from esper.services.health import Check, HealthServer, watch
from esper_operator.api import ClusterApi, connection
from esper_operator.health import OperatorHealth
from esper_operator.leading import Leader
from esper_operator.lease import ApiLeases, Election
from esper_operator.metrics import OperatorMetrics

SIGNALS = (signal.SIGINT, signal.SIGTERM)
END_SECONDS = 3.0
"""For what runs to end, once the lease is lost or a signal has come."""
FAILED = 1
_log = logging.getLogger(__name__)


async def run(config: EsperConfig) -> int:
    """Run until a signal comes or the lease is lost; what the process is to exit with.

    Raises:
        ConfigError: a setting can't be used.
    """
    settings = config.operator
    metrics = OperatorMetrics()
    health = OperatorHealth(metrics)
    component = config.component
    configuration = await connection(Path(settings.kubeconfig) if settings.kubeconfig else None)
    with HealthServer(
        health, host=component.health_host, port=component.health_port or 0
    ) as server:
        announce(server.url)
        name = identity()
        async with ClusterApi(configuration, f"esper-operator/{name}") as api:
            election = Election(ApiLeases(api, settings), settings, name)
            leader = Leader(config, api, election, metrics, health)
            stop = Stop()
            watching = asyncio.create_task(watch(health, {"operator.kubeconfig": _answers(api)}))
            health.started()
            try:
                return await _lives(election, leader, metrics, stop)
            finally:
                watching.cancel()


async def _lives(election: Election, leader: Leader, metrics: OperatorMetrics, stop: Stop) -> int:
    acquiring = await _first(election.acquire(), stop.wait())
    if acquiring is None:
        return 0
    metrics.show_lease(True)
    tasks = [
        asyncio.create_task(what, name=name)
        for name, what in (
            ("leading", leader.lead(stop.keep)),
            ("the lease", election.keep()),
            ("a signal", stop.wait()),
        )
    ]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    ended = [task for task in tasks if task.done()]
    for task in ended:
        _tell(task)
    # Nothing is written from here on: what is under way is cancelled before the lease is given
    # back.
    leader.stop_writing()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=END_SECONDS)
    await election.release()
    return 0 if stop.set else FAILED


async def _first(*races: Coroutine[Any, Any, object]) -> object | None:
    """What the first of these gives if it is the first to end; else None."""
    tasks = [asyncio.create_task(what) for what in races]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks[1:]:
        task.cancel()
    if tasks[0].done():
        tasks[0].result()
        return tasks[0]
    tasks[0].cancel()
    return None


def _tell(task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if isinstance(error, EsperError):
        _log.error("%s has ended: %s", task.get_name(), error)
    elif error is not None:
        _log.error("%s has ended", task.get_name(), exc_info=error)
    else:
        _log.warning("%s ends the work", task.get_name())


class Stop:
    """Whether SIGINT or SIGTERM has come; the second of them ends the process as ever."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.keep()

    @property
    def set(self) -> bool:
        """Whether one has come."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Return when one has come."""
        await self._event.wait()

    def keep(self) -> None:
        """Take the signals, from whoever has them."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._come, number)

    def _come(self, number: signal.Signals) -> None:
        self._event.set()
        asyncio.get_running_loop().remove_signal_handler(number)


def _answers(api: ClusterApi) -> Check:
    async def answers() -> bool:
        await api.send("GET", "/version", seconds=CHECK_SECONDS)
        return True

    return answers


CHECK_SECONDS = 4.0


def identity() -> str:
    """A name that no other candidate has: host, process, and a part by chance."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def announce(url: str) -> None:
    """Say where the probes are: one line on standard error."""
    sys.stderr.write(f"operator: {url}\n")
    sys.stderr.flush()
