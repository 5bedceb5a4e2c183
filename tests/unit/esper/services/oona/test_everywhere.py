"""Oona over a real Redis, over many namespaces and many streams: what the operator hears."""

import pytest

from esper.contracts.messages import OonaMessage
from esper.errors import BadInput
from esper.services.oona.streams import stream_key
from esper.services.oona_client import OonaClient
from tests.unit.esper.services.oona.messages import (
    EVENTS,
    READY,
    SCOPE,
    client_of,
    config_of,
    drained,
    event,
    numbers,
    ready,
    run,
)


@pytest.fixture
def server(redis_server):
    return redis_server.start()


def test_everywhere_all_namespaces_are_heard_and_each_is_answered(server, redis_namespace):
    namespaces = [f"{redis_namespace}-{letter}" for letter in "ab"]

    async def life():
        async with (
            client_of(server, namespaces[0], "uid-a") as first,
            client_of(server, namespaces[1], "uid-b") as second,
        ):
            everywhere = OonaClient(config_of(server, redis_namespace), scope=None, everywhere=True)
            try:
                answers = await second.subscribe({READY}, "tolaria")
                await first.publish(event(1, "uid-a"))
                heard = await everywhere.subscribe({EVENTS}, redis_namespace)
                mine = {"uid-a", "uid-b"}
                await second.publish(event(2, "uid-b"))
                found = []
                while len(found) < 2:  # other tests have namespaces in this Redis, too
                    message = await heard.receive()
                    await heard.acknowledge(message)
                    found += [message] if message.scope in mine else []
                assert sorted(message.scope for message in found) == ["uid-a", "uid-b"]
                with pytest.raises(BadInput, match="namespace"):
                    await everywhere.publish(ready(1, "uid-b"))
                await everywhere.publish(ready(1, "uid-b"), namespace=namespaces[1])
                assert numbers(await drained(answers, 1)) == [1]
                kept = [m async for m in everywhere.history({EVENTS}, scope="uid-a")]
                assert numbers(kept) == [1]
                await everywhere.check()
            finally:
                await everywhere.close()

    run(life())
    with pytest.raises(BadInput, match="scope"):
        OonaClient(config_of(server, redis_namespace), scope="uid", everywhere=True)


def test_the_newest_of_each_scope_is_found_received_or_not(server, redis_namespace):
    """More scopes than are asked for at once; one has nothing, and one a last entry of no sense."""
    namespaces = [f"{redis_namespace}-{letter}" for letter in "ab"]
    scopes = [(namespaces[n % 2], f"uid-{n}") for n in range(150)]

    async def life():
        everywhere = OonaClient(config_of(server, redis_namespace), scope=None, everywhere=True)
        try:
            for number, (namespace, scope) in enumerate(scopes):
                for message in (event(1000, scope), event(number, scope)):
                    await everywhere.publish(message, namespace=namespace)
            async with client_of(server, namespaces[1], "uid-3") as receiver:
                heard = await receiver.subscribe({EVENTS}, "g")
                await receiver.publish(event(7, "uid-3"))
                await drained(heard, 1)
            with server.client() as client:
                client.xadd(stream_key(namespaces[0], "uid-4", EVENTS), {"message": "{"})
            asked = [*scopes, (namespaces[0], "nobody")]
            return [message async for message in everywhere.newest(EVENTS, asked)]
        finally:
            await everywhere.close()

    expected = {scope: number for number, (_, scope) in enumerate(scopes)} | {"uid-3": 7}
    del expected["uid-4"]
    assert {message.scope: numbers([message])[0] for message in run(life())} == expected


def test_over_many_streams_as_many_messages_are_read_ahead_as_asked_for(server, redis_namespace):
    """Redis counts each stream by itself."""

    async def life():
        async with client_of(server, redis_namespace, None) as sender:
            await sender.publish(*[ready(n, f"s{n % 4}") for n in range(200)])
            async with client_of(server, redis_namespace, None) as bus:
                heard = await bus.subscribe({READY}, "g", prefetch=8)
                first = await heard.receive()
                names = [entry.name for entry in heard._ready]
                assert len(names) == 7
                assert {key for key, _ in names} == set(heard._group.keys)
                await heard.acknowledge(first)
                rest = await drained(heard, 199)
                assert sorted(numbers([first, *rest])) == list(range(200))

    run(life())


def test_of_snapshots_a_stream_keeps_few(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace) as bus:
            for number in range(50):
                text = str(number) + " " * 5000
                values = ready(number).model_dump() | {"topic": "sessions.status"}
                values["payload"] = {"kernel": text}
                await bus.publish(OonaMessage.model_validate(values))

    run(life())
    assert _length(server, redis_namespace) <= 20


def _length(server, namespace):
    with server.client() as client:
        return client.xlen(stream_key(namespace, SCOPE, "sessions.status"))
