"""Who reaches whom, by the NetworkPolicies of the chart and of the operator together.

A network of the tests enforces none; so what they say is worked out here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import yaml

from esper.configs import EsperConfig
from esper_operator.children import compile_job, job, network_policy, tamiyo
from esper_operator.leading import options_of
from tests.unit.charts.networks import Outside, Pod, lets
from tests.unit.charts.objects import INSTALLATIONS, named, of_kind, pods
from tests.unit.esper_operator.objects import NAMESPACE, kernel, session
from tools import helm

OWN = "esper-system"
PORTS = {"operator": 8080, "urza": 8000, "redis": 6379, "worker": 29400, "other": 29400}
SESSIONS = {"worker", "other", "tamiyo", "compile"}
REACH = {
    "operator": {"test"},
    "urza": {"operator", "test", *SESSIONS},
    "redis": {"operator", "urza", "worker", "other", "tamiyo"},
    "worker": {"worker"},
    "other": {"other"},
}
"""Whom each is reached by at its port, and by nobody else."""


class Installed:
    """An installation's policies, with those of two sessions of another namespace."""

    def __init__(self, installation: str) -> None:
        self.objects = helm.render(INSTALLATIONS[installation])
        self.prefix = INSTALLATIONS[installation].get("fullnameOverride", "esper")
        self.pods = {
            name.removeprefix(f"{self.prefix}-"): Pod(OWN, labels)
            for name, labels, _ in pods(self.objects)
        }
        text = named(self.objects, "ConfigMap", f"{self.prefix}-operator")["data"]["esper.yaml"]
        given = {
            f"{section}.{name}": str(value)
            for section, settings in yaml.safe_load(text).items()
            for name, value in settings.items()
            if value != ""
        }
        options = options_of(EsperConfig.load(given, environment={}))
        self.policies = of_kind(self.objects, "NetworkPolicy")
        for name, uid in (("worker", "uid-1"), ("other", "uid-2")):
            view = session(name=name, uid=uid)
            self.pods[name] = _pod(job.manifest(view, 1, 2, options))
            if options.worker_egress is not None:
                self.policies.append(network_policy.manifest(view, options.worker_egress))
        self.pods["tamiyo"] = _pod(tamiyo.shared(NAMESPACE, options))
        compiled = kernel("5f" * 20, {"blueprint": "low-rank"})
        self.pods["compile"] = _pod(compile_job.manifest(compiled, 1, options))
        # Of a user, and one that claims to be the operator's.
        self.pods["stranger"] = Pod(NAMESPACE, {"app": "notebook"})
        self.pods["beside"] = Pod(OWN, {"app.kubernetes.io/managed-by": "esper-operator"})

    def lets(self, source: str, target: str | Outside, port: int, protocol: str = "TCP") -> bool:
        found = self.pods[target] if isinstance(target, str) else target
        return lets(self.policies, self.pods[source], found, port, protocol)


def _pod(manifest: dict[str, Any]) -> Pod:
    template = manifest["spec"]["template"]
    return Pod(manifest["metadata"]["namespace"], template["metadata"]["labels"])


@cache
def installed(installation: str) -> Installed:
    return Installed(installation)


@pytest.mark.parametrize("target", REACH)
def test_each_is_reached_by_those_who_need_it_and_by_nobody_else(target: str) -> None:
    here = installed("default")
    assert {each for each in here.pods if here.lets(each, target, PORTS[target])} == REACH[target]


def test_other_ports_are_open_to_nobody_but_a_sessions_own_workers() -> None:
    here = installed("default")
    for target in ("operator", "urza", "redis"):
        assert not [each for each in here.pods if here.lets(each, target, 22)]
    # gloo and NCCL choose ports as they like.
    assert [each for each in here.pods if here.lets(each, "worker", 41234)] == ["worker"]


@pytest.mark.parametrize("installation", ["default", "elsewhere", "everything"])
def test_names_are_asked_for_by_all_but_redis(installation: str) -> None:
    here = installed(installation)
    dns = Outside("10.96.0.10")
    for name in ("operator", "urza", "worker"):
        for protocol in ("UDP", "TCP"):
            assert here.lets(name, dns, 53, protocol)
    if "redis" in here.pods:
        assert not here.lets("redis", dns, 53, "UDP")


def test_workers_reach_no_api_server_no_node_and_no_metadata_of_a_cloud() -> None:
    here = installed("default")
    for address, port in (
        *(("10.96.0.1", 443), ("192.168.1.1", 6443), ("192.168.1.1", 10250)),
        *(("169.254.169.254", 80), ("93.184.216.34", 443)),
    ):
        assert not here.lets("worker", Outside(address), port)
        assert not here.lets("urza", Outside(address), port)
        assert not here.lets("redis", Outside(address), port)
    assert here.lets("operator", Outside("10.96.0.1"), 443)
    assert not here.lets("operator", Outside("192.168.1.1"), 10250)


def test_what_is_elsewhere_is_reached_at_its_port_by_those_who_use_it() -> None:
    here = installed("elsewhere")
    elsewhere = Outside("172.16.0.5")
    ports = {5432: {"urza"}, 9000: {"urza"}, 6380: {"operator", "urza", "worker", "other"}}
    selected = {"operator", "urza", "worker", "other"}
    for port, wanted in ports.items():
        assert {each for each in selected if here.lets(each, elsewhere, port)} == wanted
    assert not here.lets("worker", elsewhere, 6379)


def test_what_the_values_open_is_open_and_no_more() -> None:
    here = installed("everything")
    monitoring = Pod("monitoring", {"app": "prometheus"})
    for name in ("operator", "urza"):
        # The namespace is chosen by a label of its own, which this one lacks.
        assert not lets(here.policies, monitoring, here.pods[name], PORTS[name])
    outside = Pod("team-z", {}, address="10.1.2.3")
    assert lets(here.policies, outside, here.pods["urza"], 8000)
    assert not lets(here.policies, outside, here.pods["redis"], 6379)
    assert here.lets("urza", Outside("1.2.3.4"), 1234)
    assert here.lets("worker", Outside("10.2.0.7"), 443)
    assert not here.lets("worker", Outside("10.3.0.7"), 443)
    assert here.lets("operator", Outside("10.9.9.9"), 6443)
    assert not here.lets("operator", Outside("11.0.0.1"), 6443)


def test_where_they_are_off_there_are_none() -> None:
    assert installed("little").policies == []


def test_every_pod_of_the_chart_but_helms_own_test_has_a_policy_of_both_ways() -> None:
    for installation in INSTALLATIONS.keys() - {"little"}:
        here = installed(installation)
        chosen = {
            policy["metadata"]["name"].removeprefix(f"{here.prefix}-")
            for policy in of_kind(here.objects, "NetworkPolicy")
            if set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        }
        own = {name for name, pod in here.pods.items() if pod.namespace == OWN}
        assert chosen == own - {"test", "beside"}, installation
