"""Tolaria's configuration: frozen, nested, made from a TrainingSession or from YAML.

The resource models own names, defaults and ranges; this is what the trainer works from, one
flat language of Python units. `to_yaml` and `from_yaml` round trip.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from esper.contracts.enums import ControllerPolicy
from esper.contracts.resources import TrainingSession
from esper.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EntryPointConfig:
    """A callable, `module.path:attribute`, and its keyword arguments."""

    entrypoint: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The host's optimiser. `max_gradient_norm` None: no clipping."""

    name: str
    learning_rate: float
    weight_decay: float
    momentum: float
    betas: tuple[float, float]
    max_gradient_norm: float | None
    accumulation_steps: int


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over the epochs, as a share of the base rate."""

    name: str
    warmup_epochs: int
    final_share: float
    step_epochs: int
    step_factor: float


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a checkpoint is written and how many are kept."""

    every_epochs: int
    keep: int


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run's numbers. `seed` starts every random stream.

    `logical_shards` are the parts that a batch is cut into whatever the number of ranks; 1: off.
    """

    epochs: int
    batch_size: int
    seed: int
    threads: int
    precision: str
    objective: str
    sharding: str
    logical_shards: int
    compile: bool
    max_rollbacks: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """Which layers may host seeds: layer types, and glob patterns over dotted names."""

    types: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Who decides, how often, and how sure it must be.

    `patience_seconds` is how long services elsewhere are waited for; None is for ever.
    """

    policy: ControllerPolicy
    minimum_confidence: float
    interval_epochs: int
    probe_interval_steps: int
    patience_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """The gates' thresholds; epochs, nats, and a one-sided confidence level."""

    confidence_level: float
    passes: int
    dwell_epochs: int
    age_epochs: int
    ramp_epochs: int
    hold_epochs: int
    embargo_epochs: int
    rent_per_million_parameters: float
    rent_per_gigaflop: float


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """Where, how much and under which rules the model may grow.

    `parameters_percent` is the budget over the base parameters; `active_seeds` how many seeds may
    be in a trial at once.
    """

    layers: LayersConfig
    seeds_per_layer: int
    parameters_percent: float
    active_seeds: int
    controller: ControllerConfig
    gates: GatesConfig


@dataclass(frozen=True, kw_only=True)
class TolariaConfig:
    """Everything the trainer needs to know of a session."""

    session: str
    model: EntryPointConfig
    data: EntryPointConfig
    training: TrainingConfig
    growth: GrowthConfig

    @classmethod
    def from_resource(cls, resource: TrainingSession) -> TolariaConfig:
        """The configuration that a validated TrainingSession asks for."""
        spec = resource.spec
        training, growth = spec.training, spec.growth
        optimizer, schedule, gates = training.optimizer, training.schedule, growth.gates
        return cls(
            session=resource.metadata.name,
            model=EntryPointConfig(
                entrypoint=spec.model.entrypoint, arguments=dict(spec.model.arguments)
            ),
            data=EntryPointConfig(
                entrypoint=spec.data.entrypoint, arguments=dict(spec.data.arguments)
            ),
            training=TrainingConfig(
                epochs=training.epochs,
                batch_size=training.batch_size,
                seed=training.seed,
                threads=training.threads,
                precision=str(training.precision),
                objective=str(training.objective),
                sharding=str(training.sharding),
                logical_shards=training.logical_shards,
                compile=training.compile,
                max_rollbacks=training.non_finite.max_rollbacks,
                optimizer=_picked(OptimizerConfig, optimizer),
                schedule=_picked(ScheduleConfig, schedule),
                checkpoint=_picked(CheckpointConfig, training.checkpoint),
            ),
            growth=GrowthConfig(
                layers=LayersConfig(
                    types=tuple(str(t) for t in growth.layers.types),
                    include=tuple(growth.layers.include),
                    exclude=tuple(growth.layers.exclude),
                ),
                seeds_per_layer=growth.seeds_per_layer,
                parameters_percent=growth.budget.parameters_percent,
                active_seeds=growth.budget.active_seeds,
                controller=_picked(ControllerConfig, growth.controller),
                gates=_picked(GatesConfig, gates),
            ),
        )

    def to_yaml(self) -> str:
        """The configuration as YAML, keys in the order of the fields."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> TolariaConfig:
        """The configuration that `to_yaml` wrote.

        Raises:
            ConfigError: it is no YAML, or a field is missing, unknown or of the wrong type.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError("configuration", f"broken YAML: {error}", "YAML") from error
        built = _built(cls, data, "")
        assert isinstance(built, cls)
        return built


def _picked(kind: type[Any], source: object) -> Any:
    """A `kind` whose fields are the attributes of the same names of `source`."""
    values = {field.name: getattr(source, field.name) for field in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, ControllerPolicy) else value


def _built(kind: Any, value: object, path: str) -> object:
    """`value` as `kind`, checked recursively."""
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(path or "configuration", value, "a mapping")
        hints = get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise ConfigError(_join(path, str(key)), value[key], f"one of {', '.join(hints)}")
        for key in hints:
            if key not in value:
                raise ConfigError(_join(path, key), "nothing", "a value; the field is required")
        made = {key: _built(hint, value[key], _join(path, key)) for key, hint in hints.items()}
        return kind(**made)  # type: ignore[operator]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None:
            return None
        return _built(next(a for a in arguments if a is not type(None)), value, path)
    if origin is tuple and isinstance(value, list):
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise ConfigError(path, value, f"{len(arguments)} values")
        return tuple(_built(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is ControllerPolicy and value in list(ControllerPolicy):
        return ControllerPolicy(str(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = origin or kind
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ConfigError(path, value, f"a value of type {getattr(wanted, '__name__', wanted)}")
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
