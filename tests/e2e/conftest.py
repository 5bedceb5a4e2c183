"""A cluster from source, with images, for tests that need root and minutes.

`make test` leaves them out. `pytest tests/e2e` starts a cluster of its own in a temporary folder,
beside any other; with `ESPER_CLUSTER_STATE` set it takes that one and leaves it up.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.clusters import Pods, made_namespace, module
from tools.cluster.containers.layout import STATE, layout
from tools.cluster.containers.source import SourceCluster
from tools.images.recipes import RECIPES


def pytest_collection_modifyitems(items):
    """Those of the cluster itself come first: while they wait, images are loaded."""
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)
    items.sort(key=lambda item: item.path.name != "test_cluster.py")


@pytest.fixture(scope="session", autouse=True)
def ended_by_a_signal():
    """SIGTERM is as Ctrl-C: fixtures end what they have begun, the cluster at last."""

    def interrupt(number, _frame):
        signal.signal(number, signal.SIG_IGN)  # a second one would break their ends off
        raise KeyboardInterrupt(signal.strsignal(number))

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The cluster, with all of Esper's images."""
    given = os.environ.get(STATE)
    state = layout().state if given else tmp_path_factory.mktemp("cluster") / "c"
    try:
        module("tools.cluster.containers", "up", "--way=source", state=state)
        yield SourceCluster(layout(state))
    finally:
        if not given:
            module("tools.cluster.containers", "down", state=state)


@pytest.fixture(scope="session")
def redis(cluster):
    """The image that is loaded in seconds; the loading of all others begins."""
    module("tools.images", "redis", state=cluster.layout.state)
    return RECIPES["redis"].image()


@pytest.fixture(scope="session")
def loading(cluster, redis):
    """`make images`, under way beside whatever is tested meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(module, "tools.images", state=cluster.layout.state)


@pytest.fixture(scope="session")
def images(loading):
    """What `make images` said when it built and loaded all of them."""
    return loading.result()


@pytest.fixture(scope="session")
def install(cluster, images):
    """`make install`, with values; returns what it said."""

    def installed(*values):
        words = [word for value in values for word in ("--set", value)]
        return module("tools.install", *words, state=cluster.layout.state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(cluster.layout.admin))
        yield installed


@pytest.fixture(scope="session")
def release(install):
    """The chart as `make install` leaves it; what that said."""
    return install()


@pytest.fixture
def namespace(cluster):
    """A namespace of the test's own."""
    with made_namespace(cluster) as name:
        yield name


@pytest.fixture
def pods(cluster, namespace):
    return Pods(cluster, namespace)
