"""Demand 1: level-based. Whatever is deleted comes back, wherever the operator is killed."""

import time

import pytest

from tests.integration.esper_operator.test_reports import KERNELS, SEEDS, TARGET, a_seed
from tools.cluster.control_plane import wait_for
from tools.operator_bus import Trainer
from tools.operator_workers import (
    BLUEPRINTS,
    DEPLOYMENTS,
    JOBS,
    SECRETS,
    SERVICES,
    SESSIONS,
    Workers,
    catalogued,
)

pytestmark = pytest.mark.xdist_group("cluster")
CONVERGE_SECONDS = 10.0


def uid_of(found):
    return found["metadata"]["uid"]


@pytest.fixture
def running(world, operator, objects):
    """A session whose two workers run."""
    objects.create(SESSIONS, world.session("level"))
    Workers(objects, "level").run()
    wait_for(
        lambda: objects.condition("level", "WorkersReady").get("status") == "True",
        "the workers are not ready",
    )
    return "level"


@pytest.mark.parametrize(
    "child",
    [
        f"{SERVICES}/level-workers",
        f"{SECRETS}/level-esper",
        f"{SECRETS}/esper-tamiyo",
        f"{DEPLOYMENTS}/esper-tamiyo",
    ],
)
def test_demand_01_a_child_that_is_deleted_is_made_again(running, objects, child):
    before = uid_of(wait_for(lambda: objects.get(child), f"{child} is not made"))
    objects.delete(child)
    began = time.monotonic()
    wait_for(
        lambda: (found := objects.get(child)) and uid_of(found) != before,
        f"{child} is not made again",
        seconds=CONVERGE_SECONDS,
    )
    assert time.monotonic() - began < CONVERGE_SECONDS
    assert len(Workers(objects, running).jobs()) == 1


def made_for_a_kernel(path, item):
    if path == SECRETS:
        return item["metadata"]["name"].endswith(".esper")
    return path != JOBS or role_of(item) == "compile"


@pytest.mark.parametrize("path", [SEEDS, KERNELS, JOBS, SECRETS])
def test_demand_01_what_a_session_grew_is_made_again(world, running, objects, path):
    """A Seed, a CompiledKernel, the Job that compiles it and its Secret."""
    session = objects.get(f"{SESSIONS}/{running}")
    trainer = Trainer(world.hub.redis.url, objects.namespace, session)
    trainer.stands(epoch=1, seeds=[a_seed()])
    objects.create(BLUEPRINTS, catalogued("low-rank"))
    trainer.asks("low-rank", TARGET)

    def grown():
        found = [item for item in objects.items(path) if made_for_a_kernel(path, item)]
        assert len(found) <= 1
        return found[0] if found else None

    wait_for(lambda: [j for j in objects.items(JOBS) if role_of(j) == "compile"], "no compile Job")
    before = wait_for(grown, f"{path} has none")["metadata"]
    objects.delete(f"{path}/{before['name']}")
    after = wait_for(
        lambda: (found := grown()) and uid_of(found) != before["uid"] and found["metadata"],
        f"{path} is not made again",
        seconds=CONVERGE_SECONDS,
    )
    assert after["name"] == before["name"]


def role_of(found):
    return found["metadata"]["labels"]["esper.dev/role"]


def test_demand_01_a_job_that_is_deleted_is_made_again_and_pods_with_it(running, objects):
    workers = Workers(objects, running)
    [job] = workers.jobs()
    objects.delete(f"{JOBS}/{job['metadata']['name']}")
    wait_for(
        lambda: (jobs := workers.jobs()) and uid_of(jobs[-1]) != uid_of(job),
        "the Job is not made again",
        seconds=CONVERGE_SECONDS,
    )
    workers.appear()
    status = objects.get(f"{SESSIONS}/{running}")["status"]
    assert status["failures"] == []
    assert len([j for j in workers.jobs() if "deletionTimestamp" not in j["metadata"]]) == 1


def test_demand_01_what_was_deleted_while_no_operator_ran_is_made_within_ten_seconds(
    alone, objects
):
    objects.create(SESSIONS, alone.session("level"))
    children = (f"{SERVICES}/level-workers", f"{SECRETS}/level-esper")
    with alone.operator() as first:
        wait_for(lambda: first.leads, "the operator does not lead")
        Workers(objects, "level").run()
        first.kill()
    [job] = Workers(objects, "level").jobs()
    for child in (*children, f"{JOBS}/{job['metadata']['name']}"):
        objects.delete(child)
    assert all(objects.get(child) is None for child in children)
    with alone.operator() as second:
        wait_for(lambda: second.leads, "the operator does not lead")
        began = time.monotonic()
        wait_for(
            lambda: (
                all(objects.get(child) for child in children)
                and [j for j in Workers(objects, "level").jobs() if uid_of(j) != uid_of(job)]
            ),
            "not all is made again",
            seconds=CONVERGE_SECONDS,
        )
        assert time.monotonic() - began < CONVERGE_SECONDS
