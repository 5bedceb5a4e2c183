"""What this node refuses, in a scheduler's words."""

import pytest

from tools.cluster.node.placing import refusal, requests

NODE = {
    "metadata": {"labels": {"zone": "a"}},
    "spec": {},
    "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "3", "nvidia.com/gpu": "1"}},
}
MISMATCH = "node(s) didn't match Pod's node affinity/selector"


def pod(**spec):
    return {"metadata": {}, "spec": {"containers": [{"name": "main"}], **spec}}


def asking(**amounts):
    names = {name.replace("_", "."): value for name, value in amounts.items()}
    return pod(containers=[{"resources": {"requests": names}}])


def affine(operator, *values):
    term = {"matchExpressions": [{"key": "zone", "operator": operator, "values": list(values)}]}
    terms = {"nodeSelectorTerms": [term]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    return pod(affinity={"nodeAffinity": required})


def tainted(key="k", value="v", effect="NoSchedule"):
    return {**NODE, "spec": {"taints": [{"key": key, "value": value, "effect": effect}]}}


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (pod(), None),
        (pod(nodeSelector={"zone": "a"}), None),
        (pod(nodeSelector={"zone": "b"}), MISMATCH),
        (affine("In", "a", "b"), None),
        (affine("In", "b"), MISMATCH),
        (affine("NotIn", "b"), None),
        (affine("NotIn", "a"), MISMATCH),
        (affine("Exists"), None),
        (affine("DoesNotExist"), MISMATCH),
        (asking(cpu="4"), None),
        (asking(cpu="4001m"), "Insufficient cpu"),
        (asking(memory="9Gi"), "Insufficient memory"),
        (
            pod(containers=[{"resources": {"limits": {"nvidia.com/gpu": 2}}}]),
            "Insufficient nvidia.com/gpu",
        ),
        (asking(example="1"), "Insufficient example"),
    ],
)
def test_refusals(wanted, why):
    assert refusal(wanted, NODE, []) == why


def test_what_is_placed_already_counts():
    assert refusal(asking(cpu="2"), NODE, [asking(cpu="2")]) is None
    assert refusal(asking(cpu="2"), NODE, [asking(cpu="3")]) == "Insufficient cpu"
    assert refusal(pod(), NODE, [pod()] * 3) == "Insufficient pods"


def test_a_cordoned_node_takes_nothing():
    assert refusal(pod(), {**NODE, "spec": {"unschedulable": True}}, []) is not None


@pytest.mark.parametrize(
    ("toleration", "fits"),
    [
        ({"key": "k", "value": "v"}, True),
        ({"key": "k", "value": "w"}, False),
        ({"key": "k", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "k", "value": "v", "effect": "NoExecute"}, False),
        ({"key": "k", "value": "v", "effect": "NoSchedule"}, True),
    ],
)
def test_taints_and_tolerations(toleration, fits):
    assert refusal(pod(), tainted(), []) == "node(s) had untolerated taint(s) {k: v}"
    assert (refusal(pod(tolerations=[toleration]), tainted(), []) is None) is fits
    assert refusal(pod(), tainted(effect="PreferNoSchedule"), []) is None


def test_the_hungriest_init_container_counts_where_it_needs_more():
    wanted = asking(cpu="1")
    wanted["spec"]["initContainers"] = [{"resources": {"requests": {"cpu": "3"}}}]
    assert requests(wanted) == {"pods": 1, "cpu": 3}
