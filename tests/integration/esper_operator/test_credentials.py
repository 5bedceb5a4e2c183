"""Credentials of a session are renewed in time, while its workers go on."""

import base64
import sqlite3

import pytest

from esper_operator.times import seconds_of
from esper_operator.views import RENEW_ANNOTATION
from tools.cluster.control_plane import wait_for
from tools.operator_workers import SECRETS, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
DAY = 86_400.0
PAST = "2020-01-01T00:00:00Z"


def secret(objects):
    return objects.get(f"{SECRETS}/lasts-esper")


def renewal(objects):
    """When the credentials are to be renewed, in seconds since the epoch."""
    return seconds_of(secret(objects)["metadata"]["annotations"][RENEW_ANNOTATION])


def test_credentials_that_are_due_are_renewed_and_no_worker_is_started_anew(
    world, operator, objects
):
    made = objects.create(SESSIONS, world.session("lasts"))
    workers = Workers(objects, "lasts")
    before = workers.run()
    created = seconds_of(made["metadata"]["creationTimestamp"])
    assert 59 * DAY < renewal(objects) - created < 61 * DAY
    token = secret(objects)["data"]["hub-token"]
    assert base64.b64decode(token).isascii()
    due = {"metadata": {"annotations": {RENEW_ANNOTATION: PAST}}, "data": {"hub-token": None}}
    objects.merge(f"{SECRETS}/lasts-esper", due)
    wait_for(lambda: renewal(objects) > created + 59 * DAY, "they are not renewed")
    # Not yet half used, they are what they were.
    assert secret(objects)["data"]["hub-token"] == token
    assert [pod["metadata"]["uid"] for pod in workers.pods()] == [
        pod["metadata"]["uid"] for pod in before
    ]
    assert objects.condition("lasts")["reason"] == "Running"
    workers.succeed()
    objects.wait("lasts", "True")


def removes(world, uid):
    """Whether the hub removes what that session keeps, once it is gone."""
    hub = sqlite3.connect(f"file:{world.hub.folder.resolve()}/hub.sqlite?mode=ro", uri=True)
    try:
        query = "SELECT removes FROM session_credentials WHERE uid = ?"
        return bool(hub.execute(query, (uid,)).fetchone()[0])
    finally:
        hub.close()


def test_the_hub_learns_of_another_deletion_policy_also_of_a_session_that_has_ended(
    world, operator, objects
):
    spec = {"runPolicy": {"deletionPolicy": "Delete"}}
    uid = objects.create(SESSIONS, world.session("keeps", spec=spec))["metadata"]["uid"]
    workers = Workers(objects, "keeps")
    before = workers.run()
    assert removes(world, uid)

    def patched(policy):
        objects.merge(f"{SESSIONS}/keeps", {"spec": {"runPolicy": {"deletionPolicy": policy}}})
        wait_for(lambda: removes(world, uid) is (policy == "Delete"), "the hub does not learn it")

    patched("Retain")
    assert [pod["metadata"]["uid"] for pod in workers.pods()] == [
        pod["metadata"]["uid"] for pod in before
    ]
    patched("Delete")
    workers.succeed()
    objects.wait("keeps", "True")
    patched("Retain")
