import pytest

from tests.integration.processes import Server


@pytest.fixture(scope="session")
def server():
    """Starts commands as processes."""
    serving = Server()
    yield serving
    serving.close()
