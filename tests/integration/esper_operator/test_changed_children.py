"""Children that somebody edits are brought back to what the operator has made of them."""

import base64
import time

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import DEPLOYMENTS, SECRETS, SERVICES, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
SECONDS = 10.0
TAMIYO, SECRET, SERVICE = (
    f"{DEPLOYMENTS}/esper-tamiyo",
    f"{SECRETS}/edited-esper",
    f"{SERVICES}/edited-workers",
)
NONSENSE = base64.b64encode(b"nonsense").decode()


def session_runs(world, objects):
    objects.create(SESSIONS, world.session("edited"))
    Workers(objects, "edited").run()
    for child in (TAMIYO, SECRET, SERVICE):
        wait_for(lambda: objects.get(child), f"{child} is not made")  # noqa: B023


def scaled_to_nothing(objects):
    objects.merge(f"{TAMIYO}/scale", {"spec": {"replicas": 0}})
    return lambda: objects.get(TAMIYO)["spec"]["replicas"] == 1


def overwritten(objects):
    name = sorted(objects.get(SECRET)["data"])[0]
    objects.merge(SECRET, {"data": {name: NONSENSE}})
    return lambda: objects.get(SECRET)["data"][name] != NONSENSE


def removed(objects):
    name = sorted(objects.get(SECRET)["data"])[0]
    objects.merge(SECRET, {"data": {name: None}})
    return lambda: name in objects.get(SECRET)["data"]


def turned_away(objects):
    objects.merge(SERVICE, {"spec": {"selector": {"esper.dev/session": "another"}}})
    return lambda: objects.get(SERVICE)["spec"]["selector"]["esper.dev/session"] == "edited"


@pytest.mark.parametrize("edit", [scaled_to_nothing, overwritten, removed, turned_away])
def test_a_child_that_is_edited_is_brought_back_each_time(world, operator, objects, edit):
    session_runs(world, objects)
    for _ in range(2):
        wait_for(edit(objects), "the edit stays", seconds=SECONDS)
    assert len(Workers(objects, "edited").jobs()) == 1


def test_what_was_edited_while_no_operator_ran_is_brought_back(alone, objects):
    with alone.operator() as first:
        wait_for(lambda: first.leads, "the operator does not lead")
        session_runs(alone, objects)
    mended = [edit(objects) for edit in (scaled_to_nothing, overwritten, turned_away)]
    assert not any(done() for done in mended)
    with alone.operator() as second:
        wait_for(lambda: second.leads, "the operator does not lead")
        wait_for(lambda: all(done() for done in mended), "an edit stays", seconds=SECONDS)


def test_what_others_add_to_a_child_is_theirs_and_costs_next_to_nothing(world, operator, objects):
    session_runs(world, objects)
    time.sleep(2.0)
    before = applies_of_secrets(world, objects.namespace)
    objects.merge(SECRET, {"data": {"own-note": NONSENSE}, "metadata": {"labels": {"team": "a"}}})
    time.sleep(5.0)
    assert applies_of_secrets(world, objects.namespace) - before <= 1
    assert objects.get(SECRET)["data"]["own-note"] == NONSENSE


def applies_of_secrets(world, namespace):
    """How often the operator applied a Secret in a namespace."""
    asked = [(e["objectRef"]["resource"], e["verb"]) for e in world.changes(namespace)]
    return asked.count(("secrets", "patch"))
