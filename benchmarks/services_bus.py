"""Messages over Redis: `OonaClient` beside raw redis-py with the same batching.

Both publish a batch, consume it through a group and acknowledge it, each from one process over one
Redis whose every write is in its file before the answer. Oona writes, reads and checks its
envelopes. The raw side is given finished bytes and looks into none, but for packets: there it
writes and reads the same content with the standard library's JSON, since the figure would else be
that of a codec. Packets over finished bytes are measured too, as a figure without a bar.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from redis.asyncio import Redis

from benchmarks.execution_timing import Timings, joined
from benchmarks.services_timing import Bars, Figures, bars_of, in_processes, rounds_of, speed
from esper.configs import RedisConfig
from esper.contracts.enums import ComponentType
from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.operational import HealthSignal, SessionEvent
from esper.services.oona_client import OonaClient, Subscription
from tools.servers.redis_server import RedisServer

LIMIT = 0.8
BATCHES = (1, 10, 100)
MESSAGES, CYCLES = 400, 100
"""In a round of each arm: so many messages, but at most so many batches."""
ROUNDS, QUICK_ROUNDS = 40, 5
LAYERS = 12
STREAM_LENGTH = 10_000


def measure(quick: bool) -> tuple[Figures, Bars]:
    """Figures and bars of small messages and of telemetry, one by one and in batches."""
    parts = in_processes(_measured, quick, QUICK_ROUNDS if quick else ROUNDS)
    figures: Figures = {}
    for name, timings in joined(parts).items():
        figures[name] = speed(timings, "oona", "redis", "redisAgain", LIMIT)
        if "redisBytes" in timings.processes[0]:
            bare = timings.ratio("redisBytes", "oona").plain()
            figures[f"{name}-over-bytes"] = bare
    return figures, bars_of(figures, "5.3.bus-")


def messages() -> dict[str, OonaMessage]:
    """One small message, and one as long as a packet about a model of `LAYERS` layers."""
    event = SessionEvent(session="s", epoch=1, reason="Started", message="the session has begun")
    small = OonaMessage.carrying(TopicNames.EVENTS, event, ComponentType.TOLARIA)
    signals = [
        HealthSignal(
            session="s",
            epoch=1,
            layer=f"blocks.{number}.linear",
            gradient_norm=0.123456789 + number,
            gradient_variance=0.0123456789,
            gradient_to_weight_ratio=0.00123456789,
            activation_rank=0.87654321,
            dead_fraction=0.03125,
        ).to_wire()
        for number in range(LAYERS)
    ]
    telemetry = {"topic": TopicNames.PACKETS, "payload": {"session": "s", "signals": signals}}
    return {"event": small, "packet": small.model_copy(update=telemetry)}


def _measured(process: int, rounds: int) -> dict[str, Timings]:
    timings = {}
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        for name, message in messages().items():
            for batch in BATCHES:
                with asyncio.Runner() as runner:
                    timings[f"{name}-{batch}"] = _compared(
                        runner, server, message, f"{name}-{batch}", batch, rounds, process
                    )
    return timings


def _compared(
    runner: asyncio.Runner,
    server: RedisServer,
    message: OonaMessage,
    namespace: str,
    batch: int,
    rounds: int,
    process: int,
) -> Timings:
    config = RedisConfig(url=server.url, namespace=namespace, stream_length=STREAM_LENGTH)
    bus = OonaClient(config, scope=None)
    client = Redis.from_url(server.url)
    key, cycles = f"raw:{namespace}", min(CYCLES, MESSAGES // batch)
    try:
        subscription = runner.run(bus.subscribe({message.topic}, "group", prefetch=batch))
        runner.run(bus.publish(message))
        runner.run(_receive(subscription, 1))
        runner.run(client.xgroup_create(key, "group", mkstream=True))
        text = message.model_dump_json(by_alias=True).encode()
        content = json.loads(text)

        def oona() -> None:
            runner.run(_oona(bus, subscription, message, batch, cycles))

        def redis() -> None:
            runner.run(_redis(client, key, lambda: json.dumps(content), json.loads, batch, cycles))

        def redis_bytes() -> None:
            runner.run(_redis(client, key, lambda: text, len, batch, cycles))

        arms = {"oona": oona, "redis": redis_bytes, "redisAgain": redis_bytes}
        if message.topic is TopicNames.PACKETS:
            arms |= {"redis": redis, "redisAgain": redis, "redisBytes": redis_bytes}
        return rounds_of(arms, rounds, process)
    finally:
        runner.run(bus.close())
        runner.run(client.aclose())


async def _oona(
    bus: OonaClient, subscription: Subscription, message: OonaMessage, batch: int, cycles: int
) -> None:
    published = [message] * batch
    for _ in range(cycles):
        await bus.publish(*published)
        await _receive(subscription, batch)
    # Acknowledgements travel behind: the clock runs until the last one is in Redis.
    assert await bus._outbox.flush(60)


async def _receive(subscription: Subscription, batch: int) -> None:
    for _ in range(batch):
        await subscription.acknowledge(await subscription.receive())


async def _redis(
    client: Redis,
    key: str,
    written: Callable[[], bytes | str],
    read: Callable[[bytes], object],
    batch: int,
    cycles: int,
) -> None:
    for _ in range(cycles):
        if batch == 1:
            await client.xadd(key, {"m": written()}, maxlen=STREAM_LENGTH, approximate=True)
        else:
            pipeline = client.pipeline(transaction=False)
            for _ in range(batch):
                pipeline.xadd(key, {"m": written()}, maxlen=STREAM_LENGTH, approximate=True)
            await pipeline.execute()
        left = batch
        while left:
            came = await client.xreadgroup("group", "one", {key: ">"}, count=left, block=1000)
            entries = came[0][1]
            for _, fields in entries:
                read(fields[b"m"])
            await client.xack(key, "group", *[entry for entry, _ in entries])
            left -= len(entries)
