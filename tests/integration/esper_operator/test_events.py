"""What `kubectl describe` tells of a session: each turn of its life once."""

from collections import Counter

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_bus import Trainer
from tools.operator_workers import SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
EVENTS = "/api/v1/events"
SEED = {"layer": "blocks.0", "slot": 1, "state": "fossilized", "blueprint": "low-rank"}


def told(objects, session):
    """How often each reason was told of a session."""
    return Counter(
        event["reason"]
        for event in objects.items(EVENTS)
        if event["involvedObject"]["kind"] == "TrainingSession"
        and event["involvedObject"]["name"] == session
    )


def suspend(objects, value):
    objects.merge(f"{SESSIONS}/story", {"spec": {"runPolicy": {"suspend": value}}})


def test_a_life_is_told_each_turn_once(world, operator, objects):
    made = objects.create(SESSIONS, world.session("story"))
    workers = Workers(objects, "story")
    workers.appear()
    assert told(objects, "story") == {}
    workers.run()
    wait_for(lambda: told(objects, "story") == {"Running": 1}, "that it runs is not told")
    suspend(objects, True)
    wait_for(lambda: told(objects, "story")["Suspended"], "its suspension is not told")
    wait_for(lambda: not workers.pods(), "pods stay")
    suspend(objects, False)
    workers.run()
    wait_for(lambda: told(objects, "story")["Running"] == 2, "that it goes on is not told")
    trainer = Trainer(world.hub.redis.url, objects.namespace, made)
    trainer.stands(attempt=2, epoch=3, seed_counts={"fossilized": 1}, seeds=[SEED])
    wait_for(lambda: told(objects, "story")["SeedFossilized"], "the fossil is not told")
    workers.succeed()
    objects.wait("story", "True")
    once = ("Suspended", "Resumed", "SeedFossilized", "Completed")
    whole = {"Running": 2, **dict.fromkeys(once, 1)}
    wait_for(lambda: told(objects, "story") == whole, f"{told(objects, 'story')}")
    described = world.plane.kubectl("describe", "ts", "story", "-n", objects.namespace)
    assert "attempt 2: Job " in described
    assert "epoch 3: blocks.0 slot 1 (low-rank); 1 fossilized in all" in described


def test_an_end_at_the_first_visit_is_told(world, operator, objects):
    template = {"extra": {"hostNetwork": True}}
    spec = {"workers": {"replicas": 1, "podTemplate": template}}
    objects.create(SESSIONS, world.session("refused", spec=spec))
    objects.wait("refused", "False")
    wait_for(lambda: told(objects, "refused") == {"InvalidSpec": 1}, "the end is not told")
