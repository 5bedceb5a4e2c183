"""What a session says on the bus shows in its status and in its seeds; what it asks for is made."""

from datetime import UTC, datetime, timedelta

import pytest

from esper.contracts.blueprints import KernelTarget
from tools.cluster.control_plane import wait_for
from tools.operator_bus import Trainer
from tools.operator_workers import BLUEPRINTS, JOBS, SESSIONS, Workers, catalogued
from tools.operator_world import GROUP

pytestmark = pytest.mark.xdist_group("cluster")
SEEDS, KERNELS = f"{GROUP}/seeds", f"{GROUP}/compiledkernels"
TARGET = KernelTarget.model_validate(
    {
        "layer": {"kind": "Linear", "inputs": 8, "outputs": 4},
        "inputShape": [8],
        "outputShape": [4],
    }
)


def a_seed(**fields):
    return {"layer": "blocks.0", "slot": 1, "state": "training", "blueprint": "low-rank", **fields}


@pytest.fixture
def trainer(world, operator, objects):
    """The trainer of a session that runs."""
    made = objects.create(SESSIONS, world.session("speaks"))
    Workers(objects, "speaks").run()
    return Trainer(world.hub.redis.url, objects.namespace, made)


def uid_of(found):
    return found["metadata"]["uid"]


def status(objects):
    return objects.get(f"{SESSIONS}/speaks")["status"]


def test_a_snapshot_shows_in_the_status_and_its_seeds_as_objects(trainer, objects):
    trainer.stands(epoch=3, parameters=120, seeds=[a_seed(health_percent=80)])
    wait_for(lambda: status(objects)["epoch"] == 3, "the epoch does not show")
    assert status(objects)["parameters"] == 120
    [seed] = wait_for(lambda: objects.items(SEEDS), "the seed has no object")
    assert seed["spec"] == {"session": "speaks", "layer": "blocks.0", "slot": 1}
    assert seed["metadata"]["ownerReferences"][0]["name"] == "speaks"
    wait_for(
        lambda: objects.items(SEEDS)[0].get("status", {}).get("state") == "training",
        "the seed's state does not show",
    )
    trainer.stands(epoch=4, seeds=[a_seed(state="fossilized", alpha_percent=100)])
    wait_for(
        lambda: objects.items(SEEDS)[0]["status"]["state"] == "fossilized",
        "the seed's transition does not show",
    )
    assert len(objects.items(SEEDS)) == 1


def test_a_seed_that_is_deleted_comes_back_as_it_was(trainer, objects):
    trainer.stands(epoch=3, seeds=[a_seed(alpha_percent=40)])
    wait_for(lambda: (s := objects.items(SEEDS)) and "status" in s[0], "the seed has no status")
    [before] = objects.items(SEEDS)
    objects.delete(f"{SEEDS}/{before['metadata']['name']}")
    again = wait_for(
        lambda: next(
            (s for s in objects.items(SEEDS) if uid_of(s) != uid_of(before) and "status" in s), None
        ),
        "the seed does not come back",
    )
    assert again["status"] == before["status"]
    assert again["spec"] == before["spec"]


def test_an_older_snapshot_changes_nothing(trainer, objects):
    trainer.stands(epoch=5)
    wait_for(lambda: status(objects)["epoch"] == 5, "the epoch does not show")
    later = datetime.now(UTC) + timedelta(seconds=10)
    trainer.stands(epoch=2, sequence=0, time=later)
    trainer.stands(epoch=6, time=later)
    seen = set()
    wait_for(lambda: seen.add(status(objects)["epoch"]) or 6 in seen, "the epoch does not show")
    assert seen <= {5, 6}


def test_the_newest_figures_show_though_no_report_follows(trainer, objects):
    for epoch in (7, 8):
        trainer.stands(epoch=epoch)
    wait_for(lambda: status(objects)["epoch"] == 8, "the newest epoch does not show")


def test_a_kernel_that_is_asked_for_becomes_an_object_and_a_job(trainer, objects):
    objects.create(BLUEPRINTS, catalogued("low-rank"))
    wait_for(
        lambda: objects.get(f"{BLUEPRINTS}/low-rank").get("status", {}).get("state"),
        "the blueprint has no state",
    )
    kernel = trainer.asks("low-rank", TARGET)
    wait_for(lambda: objects.get(f"{KERNELS}/{kernel}"), "the kernel has no object")
    wait_for(
        lambda: [j for j in objects.items(JOBS) if j["metadata"]["name"] == f"compile-{kernel}"],
        "the kernel is not compiled",
    )
    for _ in range(2):
        trainer.asks("low-rank", TARGET)
    assert len(objects.items(KERNELS)) == 1
