"""Demand 2: whatever child the API server refuses, the session says which and why."""

import pytest

from esper.contracts.blueprints import KernelTarget
from tools.cluster.control_plane import wait_for
from tools.operator_bus import Trainer
from tools.operator_workers import SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
QUOTAS = "/api/v1/resourcequotas"
EVENTS = "/api/v1/events"
TARGET = KernelTarget.model_validate(
    {
        "layer": {"kind": "Linear", "inputs": 8, "outputs": 4},
        "inputShape": [8],
        "outputShape": [4],
    }
)


def allow_none(objects, *resources):
    """A quota of none of each, once the API server keeps it."""
    hard = {f"count/{resource}": "0" for resource in resources}
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
    objects.create(QUOTAS, {**body, "spec": {"hard": hard}})
    wait_for(
        lambda: objects.get(f"{QUOTAS}/none")["status"].get("used", {}).keys() == hard.keys(),
        "the quota is not counted",
        seconds=60.0,
    )


def says(objects, session, kind, *words):
    def found():
        condition = objects.condition(session, kind)
        return all(word in condition.get("message", "") for word in words) and condition

    return wait_for(found, f"{kind} of {session} does not say {words}")


def test_demand_02_no_job_is_made_without_its_service_and_a_refused_controller_shows(
    world, operator, objects
):
    allow_none(objects, "services", "deployments.apps")
    objects.create(SESSIONS, world.session("refused"))
    workers = says(objects, "refused", "WorkersReady", "Service/refused-workers", "quota")
    assert (workers["status"], workers["reason"]) == ("False", "ChildRefused")
    controller = says(objects, "refused", "ControllerReady", "Deployment esper-tamiyo", "quota")
    assert (controller["status"], controller["reason"]) == ("False", "ControllerFailed")
    assert Workers(objects, "refused").jobs() == []


def test_demand_02_kernels_and_seeds_that_are_refused_show_while_the_session_runs(
    world, operator, objects
):
    allow_none(objects, "compiledkernels.esper.dev", "seeds.esper.dev")
    made = objects.create(SESSIONS, world.session("grows"))
    Workers(objects, "grows").run()
    trainer = Trainer(world.hub.redis.url, objects.namespace, made)
    kernel = trainer.asks("low-rank", TARGET)
    seed = {"layer": "blocks.0", "slot": 1, "state": "training", "blueprint": "low-rank"}
    trainer.stands(epoch=1, seeds=[seed])
    summary = says(objects, "grows", "Succeeded", f"CompiledKernel/{kernel}", "Seed/grows-")
    assert (summary["status"], summary["reason"]) == ("Unknown", "Running")
    told = [e for e in objects.items(EVENTS) if e["reason"] == "ChildRefused"]
    assert {e["message"].partition("/")[0] for e in told} == {"CompiledKernel", "Seed"}
