"""Demand 11: the operator may do what it does and no more, in a namespace as in the cluster.

What it does is what the API server's audit log says of it.
"""

import uuid

import pytest
import yaml

from esper.configs import OperatorConfig
from esper.contracts.assets import MAX_SEEDS
from esper_operator.decisions.lost import MARGIN_SECONDS
from esper_operator.rbac import GRANTS, lease_grants, manifests, rendered
from tests.integration.esper_operator.test_reports import KERNELS, SEEDS, TARGET, a_seed
from tools.cluster.control_plane import wait_for
from tools.operator_bus import Trainer
from tools.operator_workers import (
    BLUEPRINTS,
    DEPLOYMENTS,
    SECRETS,
    SESSIONS,
    Workers,
)
from tools.operator_world import Objects, OperatorWorld

pytestmark = pytest.mark.xdist_group("cluster")
FORBIDDEN, CREATED = 403, 201


def used(plane, account):
    """Resource and verb of everything that an account has done; applying may be creating."""
    found = set()
    for event in plane.requests(account):
        about = event.get("objectRef", {})
        if "resource" not in about or event["responseStatus"]["code"] == FORBIDDEN:
            continue
        resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
        found.add((resource, event["verb"]))
        if event["verb"] == "patch" and event["responseStatus"]["code"] == CREATED:
            found.add((resource, "create"))
    return found


def granted():
    """What the table grants."""
    grants = (*GRANTS, *lease_grants("any"))
    return {(grant.resource, verb) for grant in grants for verb in grant.verbs}


def refusals(plane, account):
    return [
        (event["verb"], event["requestURI"])
        for event in plane.requests(account)
        if event["responseStatus"]["code"] == FORBIDDEN
    ]


def everything_happens(world, objects, lost_node):
    """Sessions and kernels for which the operator has to do all that it can do."""
    trained = objects.create(SESSIONS, world.session("all"))
    workers = Workers(objects, "all")
    workers.lose(workers.run()[0], lost_node)
    trainer = Trainer(world.hub.redis.url, objects.namespace, trained)
    trainer.stands(epoch=1, seeds=[a_seed()])
    wait_for(lambda: (s := objects.items(SEEDS)) and "status" in s[0], "no seed has a status")
    wait_for(lambda: objects.get(f"{BLUEPRINTS}/low-rank"), "the catalogue is not made")
    kernel = trainer.asks("low-rank", TARGET)
    wait_for(
        lambda: (objects.get(f"{KERNELS}/{kernel}") or {}).get("status"), "the kernel has no status"
    )
    trainer.stands(epoch=2, seeds=[a_seed(slot=slot) for slot in range(2, MAX_SEEDS)])
    wait_for(lambda: len(objects.items(SEEDS)) == MAX_SEEDS - 1, "not all seeds have an object")
    trainer.stands(epoch=3, seeds=[a_seed(slot=0), a_seed(layer="blocks.1")])
    wait_for(
        lambda: (
            {s["spec"]["layer"] for s in objects.items(SEEDS)} == {"blocks.0", "blocks.1"}
            and len(objects.items(SEEDS)) == MAX_SEEDS
        ),
        "the seed that is told of no more leaves no room",
    )
    wait_for(
        lambda: objects.get(f"{SESSIONS}/all")["status"]["attempt"] == 2,
        "the lost pod holds the session up",
        seconds=MARGIN_SECONDS + 20,
    )
    workers.run()
    suspended(objects, True)
    wait_for(lambda: not workers.pods(), "the workers stay")
    suspended(objects, False)
    pods = workers.run()
    workers.end(pods[0], 78, reason="BadInput", message="so that it is told")
    objects.wait("all", "False")
    dedicated = {
        "growth": {"controller": {"dedicated": True}},
        "runPolicy": {"ttlSecondsAfterFinished": 1},
    }
    objects.create(SESSIONS, world.session("own", spec=dedicated))
    wait_for(lambda: objects.get(f"{DEPLOYMENTS}/own-controller"), "no controller of its own")
    wait_for(lambda: not objects.get(f"{DEPLOYMENTS}/esper-tamiyo"), "the shared controller stays")
    Workers(objects, "own").run()
    Workers(objects, "own").succeed()
    wait_for(lambda: not objects.get(f"{SESSIONS}/own"), "the session stays")
    objects.delete(f"{SESSIONS}/all")
    wait_for(lambda: not objects.get(f"{SECRETS}/esper-tamiyo"), "the shared Secret stays")


def suspended(objects, suspend):
    objects.merge(f"{SESSIONS}/all", {"spec": {"runPolicy": {"suspend": suspend}}})


@pytest.fixture
def namespaced(control_plane, shared_operator, namespace, tmp_path):
    """An operator of one namespace, with an account of its own."""
    shared_operator.stop()
    own = control_plane.create_namespace(f"operator-{uuid.uuid4().hex[:8]}")
    with OperatorWorld(tmp_path, control_plane, namespaces=namespace, own=own) as world:
        yield world


def test_demand_11_in_a_namespace_it_uses_all_that_it_may_do_and_asks_for_no_more(
    namespaced, objects, lost_node
):
    account = f"system:serviceaccount:{namespaced.own}:esper-operator"
    settings = {"catalogue": objects.namespace, "worker_egress": "[]"}
    with namespaced.operator(**settings) as operator:
        wait_for(lambda: operator.leads, "the operator does not lead")
        everything_happens(namespaced, objects, lost_node)
        assert operator.asked("/readyz") == (200, "ready\n")
    done = used(namespaced.plane, account)
    assert refusals(namespaced.plane, account) == []
    assert granted() - done == set(), "granted and not used"
    assert done - granted() == set(), "used and not granted"


def test_demand_11_an_operator_of_one_namespace_leaves_others_alone(namespaced, objects):
    other = namespaced.plane.create_namespace(f"test-{uuid.uuid4().hex[:12]}")
    elsewhere = Objects(namespaced.plane, other)
    with namespaced.operator() as operator:
        wait_for(lambda: operator.leads, "the operator does not lead")
        elsewhere.create(SESSIONS, namespaced.session("there"))
        objects.create(SESSIONS, namespaced.session("here"))
        objects.wait("here", "Unknown")
        assert elsewhere.condition("there") == {}
    elsewhere.close()
    namespaced.plane.delete_namespace(other)


@pytest.mark.parametrize("namespaced", [False, True], ids=["cluster", "namespaced"])
def test_demand_11_roles_name_verbs_and_resources(namespaced):
    config = OperatorConfig(namespaces="team-a,team-b")
    made = manifests(config, namespaced=namespaced)
    for rule in (rule for role in made for rule in role.get("rules", ())):
        assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
    kinds = {role["kind"] for role in made}
    assert ("ClusterRole" in kinds) is not namespaced
    places = {r["metadata"].get("namespace") for r in made if r["kind"] == "Role"}
    assert places == ({"esper-system"} | ({"team-a", "team-b"} if namespaced else set()))
    assert list(yaml.safe_load_all(rendered(config, namespaced=namespaced))) == made


def test_demand_11_every_grant_has_a_reason_of_its_own():
    grants = (*GRANTS, *lease_grants("any"))
    reasons = [(grant.resource, grant.reason) for grant in grants]
    assert sorted(set(reasons)) == sorted(reasons)
    rights = [(grant.resource, grant.names, verb) for grant in grants for verb in grant.verbs]
    assert sorted(set(rights)) == sorted(rights)
