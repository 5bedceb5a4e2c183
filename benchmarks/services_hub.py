"""Urza's reads and creations at 100 requests/s beside a bare FastAPI handler over asyncpg.

The bare handlers send the same statement over a pool of the same size and answer with the row: no
token, no check of what came, no metrics. All servers are processes of their own over one Postgres,
each with its own database. Requests leave by the clock, whatever the answers do, and each is timed
from the moment at which it should have left. A round gives each server the same number of requests
in shuffled order; its figure is the 99th percentile of those.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from pydantic import SecretStr

from benchmarks.execution_timing import Timings, comparison, joined
from benchmarks.services_timing import Bars, Figures, bars_of, in_processes
from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin
from esper.services.urza.auth import Role, Tokens
from tools.servers.postgres import PostgresServer

LIMIT = 3.0
RATE = 100.0
CONNECTIONS = 8
REQUESTS = 200
"""Of one round and server: two seconds."""
ROUNDS, QUICK_ROUNDS = 6, 2
KEY = "what the benchmark's tokens are signed with"
ARMS = {"urza": "urza", "bare": "bare", "bareAgain": "bare"}

Request = tuple[str, str, bytes]
"""Method, path and body."""


def measure(quick: bool) -> tuple[Figures, Bars]:
    """Figures and bars of reading a kernel and of creating a blueprint."""
    parts = in_processes(_measured, quick, QUICK_ROUNDS if quick else ROUNDS)
    figures = {
        name: comparison(timings, "urza", "bare", "bareAgain", LIMIT)
        for name, timings in joined([timings for timings, _ in parts]).items()
    }
    for name, figure in figures.items():
        figure["medianMicroseconds"] = {
            arm: float(np.median([medians[name][arm] for _, medians in parts])) for arm in ARMS
        }
    return figures, bars_of(figures, "5.3.hub-")


def _measured(process: int, rounds: int) -> tuple[dict[str, Timings], dict[str, dict[str, float]]]:
    """The 99th percentiles of each round in seconds, and the medians in microseconds."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(PostgresServer(folder / "postgres"))
        addresses = {}
        for arm, kind in ARMS.items():
            url = postgres.create_database(arm.lower())
            addresses[arm] = stack.enter_context(_server(kind, url, folder / arm))
        return asyncio.run(_compared(addresses, rounds, random.Random(process)))


async def _compared(
    addresses: dict[str, str], rounds: int, draw: random.Random
) -> tuple[dict[str, Timings], dict[str, dict[str, float]]]:
    kernels = {arm: await _filled(address) for arm, address in addresses.items()}
    number = 0

    def reading(arm: str) -> Request:
        return "GET", f"/api/v1/kernels/{kernels[arm]}", b""

    def creating(arm: str) -> Request:
        nonlocal number
        number += 1
        return "POST", "/api/v1/blueprints/", _document(number)

    timings, medians = {}, {}
    cases: dict[str, Callable[[str], Request]] = {"read-p99": reading, "create-p99": creating}
    for name, request in cases.items():
        p99: dict[str, list[float]] = {arm: [] for arm in ARMS}
        every: dict[str, list[float]] = {arm: [] for arm in ARMS}
        order = list(ARMS)
        for turn in range(rounds + 1):
            draw.shuffle(order)
            for arm in order:
                seconds = await _at_rate(addresses[arm], [request(arm) for _ in range(REQUESTS)])
                if turn:  # the first round opens connections and fills caches
                    p99[arm].append(float(np.quantile(seconds, 0.99)))
                    every[arm] += seconds
        timings[name] = Timings(processes=(p99,))
        medians[name] = {arm: float(np.median(every[arm])) * 1e6 for arm in ARMS}
    return timings, medians


def _document(number: int) -> bytes:
    """Another graph each time, so that each is created."""
    return json.dumps(builtin("low-rank", {"rank": 2 + number}).to_wire()).encode()


async def _filled(address: str) -> str:
    """Put one kernel into the hub; its id."""
    document = builtin("low-rank", {"rank": 2})
    target = KernelTarget(
        layer=LayerGeometry(kind="Linear", inputs=64, outputs=16),
        input_shape=(64,),
        output_shape=(16,),
    )
    body = json.dumps(document.to_wire()).encode()
    connection = await _Connection.opened(address)
    await connection.ask(("POST", "/api/v1/blueprints/", body))
    creation = {"blueprintDigest": document.digest, "target": target.to_wire()}
    made = await connection.ask(("POST", "/api/v1/kernels/", json.dumps(creation).encode()))
    connection.close()
    kernel: str = json.loads(made)["kernel"]
    return kernel


class _Connection:
    """One kept connection; as little as a client can do, so that it hides nothing of the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        token = Tokens(SecretStr(KEY)).mint(Role.ADMIN, "benchmark")
        self._headers = f"Host: hub\r\nAuthorization: Bearer {token}\r\n"

    @classmethod
    async def opened(cls, address: str) -> _Connection:
        host, _, port = address.removeprefix("http://").partition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ask(self, request: Request) -> bytes:
        """The body of a good answer."""
        method, path, body = request
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(head.encode() + b"\r\n" + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status, *fields = answer.decode().splitlines()
        length = next(
            int(field.partition(":")[2])
            for field in fields
            if field.lower().startswith("content-length:")
        )
        data = await self._reader.readexactly(length)
        if status.split(" ")[1] not in {"200", "201"}:
            raise RuntimeError(f"{method} {path}: {status}: {data[:200]!r}")
        return data

    def close(self) -> None:
        self._writer.close()


async def _at_rate(address: str, requests: list[Request]) -> list[float]:
    """Send the requests at `RATE`; seconds from when each should have left to its answer's end."""
    connections = [await _Connection.opened(address) for _ in range(CONNECTIONS)]
    free: asyncio.LifoQueue[_Connection] = asyncio.LifoQueue()
    for connection in connections:
        free.put_nowait(connection)
    seconds: list[float] = []

    async def one(request: Request, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        # Asleep too long is the client's fault, not the server's.
        began = max(due, time.perf_counter()) if free.qsize() else due
        connection = await free.get()
        await connection.ask(request)
        seconds.append(time.perf_counter() - began)
        free.put_nowait(connection)

    start = time.perf_counter() + 0.05
    async with asyncio.TaskGroup() as group:
        for index, request in enumerate(requests):
            group.create_task(one(request, start + index / RATE))
    for connection in connections:
        connection.close()
    return seconds


@contextmanager
def _server(kind: str, database: str, folder: Path) -> Iterator[str]:
    """A server in a process of its own; gives its address."""
    folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.services_hub_servers", kind]
    environment = {**os.environ, "BENCHMARK_DATABASE": database, "BENCHMARK_FOLDER": str(folder)}
    environment["BENCHMARK_KEY"] = KEY
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise RuntimeError(f"the {kind} server did not start")
            yield address
        finally:
            process.terminate()
