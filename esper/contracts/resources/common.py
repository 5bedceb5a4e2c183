"""What the four resources share: a closed, strict base, object metadata, conditions, selectors.

Every number has a range and is finite; a string is never taken for a number nor a bool for an
integer. Cross-field rules stand twice, side by side: a validator for `esper run` and a CEL rule
for the API server, both on the model whose fields they read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from esper.contracts.base import Contract

GROUP = "esper.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

MAX_ARGUMENT_BYTES = 64 * 2**10
INT64_MAX = 2**63 - 1

IDENTIFIER = "[A-Za-z_][A-Za-z0-9_]*"
DOTTED = rf"{IDENTIFIER}(\.{IDENTIFIER})*"
ENTRY_POINT_PATTERN = f"^{DOTTED}:{DOTTED}$"
LABEL_1035_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
LABEL_KEY_PATTERN = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
SUBDOMAIN_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|e[0-9]+)?$"
DECIMAL_PATTERN = r"^(-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?|NaN|-?Infinity)$"
DIGEST_PATTERN = "^[0-9a-f]{40,64}$"


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules as a JSON-schema extra; each pair is (rule, message), the message names the field.

    Raises:
        ValueError: a rule has no message.
    """
    if not all(message for _, message in pairs):
        raise ValueError("every CEL rule needs a message")
    return {"x-kubernetes-validations": [{"rule": rule, "message": m} for rule, m in pairs]}


def immutable(field: str) -> dict[str, Any]:
    """The rule that `field` keeps the value it was created with."""
    return rules(("self == oldSelf", f"{field} is immutable"))


def refusal(field: str, came: object, allowed: str) -> PydanticCustomError:
    """What a cross-field validator raises: it names a field below the model it validates."""
    return PydanticCustomError(
        "cross_field", "{field}: {allowed}", {"field": field, "came": came, "allowed": allowed}
    )


def without_nulls(value: object) -> object:
    """`value` without what is null, at any depth: for mappings, and for parts of other models.

    The API server prunes such a field before it defaults; `ResourceModel` does so by itself.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


class ResourceModel(Contract):
    """A part of a resource: closed, strict, finite.

    A field set to null counts as absent, as the API server prunes it before it defaults.
    """

    model_config = ConfigDict(strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _prune_nulls(cls, data: object) -> object:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data


def _bounded(arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if len(json.dumps(arguments).encode()) > MAX_ARGUMENT_BYTES:
        raise PydanticCustomError("too_large", f"at most {MAX_ARGUMENT_BYTES} bytes of JSON")
    return arguments


def _quantity(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def decimal_text(value: float) -> str:
    """`value` as status carries decimals: a string of at most six significant digits.

    Not-finite values read "NaN", "Infinity" and "-Infinity".
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return f"{value:.6g}"


# Lists and enumerations are lax in their container only: YAML has lists and strings.
Lax = Field(strict=False)

Count = Annotated[int, Field(ge=0, le=INT64_MAX)]
Percent = Annotated[int, Field(ge=0, le=100)]
Seconds = Annotated[int, Field(ge=1, le=2**31 - 1)]
Time = Annotated[AwareDatetime, Lax]
DecimalText = Annotated[str, Field(max_length=32, pattern=DECIMAL_PATTERN)]
"""A decimal number that a controller wrote, as text."""
EntryPoint = Annotated[str, Field(max_length=253, pattern=ENTRY_POINT_PATTERN)]
Arguments = Annotated[dict[str, JsonValue], AfterValidator(_bounded)]
Quantity = Annotated[
    str,
    BeforeValidator(_quantity),
    Field(max_length=32, pattern=QUANTITY_PATTERN),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "minimum": 0, "pattern": QUANTITY_PATTERN}),
]
"""A Kubernetes quantity: `2`, `500m`, `4Gi`."""

SessionName = Annotated[str, Field(min_length=1, max_length=48, pattern=LABEL_1035_PATTERN)]
ObjectName = Annotated[str, Field(min_length=1, max_length=63, pattern=LABEL_1035_PATTERN)]
Subdomain = Annotated[str, Field(min_length=1, max_length=253, pattern=SUBDOMAIN_PATTERN)]
LabelKey = Annotated[str, Field(min_length=1, max_length=317, pattern=LABEL_KEY_PATTERN)]
LabelValue = Annotated[str, Field(max_length=63, pattern=LABEL_VALUE_PATTERN)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=64), BeforeValidator(without_nulls)]
Text = Annotated[str, Field(max_length=1024)]


class OwnerReference(ResourceModel):
    """The object that this one goes away with."""

    api_version: Text
    kind: Text
    name: Subdomain
    uid: Text
    controller: bool | None = None
    block_owner_deletion: bool | None = None


class ObjectMeta(ResourceModel):
    """metav1.ObjectMeta; what the API server fills in is accepted and carried."""

    name: Subdomain
    namespace: ObjectName | None = None
    labels: Labels = Field(default_factory=dict)
    annotations: dict[LabelKey, str] = Field(default_factory=dict)
    uid: Text | None = None
    generation: Count | None = None
    resource_version: Text | None = None
    creation_timestamp: Time | None = None
    deletion_timestamp: Time | None = None
    deletion_grace_period_seconds: Count | None = None
    finalizers: Annotated[tuple[str, ...], Lax] = ()
    owner_references: Annotated[tuple[OwnerReference, ...], Lax] = ()
    managed_fields: Annotated[tuple[dict[str, JsonValue], ...], Lax] = ()
    self_link: Text | None = None


class SessionMeta(ObjectMeta):
    """Metadata of a session: its name is a DNS label that leaves room for its children's names."""

    name: SessionName


class LabelledMeta(ObjectMeta):
    """Metadata of an object whose name is a DNS label."""

    name: ObjectName


class Condition(ResourceModel):
    """metav1.Condition: one aspect of an object's state as last observed."""

    type: Annotated[str, Field(min_length=1, max_length=316)]
    """Which aspect."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(min_length=1, max_length=128, pattern="^[A-Z][A-Za-z0-9]*$")]
    """A constant in CamelCase."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """For people to read: the words of whoever said it."""
    last_transition_time: Time
    """When the status last changed."""
    observed_generation: Count | None = None
    """The generation of the spec that it was set for."""


Conditions = Annotated[
    tuple[Condition, ...],
    Field(
        strict=False,
        max_length=16,
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
        },
    ),
]


class LabelSelectorRequirement(ResourceModel):
    """One requirement on a label; all requirements of a selector must hold."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.operator in ['In', 'NotIn'] ? size(self.values) > 0 : size(self.values) == 0",
                "values: at least one with In and NotIn, none with Exists and DoesNotExist",
            )
        )
    )

    key: LabelKey
    """The label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """What is asked of it."""
    values: Annotated[tuple[LabelValue, ...], Field(strict=False, max_length=64)] = ()
    """Those that the label may have, or not have, with In and NotIn."""

    @model_validator(mode="after")
    def _values_fit_operator(self) -> LabelSelectorRequirement:
        listed = self.operator in {"In", "NotIn"}
        if listed != bool(self.values):
            allowed = "at least one value" if listed else "no value"
            raise refusal("values", list(self.values), f"{allowed} with operator {self.operator}")
        return self

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether `labels` meet this requirement; NotIn holds where the label is absent."""
        if self.operator == "In":
            return labels.get(self.key) in self.values
        if self.operator == "NotIn":
            return labels.get(self.key) not in self.values
        return (self.key in labels) is (self.operator == "Exists")


class LabelSelector(ResourceModel):
    """metav1.LabelSelector; an empty one selects everything."""

    match_labels: Labels = Field(default_factory=dict)
    """Labels that must have these values."""
    match_expressions: Annotated[
        tuple[LabelSelectorRequirement, ...], Field(strict=False, max_length=32)
    ] = ()
    """Other requirements; all must hold."""

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an object that carries `labels` is selected."""
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )


class Resource(ResourceModel):
    """An object of group esper.dev; each kind adds `spec` and `status`.

    The class variables are what a CustomResourceDefinition says beside its schema.
    """

    plural: ClassVar[str]
    singular: ClassVar[str]
    short_names: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[tuple[str, str, str], ...]]
    """Printer columns: (name, type, JSONPath)."""
    scale: ClassVar[dict[str, str] | None] = None
    selectable: ClassVar[tuple[str, ...]] = ()
    """What `kubectl get --field-selector` may name beside name and namespace: JSONPaths."""

    api_version: Literal["esper.dev/v1alpha1"]
