"""The comparison of the store with the API server: what a watch has missed, and that it is dead."""

import asyncio
from pathlib import Path

import pytest

from esper_operator.api import ClusterApi, connection
from esper_operator.kinds import JOB, SESSION
from esper_operator.resync import GRACE_SECONDS, Resync
from esper_operator.scope import Scope
from esper_operator.store import Store
from esper_operator.work import Key
from tools.operator_workers import SESSIONS

pytestmark = pytest.mark.xdist_group("cluster")


class Compared:
    """A store that nothing feeds but this test, and a clock that it sets."""

    def __init__(self, world, objects):
        self.world, self.objects = world, objects
        self.store, self.enqueued, self.now = Store(), [], 1000.0

    async def run(self, body):
        async with ClusterApi(await connection(Path(self.world.plane.admin))) as api:
            resync = Resync(
                api,
                self.store,
                self.enqueued.extend,
                scope=Scope(served=(self.objects.namespace,)),
                every=0.1,
                clock=lambda: self.now,
            )
            await body(resync, api)

    def feed(self, found):
        self.store.put(SESSION, found)


@pytest.fixture
def compared(alone, objects):
    return Compared(alone, objects)


def test_a_watch_that_does_not_tell_of_what_is_there_is_dead(world, objects, compared):
    made = objects.create(SESSIONS, world.session("unseen"))

    async def body(resync, api):
        assert await resync._compared(SESSION) is False
        assert resync.complaint() is None
        compared.now += GRACE_SECONDS + 1
        # Changes in between are no sign of life.
        objects.merge(f"{SESSIONS}/unseen", {"metadata": {"labels": {"a": "b"}}})
        assert await resync._compared(SESSION) is False
        assert "TrainingSession" in resync.complaint()
        compared.feed(objects.get(f"{SESSIONS}/unseen"))
        assert await resync._compared(SESSION) is True
        assert resync.complaint() is None

    asyncio.run(compared.run(body))
    assert made["metadata"]["name"] == "unseen"


def test_what_is_gone_is_dropped_and_looked_at(world, objects, compared):
    made = objects.create(SESSIONS, world.session("gone"))
    compared.feed(made)

    async def body(resync, api):
        assert await resync._compared(SESSION) is True
        objects.delete(f"{SESSIONS}/gone")
        assert await resync._compared(SESSION) is True

    asyncio.run(compared.run(body))
    key = Key("TrainingSession", objects.namespace, "gone")
    assert key in compared.enqueued
    assert compared.store.session(objects.namespace, "gone") is None


def test_a_quiet_watch_agrees_for_ever(objects, compared):
    async def body(resync, api):
        running = asyncio.create_task(resync.run())
        for _ in range(3):
            compared.now += 400.0
            await asyncio.sleep(0.5)
        assert resync.complaint() is None
        assert resync.ages()[JOB.name] < 400.0
        running.cancel()

    asyncio.run(compared.run(body))
