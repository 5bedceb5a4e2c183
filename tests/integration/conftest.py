import pytest

from tests.integration.processes import Server
from tools.stack import Stack

FAST = {
    "tezzeret": {"poll_seconds": 0.2, "lease_seconds": 5},
    "redis": {"discovery_seconds": 0.1},
    "tolaria": {"republish_seconds": 1, "kernel_poll_seconds": 0.2},
}


@pytest.fixture(scope="session")
def server():
    """Starts commands as processes."""
    serving = Server()
    yield serving
    serving.close()


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """Every service as a process; tests that use it are of the group `services`, on one worker."""
    with Stack(tmp_path_factory.mktemp("stack"), workers=1, settings=FAST) as running:
        yield running
