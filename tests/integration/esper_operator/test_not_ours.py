"""Objects of others that have a child's name are left as they are, and the session says so."""

import base64
import time

import pytest

from esper_operator.children import names
from tests.integration.esper_operator.test_reports import SEEDS, a_seed
from tools.cluster.control_plane import wait_for
from tools.operator_bus import Trainer
from tools.operator_workers import SECRETS, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
EVENTS = "/api/v1/events"
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


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {
            "app.kubernetes.io/managed-by": "esper-operator",
            "esper.dev/session": "seedy",
            "esper.dev/session-uid": "an-earlier-one",
        },
    ],
    ids=["of-a-user", "of-an-earlier-session"],
)
def test_a_seed_of_anothers_keeps_its_status_and_costs_no_turn_after_turn(
    world, operator, objects, labels
):
    seed = a_seed()
    name = names.seed("seedy", seed["layer"], seed["slot"])
    theirs = {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "Seed",
        "metadata": {"name": name, "labels": labels},
        "spec": {"session": "another", "layer": "layers.9", "slot": 0},
    }
    before = objects.create(SEEDS, theirs)["metadata"]["resourceVersion"]
    made = objects.create(SESSIONS, world.session("seedy"))
    Workers(objects, "seedy").run()
    Trainer(world.hub.redis.url, objects.namespace, made).stands(epoch=1, seeds=[seed])
    wait_for(
        lambda: [e for e in objects.items(EVENTS) if f"Seed/{name}" in e["message"]],
        "nobody says that the Seed is refused",
    )
    time.sleep(2.0)
    written = len(world.changes(objects.namespace))
    time.sleep(3.0)
    assert len(world.changes(objects.namespace)) - written <= 3
    assert objects.get(f"{SEEDS}/{name}")["metadata"]["resourceVersion"] == before
