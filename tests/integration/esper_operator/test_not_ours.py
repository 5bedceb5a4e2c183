"""Objects of others that have a child's name are left as they are, and the session says so."""

import base64

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import SECRETS, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
DATA = {"mine": base64.b64encode(b"a password").decode()}


def user_secret(name, **metadata):
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, **metadata},
        "data": DATA,
    }


def said(objects, name):
    condition = objects.condition(name, "WorkersReady") or {}
    return condition.get("reason"), condition.get("message", "")


def test_a_users_secret_of_a_childs_name_is_neither_taken_over_nor_deleted(
    world, operator, objects
):
    before = objects.create(SECRETS, user_secret("mine-esper"))
    objects.create(SESSIONS, world.session("mine"))
    wait_for(lambda: said(objects, "mine")[0] == "ChildRefused", "it does not say so")
    assert "Secret/mine-esper" in said(objects, "mine")[1]
    assert "exists and is not ours" in said(objects, "mine")[1]
    there = objects.get(f"{SECRETS}/mine-esper")
    assert there["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    objects.delete(f"{SESSIONS}/mine")
    wait_for(lambda: objects.get(f"{SESSIONS}/mine") is None, "the session stays")
    assert objects.get(f"{SECRETS}/mine-esper")["data"] == DATA


def test_once_the_name_is_free_the_session_goes_on(world, operator, objects):
    objects.create(SECRETS, user_secret("frees-esper"))
    objects.create(SESSIONS, world.session("frees"))
    wait_for(lambda: said(objects, "frees")[0] == "ChildRefused", "it does not say so")
    objects.delete(f"{SECRETS}/frees-esper")
    Workers(objects, "frees").run()
    assert objects.get(f"{SECRETS}/frees-esper")["data"].keys() > {"hub-token"}


def test_what_a_session_of_the_same_name_has_left_is_waited_for(world, operator, objects):
    labels = {
        "app.kubernetes.io/managed-by": "esper-operator",
        "esper.dev/session": "again",
        "esper.dev/session-uid": "an-earlier-one",
    }
    objects.create(SECRETS, user_secret("again-esper", labels=labels))
    objects.create(SESSIONS, world.session("again"))
    wait_for(lambda: said(objects, "again")[0] == "ChildRefused", "it does not say so")
    assert objects.get(f"{SECRETS}/again-esper")["data"] == DATA
    objects.delete(f"{SECRETS}/again-esper")
    Workers(objects, "again").run()
