"""Demand 1: the operator is killed at changes of a life; `make chaos-operator` takes them all."""

import pytest

from tools.chaos_operator import CONVERGE_SECONDS, Chaos, points_of

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.slow]
POINTS = 10


def test_demand_01_an_operator_killed_at_any_change_is_made_up_for(alone):
    chaos = Chaos(alone)
    whole = chaos.live(None)
    assert whole.changes > POINTS
    killed = 0
    for point in points_of(whole.changes, POINTS):
        life = chaos.live(point)
        # Two statuses that become one make a life a change or two shorter.
        assert life.killed_at is not None or life.changes < point
        killed += life.killed_at is not None
        assert life.slowest_seconds < CONVERGE_SECONDS
    assert killed >= POINTS - 2
