"""A namespace that is deleted with sessions in every state: nothing waits for the operator.

What they have outside of the cluster goes when an operator is there: streams and users of the bus,
and objects at the hub but for those of sessions that are to keep them.
"""

import asyncio
import time

import pytest

from esper.configs import HubConfig
from esper.services.urza.auth import Role
from esper.services.urza.http_objects import HubObjects
from tools.cluster.control_plane import wait_for
from tools.operator_bus import Trainer
from tools.operator_workers import JOBS, SECRETS, SESSIONS, Workers

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster")]
GONE_SECONDS = 60.0
GRACE = {"stop_seconds": 1}
"""For pods to end; half of it is what a namespace waits before it looks at them again."""
STATES = ("waiting", "running", "ended", "dropped", "failed", "suspended", "queued")
RESULT = "results/result.json"


def policy(state):
    found = {
        "dropped": {"deletionPolicy": "Delete"},
        "suspended": {"suspend": True},
        "queued": {"queueName": "batch"},
    }
    return {"runPolicy": found.get(state, {})}


class Outside:
    """What sessions of a namespace have at the hub and on the bus."""

    def __init__(self, world, namespace):
        self._hub = world.hub
        self._namespace = namespace
        self._redis = world.hub.redis.client()

    def streams(self):
        return set(self._redis.scan_iter(f"esper:{self._namespace}:*"))

    def users(self, uids):
        names = "\n".join(line.split()[1] for line in self._redis.acl_list())
        return {uid for uid in uids if uid in names}

    def put(self, uid):
        asyncio.run(self._do(uid, lambda objects: objects.put(RESULT, b"{}")))

    def keeps(self, uid):
        return asyncio.run(self._do(uid, lambda objects: objects.get(RESULT))) is not None

    async def _do(self, uid, work):
        config = HubConfig(url=self._hub.urza.url, token=self._hub.token(Role.ADMIN))
        objects = HubObjects(config, uid)
        try:
            return await work(objects)
        finally:
            await objects.close()


@pytest.mark.parametrize("there", [True, False], ids=["up", "down"])
def test_a_namespace_goes_and_what_its_sessions_had_outside_is_swept(alone, objects, there):
    namespace = objects.namespace
    outside = Outside(alone, namespace)
    with alone.operator(**GRACE) as operator:
        wait_for(lambda: operator.leads, "the operator does not lead")
        uids = {}
        for state in STATES:
            made = objects.create(SESSIONS, alone.session(state, spec=policy(state)))
            uids[state] = made["metadata"]["uid"]
        for state in ("running", "ended", "dropped", "failed"):
            Workers(objects, state).run()
        for state in ("ended", "dropped"):
            Workers(objects, state).succeed()
            objects.wait(state, "True")
        [first, _] = Workers(objects, "failed").pods()
        Workers(objects, "failed").end(first, 78, reason="BadInput", message="no such layer")
        objects.wait("failed", "False")
        issued = [s for s in STATES if objects.get(f"{SECRETS}/{s}-esper") is not None]
        assert {"running", "ended", "dropped", "failed"} <= set(issued)
        for state in issued:
            session = objects.get(f"{SESSIONS}/{state}")
            Trainer(alone.hub.redis.url, namespace, session).stands(epoch=1)
            outside.put(uids[state])
        assert len(outside.streams()) >= len(issued)
        assert len(outside.users(uids.values())) == len(issued)
        if not there:
            operator.kill()
        alone.plane.delete_namespace(namespace)
        began = time.monotonic()
        wait_for(
            lambda: alone.plane.try_kubectl("get", "namespace", namespace).returncode,
            "the namespace stays",
            seconds=GONE_SECONDS,
        )
        assert time.monotonic() - began < GONE_SECONDS
        if there:
            swept(outside, uids, issued)
    if not there:
        assert outside.streams()
        with alone.operator():
            swept(outside, uids, issued)
    assert objects.items(JOBS) == []


def swept(outside, uids, issued):
    """Wait until nothing is left but what is to be kept."""
    wait_for(
        lambda: not outside.users(uids.values()) and not session_streams(outside, uids),
        "streams or users are left",
        seconds=GONE_SECONDS,
    )
    wait_for(lambda: not outside.keeps(uids["dropped"]), "objects are left", seconds=GONE_SECONDS)
    assert all(outside.keeps(uids[state]) for state in issued if state != "dropped")


def session_streams(outside, uids):
    """Streams of these sessions."""
    return {key for key in outside.streams() if any(uid in key for uid in uids.values())}
