"""Demand 1: the operator is killed at changes of a life; `make chaos-operator` takes them all."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tools.chaos_operator import CONVERGE_SECONDS, LIVES_AT_ONCE, Chaos, points_of

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.slow]
POINTS = 10


def test_demand_01_an_operator_killed_at_any_change_is_made_up_for(alone):
    chaos = Chaos(alone)
    whole = chaos.live()
    assert whole.changes > POINTS
    points = points_of(whole.changes, POINTS)
    # Of a life's points none is right after another: what was lost is made up for in between.
    shares = [points[first::LIVES_AT_ONCE] for first in range(LIVES_AT_ONCE)]
    with ThreadPoolExecutor(LIVES_AT_ONCE) as at_once:
        lives = list(at_once.map(lambda share: chaos.live(*share), shares))
    assert max(life.slowest_seconds for life in lives) < CONVERGE_SECONDS
    for share, life in zip(shares, lives, strict=True):
        assert len(life.killed_at) == sum(point <= life.changes for point in share)
    # Two statuses that become one make a life a change or two shorter.
    assert sum(len(life.killed_at) for life in lives) >= POINTS - 2
