"""A node that is lost with a worker on it: nobody can end the pod, and the session goes on."""

import pytest

from esper_operator.decisions.lost import MARGIN_SECONDS
from tools.cluster.control_plane import wait_for
from tools.operator_workers import PODS, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")


def test_a_pod_of_a_lost_node_is_given_up_and_another_attempt_goes_on(
    world, operator, objects, lost_node
):
    spec = {"workers": {"replicas": 2}, "runPolicy": {"backoffLimit": 0}}
    objects.create(SESSIONS, world.session("cut", spec=spec))
    workers = Workers(objects, "cut")
    stays, lost = workers.appear()
    workers.lose(lost, lost_node)
    path = f"{PODS}/{lost['metadata']['name']}"
    # The Job waits for it: it would never be replaced.
    wait_for(lambda: objects.condition("cut")["reason"] == "Interrupted", "its loss does not show")
    assert objects.get(path)["metadata"]["deletionGracePeriodSeconds"] == 1
    wait_for(lambda: objects.get(path) is None, "it stays", seconds=MARGIN_SECONDS + 20)
    again = workers.run()
    assert {pod["metadata"]["labels"]["esper.dev/attempt"] for pod in again} == {"2"}
    assert stays["metadata"]["name"] not in {pod["metadata"]["name"] for pod in again}
    wait_for(lambda: objects.condition("cut")["reason"] == "Running", "it does not go on")
    found = objects.get(f"{SESSIONS}/cut")["status"]
    assert (found["attempt"], found["disruptions"], found["failedAttempts"]) == (2, 1, 0)
    assert len(workers.jobs()) == 1
