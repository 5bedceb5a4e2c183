"""A real control plane for tests, a node that runs pods as processes, a namespace a test.

Tests that use them are of the group `cluster`, so that one worker has them:
``pytestmark = pytest.mark.xdist_group("cluster")``. A test that kills, freezes or restarts a part
asks for a `private_…` one, and leaves all that it has touched at work.
"""

import uuid
from pathlib import Path

import pytest

from tools.cluster.control_plane import ControlPlane
from tools.cluster.kubelet import ProcessKubelet

CRDS = Path(__file__).parents[1] / "crds"
NODE_GRACE_SECONDS = 5
UNTHROTTLED = ("--kube-api-qps=1000", "--kube-api-burst=1000")
"""The controllers' own limit, 20 requests a second, would have namespaces queue for their end."""


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory):
    """A control plane that all tests of the group share; what it is asked is audited."""
    folder = tmp_path_factory.mktemp("control-plane")
    with ControlPlane(folder, audit=True, manager_arguments=UNTHROTTLED) as running:
        yield running


@pytest.fixture(scope="session")
def shared_kubelet(control_plane, tmp_path_factory):
    """The one node of `control_plane`, started by whoever needs it first.

    Its crash loops wait for a tenth of a kubelet's time.
    """
    folder = tmp_path_factory.mktemp("kubelet")
    own = tmp_path_factory.getbasetemp()
    node = ProcessKubelet(folder, control_plane, own=[own], backoff_seconds=1)
    yield node
    node.stop()


@pytest.fixture
def kubelet(shared_kubelet):
    """The node, at work."""
    return shared_kubelet.start()


@pytest.fixture
def no_kubelet(shared_kubelet):
    """No node: pods stay pending, also after a test that had one."""
    shared_kubelet.stop()


@pytest.fixture
def lost_node(control_plane, no_kubelet):
    """The name of a node that does not answer."""
    name = f"lost-{uuid.uuid4().hex[:8]}"
    with control_plane.client() as client:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        client.post("/api/v1/nodes", json=node).raise_for_status()
        yield name
        client.delete(f"/api/v1/nodes/{name}")


@pytest.fixture(scope="module")
def private_control_plane(tmp_path_factory):
    """A control plane of those that break it; a node is missed there after a few seconds."""
    with ControlPlane(
        tmp_path_factory.mktemp("control-plane"), audit=True, node_grace_seconds=NODE_GRACE_SECONDS
    ) as running:
        yield running


@pytest.fixture
def private_kubelet(private_control_plane, tmp_path):
    folder = tmp_path / "kubelet"
    with ProcessKubelet(folder, private_control_plane, own=[tmp_path], backoff_seconds=1) as node:
        yield node


def _namespace(plane):
    name = plane.create_namespace(f"test-{uuid.uuid4().hex[:12]}")
    yield name
    if plane.api.running:
        plane.delete_namespace(name)


@pytest.fixture
def namespace(control_plane):
    """A namespace that no other test uses; its end is asked for afterwards."""
    yield from _namespace(control_plane)


@pytest.fixture
def private_namespace(private_control_plane):
    yield from _namespace(private_control_plane)


@pytest.fixture(scope="session")
def esper_control_plane(control_plane):
    """`control_plane` with the definitions of Esper's resources."""
    control_plane.install(CRDS)
    return control_plane
