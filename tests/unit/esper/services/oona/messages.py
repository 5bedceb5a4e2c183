"""Messages and clients for the tests of the bus."""

import asyncio
import contextlib
import time

from esper.configs import RedisConfig
from esper.contracts.enums import ComponentType
from esper.contracts.messages import KernelReady, OonaMessage, TopicNames
from esper.contracts.operational import SessionEvent
from esper.services.oona_client import OonaClient

READY = TopicNames.KERNEL_READY
EVENTS = TopicNames.EVENTS
PACKETS = TopicNames.PACKETS
SCOPE = "session-1"


def ready(number, scope=SCOPE):
    payload = KernelReady(kernel=str(number), blueprint="noop")
    return OonaMessage.carrying(READY, payload, ComponentType.TEZZERET, scope=scope)


def event(number, scope=SCOPE):
    payload = SessionEvent(session="s", epoch=number, reason="Test", message="a message")
    return OonaMessage.carrying(EVENTS, payload, ComponentType.TOLARIA, scope=scope)


def packet(number, scope=SCOPE):
    """Telemetry; the bus doesn't open payloads."""
    values = ready(number, scope).model_dump() | {"topic": PACKETS, "type": "SystemStatePacket"}
    return OonaMessage.model_validate(values)


def numbers(messages):
    return [int(m.payload.get("kernel", m.payload.get("epoch"))) for m in messages]


def config_of(server, namespace, **changes):
    """Settings under which everything that waits, waits a short time."""
    settings = {
        "url": server.url,
        "namespace": namespace,
        "connect_timeout_seconds": 1.0,
        "read_timeout_seconds": 1.0,
        "attempts": 3,
        "backoff_seconds": 0.01,
        "max_backoff_seconds": 0.1,
        "discovery_seconds": 0.05,
    }
    return RedisConfig(**settings | changes)


@contextlib.asynccontextmanager
async def client_of(server, namespace, scope=SCOPE, **changes):
    bus = OonaClient(config_of(server, namespace, **changes), scope=scope)
    try:
        yield bus
    finally:
        await bus.close()


async def drained(subscription, count):
    """The next messages, each acknowledged."""
    messages = []
    for _ in range(count):
        message = await subscription.receive()
        await subscription.acknowledge(message)
        messages.append(message)
    return messages


async def is_idle(subscription, seconds=0.1):
    """Whether a receive waits that long."""
    receiving = asyncio.ensure_future(subscription.receive())
    done, _ = await asyncio.wait({receiving}, timeout=seconds)
    receiving.cancel()
    return not done


async def until(condition, seconds=20):
    """Look until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        await asyncio.sleep(0.01)


def run(work, seconds=60):
    return asyncio.run(asyncio.wait_for(work, timeout=seconds))
