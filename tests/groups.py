"""What the tests of an xdist group share, such as servers, ends with the last of them.

Tests of one group run on one worker, one after the other. What they share and nobody asks any more
would go on taking time from the tests that follow, and a further group has its own.
"""

from functools import partial

import pytest


@pytest.fixture(scope="session")
def group():
    """What depends on it ends with the group, although its scope is the session."""


class Groups:
    """Ends what a group shares before a test of another."""

    def __init__(self):
        self._end = None

    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.argname == group.__name__:
            # `finish` is internal to pytest, which offers no other way to end a fixture before its
            # scope does; pyproject.toml holds pytest below 9.2, with which this has been tried.
            self._end = partial(fixturedef.finish, request)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item, nextitem):
        if self._end and nextitem is not None and group_of(nextitem) != group_of(item):
            end, self._end = self._end, None
            end()


def group_of(item):
    """The group by which xdist keeps a test with others; none where it does not."""
    marker = item.get_closest_marker("xdist_group")
    name = f"@{marker.args[0]}" if marker else ""
    return name if item.nodeid.endswith(name) else ""
