"""A cluster from source, with images, for tests that need root and minutes.

`make test` leaves them out. `pytest tests/e2e` starts a cluster of its own in a temporary folder,
beside any other; with `ESPER_CLUSTER_STATE` set it takes that one and leaves it up.
"""

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.clusters import Pods, made_namespace, module
from tests.e2e.sessions import CHAOS, EXAMPLE
from tests.readme import checkout, play
from tools import chaos_cluster
from tools.cluster.containers.layout import STATE, layout
from tools.cluster.containers.source import SourceCluster
from tools.images.recipes import RECIPES

BESIDE = {
    "campaign": ("test_cluster.py", "test_images.py"),
    "demonstration": ("test_isolation.py",),
}
"""What is under way beside the tests of these files, and of those that follow them until it is
waited for: none needs or touches what it does."""
ORDER = (
    "test_cluster_down.py",  # it looks at the whole machine, where nothing else is begun yet
    *(*BESIDE["campaign"], "test_chaos.py", "test_chart.py"),
    "test_gpu.py",  # its taint would keep the demonstration's pods waiting
    *(*BESIDE["demonstration"], "test_demo.py"),
)


def pytest_itemcollected(item):
    if "/e2e/" in str(item.path):
        item.add_marker(pytest.mark.e2e)


@pytest.hookimpl(trylast=True)  # once those are gone that were not chosen
def pytest_collection_modifyitems(items):
    """In an order in which long ones, where somebody asks for them, are under way beside others."""
    for fixture, files in BESIDE.items():
        if any(fixture in item.fixturenames for item in items):
            for item in items:
                if item.path.name in files and "loading" in item.fixturenames:
                    item.fixturenames.append(fixture)
    places = {name: place for place, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


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
def beside():
    """What happens one after the other beside whatever is tested meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, beside):
    """The cluster. It goes once nothing is under way in it any more, and nothing new begins."""
    given = os.environ.get(STATE)
    state = layout().state if given else tmp_path_factory.mktemp("cluster") / "c"
    try:
        module("tools.cluster.containers", "up", "--way=source", state=state)
        yield SourceCluster(layout(state))
    finally:
        try:
            beside.shutdown(cancel_futures=True)
        finally:
            if not given:
                module("tools.cluster.containers", "down", state=state)


@pytest.fixture(scope="session")
def redis(cluster):
    """The image that is loaded in seconds, for tests that can't wait for all others."""
    module("tools.images", "redis", state=cluster.layout.state)
    return RECIPES["redis"].image()


@pytest.fixture(scope="session")
def loading(cluster, redis, beside):
    """`make images`, under way."""
    return beside.submit(module, "tools.images", state=cluster.layout.state)


@pytest.fixture(scope="session")
def images(loading):
    """What `make images` said when it built and loaded all of them."""
    return loading.result()


@pytest.fixture(scope="session")
def install(cluster, loading):
    """`make install`, with values; returns what it said."""

    def installed(*values):
        loading.result()
        words = [word for value in values for word in ("--set", value)]
        return module("tools.install", *words, state=cluster.layout.state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(cluster.layout.admin))
        yield installed


@pytest.fixture(scope="session")
def installing(install, beside):
    """The chart as `make install` leaves it, under way."""
    return beside.submit(install)


@pytest.fixture(scope="session")
def release(installing):
    """The chart as `make install` leaves it; what that said."""
    return installing.result()


@pytest.fixture(scope="session")
def campaign(cluster, installing, beside, tmp_path_factory):
    """A few faults of `make chaos-cluster`, under way: its outcome, with what it said."""

    def run():
        installing.result()
        said = []
        document = chaos_cluster.prepared(chaos_cluster.EXAMPLE)
        folder = tmp_path_factory.mktemp("chaos")
        return chaos_cluster.run(cluster, document, folder, CHAOS, said.append), said

    return beside.submit(run)


@pytest.fixture(scope="session")
def demonstration(cluster, release, beside, tmp_path_factory):
    """`make cluster-demo` in a reader's copy, under way: what it prints, and the copy."""

    def run():
        folder = checkout(tmp_path_factory.mktemp("demo") / "esper")
        # Other tests' sessions have had the same kernels compiled: they are made anew all the same.
        manifest = shutil.copy(EXAMPLE, folder.parent / "session.yaml")
        given = {STATE: str(cluster.layout.state), "ARGUMENTS": f"--session={manifest}"}
        (said,) = play("On a cluster", folder, **given).values()
        return said, folder

    return beside.submit(run)


@pytest.fixture
def namespace(cluster):
    """A namespace of the test's own."""
    with made_namespace(cluster) as name:
        yield name


@pytest.fixture
def pods(cluster, namespace):
    return Pods(cluster, namespace)
