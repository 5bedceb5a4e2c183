"""What the operator's settings say of the pods that it makes reaches the manifests' options."""

from __future__ import annotations

import pytest

from esper.configs import EsperConfig
from esper.errors import ConfigError
from esper_operator.leading import options_of
from esper_operator.options import Options

PLACES = {"hub.url": "http://hub:8000", "redis.url": "redis://bus:6379"}


def options(**settings: str) -> Options:
    given = {**PLACES, **{f"operator.{name}": value for name, value in settings.items()}}
    return options_of(EsperConfig.load(given, environment={}))


def test_the_settings_defaults_are_the_options_own() -> None:
    plain = Options(
        image="esper:latest",
        hub_url=PLACES["hub.url"],
        redis_url=PLACES["redis.url"],
        own_namespace="esper-system",
    )
    assert options() == plain


def test_resources_and_labels_are_pairs() -> None:
    found = options(
        tamiyo_requests="cpu=2,memory=1.5Gi",
        tamiyo_limits="memory=2Gi",
        compile_requests="cpu=1",
        compile_limits="memory=6Gi,nvidia.com/gpu=1",
        pod_labels="network=esper,example.com/team=a",
        shared_memory="4Gi",
        blueprints_per_session="3",
        compile_ttl_seconds="0",
    )
    assert found.tamiyo_requests == (("cpu", "2"), ("memory", "1.5Gi"))
    assert found.tamiyo_limits == (("memory", "2Gi"),)
    assert found.compile_requests == (("cpu", "1"),)
    assert found.compile_limits == (("memory", "6Gi"), ("nvidia.com/gpu", "1"))
    assert found.pod_labels == (("network", "esper"), ("example.com/team", "a"))
    assert (found.shared_memory, found.blueprints_per_session) == ("4Gi", 3)
    assert found.compile_ttl_seconds == 0


def test_what_is_the_installations_is_known() -> None:
    found = options(
        lease_namespace="team", reserved_secrets="keys,a.b", reserved_claims="hub,redis"
    )
    assert found.own_namespace == "team"
    assert (found.own_secrets, found.own_claims) == (("keys", "a.b"), ("hub", "redis"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tamiyo_limits", "memory"),
        ("compile_requests", "cpu=-1"),
        ("compile_limits", "cpu=1,"),
        ("shared_memory", "much"),
        ("pod_labels", "a b=c"),
        ("reserved_secrets", "a,"),
        ("reserved_claims", "A"),
    ],
)
def test_what_is_no_amount_and_no_label_is_refused_with_its_field(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"operator\.{name}"):
        options(**{name: value})
