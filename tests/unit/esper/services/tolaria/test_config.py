from __future__ import annotations

from dataclasses import FrozenInstanceError, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.enums import ControllerPolicy
from esper.contracts.manifests import load_manifest
from esper.errors import ConfigError
from esper.services.tolaria.config import TolariaConfig
from tests.unit.esper.services.tolaria.sessions import config

EXAMPLE = Path(__file__).parents[5] / "examples" / "01-mnist1d-mlp" / "session.yaml"

text = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co")), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field of this type."""
    if is_dataclass(kind):
        return st.builds(kind, **{n: values_of(hint) for n, hint in get_type_hints(kind).items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*map(values_of, arguments))
    if origin is dict:
        return st.dictionaries(text, json_values, max_size=3)
    simple = {
        str: text,
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
        ControllerPolicy: st.sampled_from(ControllerPolicy),
    }
    return simple[kind]


def changed(**nested: Any) -> str:
    """The default configuration as YAML, with values replaced by dotted path (dots as `__`)."""
    data = yaml.safe_load(config().to_yaml())
    for path, value in nested.items():
        *parents, last = path.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return yaml.safe_dump(data)


# -- from a resource ----------------------------------------------------------------------------


def test_the_first_example_becomes_the_configuration_it_describes() -> None:
    session = load_manifest(EXAMPLE).session
    found = TolariaConfig.from_resource(session)
    spec = session.spec
    assert found.session == session.metadata.name == "mnist1d-mlp"
    assert found.model.entrypoint == "esper.zoo.models:MLP"
    assert found.model.arguments == {"inputs": 40, "hidden": [16, 16], "outputs": 10}
    assert found.data.entrypoint == "esper.zoo.data:mnist1d"
    assert (found.training.epochs, found.training.batch_size) == (100, 128)
    assert found.training.optimizer.name == "adamw"
    assert found.training.optimizer.learning_rate == 5.0e-3
    assert found.training.optimizer.betas == (0.9, 0.999)
    assert found.growth.layers.types == ("Linear", "Conv2d")
    assert found.growth.controller.policy is spec.growth.controller.policy
    for name in ("passes", "dwell_epochs", "age_epochs", "rent_per_million_parameters"):
        assert getattr(found.growth.gates, name) == getattr(spec.growth.gates, name)
    assert found.growth.parameters_percent == spec.growth.budget.parameters_percent
    assert found.growth.active_seeds == spec.growth.budget.active_seeds
    assert found.growth.seeds_per_layer == spec.growth.seeds_per_layer
    assert TolariaConfig.from_yaml(found.to_yaml()) == found


def test_every_part_of_the_spec_arrives() -> None:
    found = config(
        training={
            "epochs": 7,
            "batchSize": 3,
            "seed": 9,
            "threads": 2,
            "precision": "bfloat16",
            "objective": "regression",
            "nonFinite": {"maxRollbacks": 1},
            "optimizer": {"name": "sgd", "momentum": 0.5, "maxGradientNorm": 2.0},
            "schedule": {"name": "step", "stepEpochs": 4, "stepFactor": 0.5, "warmupEpochs": 1},
            "checkpoint": {"everyEpochs": 3, "keep": 4},
        },
        growth={
            "layers": {"types": ["Linear"], "include": ["a.*"], "exclude": ["a.b"]},
            "seedsPerLayer": 3,
            "budget": {"parametersPercent": 50, "activeSeeds": 2},
            "controller": {"policy": "random", "minimumConfidence": 0.5, "intervalEpochs": 2},
            "gates": {"confidenceLevel": 0.9, "embargoEpochs": 8, "rentPerGigaflop": 0.25},
        },
    )
    training, growth = found.training, found.growth
    assert (training.epochs, training.batch_size, training.seed, training.threads) == (7, 3, 9, 2)
    assert (training.precision, training.objective) == ("bfloat16", "regression")
    assert training.max_rollbacks == 1
    assert (training.optimizer.name, training.optimizer.momentum) == ("sgd", 0.5)
    assert training.optimizer.max_gradient_norm == 2.0
    assert (training.schedule.step_epochs, training.schedule.step_factor) == (4, 0.5)
    assert (training.checkpoint.every_epochs, training.checkpoint.keep) == (3, 4)
    assert growth.layers.types == ("Linear",)
    assert (growth.layers.include, growth.layers.exclude) == (("a.*",), ("a.b",))
    assert (growth.parameters_percent, growth.active_seeds) == (50, 2)
    assert growth.controller.policy is ControllerPolicy.RANDOM
    assert (growth.controller.minimum_confidence, growth.controller.interval_epochs) == (0.5, 2)
    assert (growth.gates.confidence_level, growth.gates.embargo_epochs) == (0.9, 8)
    assert growth.gates.rent_per_gigaflop == 0.25


def test_the_configuration_is_frozen_and_holds_arguments_of_its_own() -> None:
    with pytest.raises(FrozenInstanceError):
        config().training.epochs = 3  # type: ignore[misc]
    first = config()
    first.model.arguments["inputs"] = 99
    assert config().model.arguments["inputs"] == 6


# -- YAML ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(values_of(TolariaConfig))
def test_every_configuration_round_trips_through_yaml(found: TolariaConfig) -> None:
    assert TolariaConfig.from_yaml(found.to_yaml()) == found


def test_yaml_keeps_the_order_of_the_fields() -> None:
    keys = list(yaml.safe_load(config().to_yaml()))
    assert keys == ["session", "model", "data", "training", "growth"]


def test_an_integer_will_do_for_a_float_and_nothing_for_no_clipping() -> None:
    found = TolariaConfig.from_yaml(
        changed(training__optimizer__learning_rate=1, training__optimizer__max_gradient_norm=None)
    )
    assert found.training.optimizer.learning_rate == 1.0
    assert isinstance(found.training.optimizer.learning_rate, float)
    assert found.training.optimizer.max_gradient_norm is None
    clipped = replace(found.training.optimizer, max_gradient_norm=2.5)
    found = replace(found, training=replace(found.training, optimizer=clipped))
    assert TolariaConfig.from_yaml(found.to_yaml()).training.optimizer.max_gradient_norm == 2.5


REFUSED = [
    ({"training__epochs": ...}, "training.epochs", "required"),
    ({"training__speed": 3}, "training.speed", "epochs"),
    ({"training__epochs": "ten"}, "training.epochs", "int"),
    ({"training__epochs": True}, "training.epochs", "int"),
    ({"training__epochs": 2.5}, "training.epochs", "int"),
    ({"training__optimizer__learning_rate": True}, "training.optimizer.learning_rate", "float"),
    ({"training__optimizer__betas": "0.9"}, "training.optimizer.betas", "tuple"),
    ({"training__optimizer__betas": [0.9]}, "training.optimizer.betas", "2"),
    ({"training__optimizer__betas": [0.9, "x"]}, "training.optimizer.betas[1]", "float"),
    ({"training__optimizer": 3}, "training.optimizer", "mapping"),
    ({"growth__controller__policy": "clever"}, "growth.controller.policy", "ControllerPolicy"),
    ({"growth__controller__policy": ["none"]}, "growth.controller.policy", "ControllerPolicy"),
    ({"growth__layers__include": [1]}, "growth.layers.include[0]", "str"),
    ({"model__arguments": []}, "model.arguments", "dict"),
    ({"session": None}, "session", "str"),
]


@pytest.mark.parametrize(("change", "field", "allowed"), REFUSED)
def test_what_is_no_configuration_is_refused(
    change: dict[str, Any], field: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TolariaConfig.from_yaml(changed(**change))
    assert caught.value.field == field
    assert allowed in caught.value.allowed


@pytest.mark.parametrize("document", ["", "[]", "3", "session"])
def test_something_else_than_a_mapping_is_refused(document: str) -> None:
    with pytest.raises(ConfigError, match=r"configuration: .* a mapping"):
        TolariaConfig.from_yaml(document)


@pytest.mark.parametrize("document", ["a: [", "\t- x", "!!python/object:os.system {}"])
def test_broken_yaml_is_refused(document: str) -> None:
    with pytest.raises(ConfigError, match="configuration"):
        TolariaConfig.from_yaml(document)
