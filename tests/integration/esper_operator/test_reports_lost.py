"""What a session said is not lost with the operator that heard it."""

import time
from contextlib import ExitStack

import pytest

from esper.configs import OperatorConfig
from esper.contracts.messages import TopicNames
from esper_operator.leading import group_of
from tools.cluster.control_plane import wait_for
from tools.operator_bus import Trainer
from tools.operator_workers import SESSIONS, Workers
from tools.operator_world import GROUP, Objects, install

pytestmark = pytest.mark.xdist_group("cluster")
SEEDS = f"{GROUP}/seeds"
CHECKPOINT = "checkpoints/the-last"


def unheard(world, session):
    """Reports that the operator has not received, or received and not acknowledged."""
    meta = session["metadata"]
    key = f"esper:{meta['namespace']}:{meta['uid']}:{TopicNames.STATUS}"
    with world.hub.redis.client() as redis:
        name = group_of(OperatorConfig(lease_namespace=world.own))
        [group] = [g for g in redis.xinfo_groups(key) if g["name"] == name]
        newest = redis.xinfo_stream(key)["last-generated-id"]
        return group["pending"] + (group["last-delivered-id"] != newest)


def test_the_last_report_is_written_though_who_heard_it_has_died(alone, objects):
    made = objects.create(SESSIONS, alone.session("speaks"))
    trainer = Trainer(alone.hub.redis.url, objects.namespace, made)
    # A lease that outlasts the cut: this operator hears, and can write nothing.
    lease = {"lease_seconds": 600, "renew_seconds": 500.0}
    with alone.plane.proxy() as proxy, alone.operator(through=proxy, **lease) as first:
        wait_for(lambda: first.leads, "the operator does not lead")
        Workers(objects, "speaks").run()
        trainer.stands(epoch=2)
        wait_for(
            lambda: objects.get(f"{SESSIONS}/speaks")["status"].get("epoch") == 2,
            "the epoch does not show",
        )
        proxy.hang()
        seed = {"layer": "blocks.0", "slot": 1, "state": "training", "blueprint": "low-rank"}
        trainer.stands(epoch=10, checkpoint={"name": CHECKPOINT, "epoch": 10}, seeds=[seed])
        wait_for(lambda: not unheard(alone, made), "the report is not heard")
        first.kill()
    alone.plane.kubectl("delete", "lease", "esper-operator", "--namespace", alone.own)
    time.sleep(0.5)
    assert objects.get(f"{SESSIONS}/speaks")["status"]["epoch"] == 2
    with alone.operator() as second:
        wait_for(lambda: second.leads, "the operator does not lead")
        wait_for(
            lambda: objects.get(f"{SESSIONS}/speaks")["status"]["epoch"] == 10,
            "the last report is lost",
        )
        status = objects.get(f"{SESSIONS}/speaks")["status"]
        assert status["checkpoint"]["name"] == CHECKPOINT
        wait_for(lambda: objects.items(SEEDS), "the seed has no object")


def test_operators_of_two_namespaces_take_no_report_from_each_other(control_plane, alone, objects):
    """Both listen to one bus, of which each message goes to one of a group."""
    other = Objects(control_plane, control_plane.create_namespace(f"{objects.namespace}-b"))
    with ExitStack() as stack:
        stack.callback(other.close)
        trainers = []
        for seen in (objects, other):
            own = f"{seen.namespace}-operator"
            install(control_plane, own=own, namespaces=seen.namespace)
            where = {"namespaces": seen.namespace, "lease_namespace": own}
            config = control_plane.kubeconfig("esper-operator", own)
            running = stack.enter_context(alone.operator(kubeconfig=config, **where))
            wait_for(lambda: running.leads, "the operator does not lead")  # noqa: B023
            made = seen.create(SESSIONS, alone.session("speaks"))
            Workers(seen, "speaks").run()
            trainers.append(Trainer(alone.hub.redis.url, seen.namespace, made))
        for epoch in range(1, 6):
            for trainer in trainers:
                trainer.stands(epoch=epoch, checkpoint={"name": f"epoch-{epoch}", "epoch": epoch})
            for seen in (objects, other):
                wait_for(
                    lambda: seen.get(f"{SESSIONS}/speaks")["status"].get("epoch") == epoch,  # noqa: B023
                    f"report {epoch} of {seen.namespace} is not heard",
                )
