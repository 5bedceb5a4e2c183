"""The operator as a process, between a real API server, a real hub and a real bus.

One of each serves all tests of the group; who kills or cuts something has an operator of its own.
Pods have no node: a test that needs them to run says by `Workers` what a kubelet would.
"""

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_world import Objects, OperatorWorld


@pytest.fixture(autouse=True)
def nodes(request):
    """Pods have a node in tests that ask for the kubelet, and in no other, whatever ran before."""
    if "kubelet" not in request.fixturenames:
        request.getfixturevalue("no_kubelet")


@pytest.fixture(scope="session")
def world(control_plane, tmp_path_factory):
    with OperatorWorld(tmp_path_factory.mktemp("world"), control_plane) as made:
        yield made


@pytest.fixture(scope="session")
def shared_operator(world):
    """One operator for all tests that leave it alone; started by whoever needs it first."""
    shared = world.operator()
    yield shared
    shared.stop()


@pytest.fixture
def operator(shared_operator):
    """An operator that leads."""
    if not shared_operator.running:
        shared_operator.start()
    wait_for(lambda: shared_operator.leads, "the operator does not lead")
    return shared_operator


@pytest.fixture
def alone(world, shared_operator):
    """The world without any operator, for a test that has its own."""
    shared_operator.stop()
    return world


@pytest.fixture
def patient_operator(alone):
    """One that keeps its lease on a machine that trains as fast as it can."""
    with alone.operator(lease_seconds=60, renew_seconds=45, lease_request_seconds=10) as patient:
        wait_for(lambda: patient.leads, "the operator does not lead", seconds=120)
        yield patient


@pytest.fixture
def objects(control_plane, namespace):
    seen = Objects(control_plane, namespace)
    yield seen
    seen.close()
