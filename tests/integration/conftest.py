import pytest

from tests.integration.processes import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts commands as processes."""
    serving = Server(tmp_path_factory.mktemp("streams"))
    yield serving
    serving.close()
