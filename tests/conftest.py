"""What all tests share."""

import gc
import os

import pytest
from hypothesis import settings

from tests.cluster import (  # noqa: F401
    control_plane,
    esper_control_plane,
    kubelet,
    lost_node,
    namespace,
    no_kubelet,
    private_control_plane,
    private_kubelet,
    private_namespace,
    shared_kubelet,
)
from tests.servers import (  # noqa: F401
    any_redis,
    postgres_server,
    postgres_url,
    private_postgres,
    private_redis,
    private_s3,
    redis_8_server,
    redis_namespace,
    redis_server,
    s3_bucket,
    s3_server,
)

# A change is judged by the same examples wherever it is tested; EXPLORE_TESTS=1 draws anew.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("default" if os.environ.get("EXPLORE_TESTS") else "repeatable")


def pytest_collection_finish(session):
    # xdist tells groups by the ends of the tests' names; unheard, each worker would start servers
    # that one is to start for all.
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and grouped:
        assert all("@" in item.nodeid for item in grouped), "xdist does not keep groups together"
    # Of the modules and the tests, which stay to the end, no collection has to look for garbage.
    gc.collect()
    gc.freeze()


class Freezing:
    """Between modules, once in many tests, what is there is put out of the collector's sight.

    Most of it was imported by a test and stays. To look through it takes a second, which would be
    spent again and again, most by tests and benchmarks that collect garbage themselves.
    """

    TESTS = 200

    def __init__(self):
        self.tests = 0

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item, nextitem):
        self.tests += 1
        if self.tests >= self.TESTS and nextitem is not None and nextitem.path != item.path:
            self.tests = 0
            gc.collect()
            gc.freeze()


def pytest_configure(config):
    config.pluginmanager.register(Freezing())
