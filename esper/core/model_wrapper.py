"""`wrap` and `unwrap`: a model becomes able to grow, and becomes an ordinary model again.

Nothing is added to the model's tree. Its layers take on Kasmina subclasses of their own classes,
and the model itself a subclass of MorphableModel and its own class.
"""

from __future__ import annotations

import copy as copying
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self, SupportsIndex, cast, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from esper.contracts.nodes import DataType
from esper.core.compilation import decompile
from esper.core.folding import fold
from esper.core.morphology import ROOT, Morphology, geometry, release
from esper.errors import WrapError
from esper.execution.kasmina_layer import (
    GROWN,
    KASMINA_CLASSES,
    KasminaLayer,
    become,
    dormant_class,
    live_class,
)
from esper.execution.state_layout import GROWN_STATES, SeedLifecycleState

HOST_KINDS = tuple(host.__name__ for host in KASMINA_CLASSES)
DEFAULT_KINDS = ("Linear", "Conv2d")
_OUTER_WRAPPERS = (
    "DataParallel",
    "DistributedDataParallel",
    "FSDPModule",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "ScriptModule",
)


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """Which layers become hosts: by kind, and by name as glob patterns (`*` matches dots too).

    A layer is chosen if its kind is in `types`, its name matches one of `include` and none of
    `exclude`.
    """

    types: Sequence[str] = DEFAULT_KINDS
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.types) - set(HOST_KINDS))
        if unknown:
            raise WrapError("layers.types", ", ".join(unknown), ", ".join(HOST_KINDS))

    def chooses(self, name: str, kind: str) -> bool:
        """Whether the layer of this name and kind is chosen."""
        return (
            kind in self.types
            and any(fnmatchcase(name, pattern) for pattern in self.include)
            and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        )


class MorphableModel(nn.Module):
    """A model that can grow: also an instance of the class it was wrapped from.

    It behaves as that class does, saves, copies and pickles as that class does, and has one
    attribute more, `morphology`.
    """

    morphology: Morphology
    host_class: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **arguments: Any) -> None:
        """The host class does not hear of its subclass: its registry would hand out ours."""

    def statistics(self) -> dict[str, Any]:
        """See `Morphology.statistics`."""
        return self.morphology.statistics()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A slice of a wrapped Sequential is of this class too, and has no morphology of its own.
        morphology = self.__dict__.get("morphology")
        parameter = next(self.parameters(), None)
        if morphology is not None and parameter is not None:
            morphology.move(parameter.device)
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """As the model's own class reduces, but made anew from that class: ours has no address."""
        function, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        own = type(self)
        replaced = tuple(_Rebuilt if part is own else part for part in arguments)
        if replaced == tuple(arguments):
            return function, arguments, *rest
        kind = dormant_class(own)
        unprobed, live = issubclass(own, _ProbingAtFirstCall), kind is not own
        plan = tuple(None if part is _Rebuilt else part for part in replaced)
        return rebuild, (own.host_class, unprobed, live, function, plan), *rest


class _Rebuilt:
    """Marks, among a reduction's arguments, where the class belongs."""


class _ProbingAtFirstCall(MorphableModel):
    """A model wrapped without example inputs, until its first call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Probe with these inputs, become an ordinary MorphableModel, and run."""
        become(self, morphable_class(self.host_class, False))
        if "morphology" not in self.__dict__:
            return self.forward(*args, **kwargs)
        try:
            self.morphology.probe(*args, **kwargs)
        except WrapError:
            # The model refuses the inputs: it says so itself in a moment, and better.
            become(self, morphable_class(self.host_class, True))
            return self.host_class.forward(self, *args, **kwargs)
        return self.forward(*args, **kwargs)


def wrap(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    layers: LayerSelection | Sequence[str] | None = None,
    seeds_per_layer: int = 1,
    copy: bool = False,
) -> MorphableModel:
    """Make `model` able to grow, in place, and return it.

    Wrap before sharding and before `torch.compile`; before or after making the optimiser, for
    the model's parameters stay the same objects.

    Args:
        model: any module that holds layers which can host seeds, or is one.
        example_inputs: what the model is called with: a tensor, a tuple of positional arguments
            or a dict of keyword arguments. Left out, the model is probed when first called.
        layers: all `nn.Linear` and `nn.Conv2d` (None), a selection, which can name other kinds
            (Conv1d, LayerNorm, BatchNorm2d, Embedding) too, or the names of the layers.
        seeds_per_layer: slots a layer, at least 1.
        copy: wrap a deep copy and leave `model` as it is.

    Raises:
        WrapError: the model is wrapped already, has no layer that can host seeds, or a layer
            asked for by name can't.
    """
    if isinstance(seeds_per_layer, bool) or seeds_per_layer < 1:
        raise WrapError("seeds_per_layer", seeds_per_layer, "a whole number from 1")
    _refuse_unfit(model)
    if copy:
        model = copying.deepcopy(model)
    hosts, refused = _chosen(model, layers)
    base = KASMINA_CLASSES.get(type(model), type(model)) if ROOT in hosts else type(model)
    try:
        outer = morphable_class(base, example_inputs is None)
        for layer in hosts.values():
            if layer is not model:
                become(layer, KASMINA_CLASSES[type(layer)])
        become(model, outer)
    # A metaclass, or what classes are registered with, may raise anything.
    except Exception as error:
        _restore_classes(hosts.values())
        told = error if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
        raise WrapError(
            "model", type(model).__name__, f"a class that can be extended ({told})"
        ) from error
    assert isinstance(model, MorphableModel)
    kasmina = {name: layer for name, layer in hosts.items() if isinstance(layer, KasminaLayer)}
    morphology = Morphology(model, kasmina, refused, seeds_per_layer=seeds_per_layer)
    model.__dict__["morphology"] = morphology
    if example_inputs is not None:
        try:
            _probe(morphology, example_inputs)
            _refuse_empty(morphology, layers)
        except WrapError:
            unwrap(model)
            raise
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Make a wrapped model an ordinary one again, in place, and return it.

    Seeds that are not fossilized go; without fossilized ones the model is what it was before
    `wrap`. Fossilized seeds stay as plain torch: folded into their layers where that is exact,
    else as torch-only modules: the layers stay the same objects.

    Raises:
        WrapError: the model is not wrapped.
    """
    if not isinstance(model, MorphableModel):
        raise WrapError("model", type(model).__name__, "a model that wrap has returned")
    morphology = model.morphology
    fossils = False
    for name, layer in list(morphology.layers.items()):
        for slot in list(layer.site.branches):
            state = morphology.state(name, slot)
            if state is SeedLifecycleState.FOSSILIZED:
                fossils = True
                continue
            if state in GROWN_STATES:
                morphology.transition(name, slot, SeedLifecycleState.CULLED)
            morphology.remove(name, slot)
    if fossils:
        return fold(morphology, lambda: discard_wrapping(model))
    return discard_wrapping(model)


def discard_wrapping(model: MorphableModel) -> nn.Module:
    """Give a model that holds no seed, and its layers, their own classes back."""
    decompile(model)
    layers = [layer for layer in model.modules() if isinstance(layer, KasminaLayer)]
    host_class = model.host_class
    del model.__dict__["morphology"]
    become(model, host_class)
    for layer in layers:
        release(layer)
    return model


def morphable_class(host_class: type[nn.Module], unprobed: bool) -> type[MorphableModel]:
    """The subclass of MorphableModel and `host_class`, under the latter's name; one a pair."""
    key = (host_class, unprobed)
    if key not in _CLASSES:
        _CLASSES[key] = _new_class(host_class, unprobed)
    return _CLASSES[key]


_CLASSES: dict[tuple[type[nn.Module], bool], type[MorphableModel]] = {}


def _new_class(host_class: type[nn.Module], unprobed: bool) -> type[MorphableModel]:
    first = _ProbingAtFirstCall if unprobed else MorphableModel
    namespace = {
        "__module__": host_class.__module__,
        "__qualname__": host_class.__qualname__,
        "__doc__": host_class.__doc__,
        "host_class": host_class,
    }
    if hasattr(host_class, "statistics"):
        namespace["statistics"] = host_class.statistics
    return types.new_class(
        host_class.__name__, (first, host_class), exec_body=lambda body: body.update(namespace)
    )


def rebuild(
    host_class: type[nn.Module],
    unprobed: bool,
    live: bool,
    function: Callable[..., nn.Module],
    plan: tuple[Any, ...],
) -> nn.Module:
    """Make an empty instance of a wrapped class, for pickle and deepcopy to fill.

    `live` is for a model that is itself a host layer. `function` is how the class itself is
    rebuilt, and `plan` its arguments, None for the class.
    """
    own: type[nn.Module] = morphable_class(host_class, unprobed)
    if live:
        own = live_class(own)
    return function(*(own if part is None else part for part in plan))


def refusal(layer: nn.Module) -> str | None:
    """Why a layer that looks like a host can't be one; None where it can, or is of another kind."""
    kind = type(layer)
    if kind not in KASMINA_CLASSES:
        return _refusal_of_kind(layer)
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    if GROWN in layer._modules:
        return "seeds of an earlier wrap stay beside it"
    if "weight" not in layer._parameters or not _may_have(layer, "bias"):
        return "its weight is computed (weight or spectral norm): remove the norm first"
    weight = layer._parameters["weight"]
    if weight is None:
        return "it has no weight: a seed would not know its dtype and device"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not real"
    if str(weight.dtype).removeprefix("torch.") not in get_args(DataType):
        return f"its weight is {weight.dtype}: kernels are {', '.join(get_args(DataType))}"
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
        return f"it normalises over {len(layer.normalized_shape)} dimensions, not over one"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "its forward changes its weight (max_norm)"
    try:
        geometry(layer)
    except ValidationError as error:
        first = error.errors()[0]
        sizes = f"{'.'.join(map(str, first['loc']))} {first['input']}"
        return f"no kernel is made for its sizes: {sizes} ({first['msg']})"
    return None


def _may_have(layer: nn.Module, name: str) -> bool:
    """Whether `name` is a parameter (or None) of the layer, or nothing its kind has at all."""
    return name in layer._parameters or not hasattr(layer, name)


def _refusal_of_kind(layer: nn.Module) -> str | None:
    kind, host = type(layer), host_kind(layer)
    if host is None:
        return None
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its forward is never called: MultiheadAttention reads its weight directly"
    if parametrize.is_parametrized(layer):
        return "it is parametrized: its weight is computed"
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is scripted"
    if any("quant" in base.__module__ for base in kind.__mro__):
        return "it is quantised"
    return f"it is a {kind.__name__}, a subclass; hosts are exactly nn.{host}"


def host_kind(layer: nn.Module) -> str | None:
    """The kind of host that a layer is, or looks like; None for any other module."""
    for host in KASMINA_CLASSES:
        if isinstance(layer, host):
            return host.__name__
    # Quantised and scripted layers are no subclasses of what they were made from.
    name = getattr(layer, "original_name", type(layer).__name__)
    foreign = isinstance(layer, torch.jit.ScriptModule) or "quant" in type(layer).__module__
    return name if foreign and name in HOST_KINDS else None


def _chosen(
    model: nn.Module, layers: LayerSelection | Sequence[str] | None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to become hosts, and those of a fitting kind that can't, with the reason."""
    if isinstance(layers, str):
        raise WrapError("layers", layers, "a LayerSelection or a list of layer names")
    selection = layers if isinstance(layers, LayerSelection) else LayerSelection()
    named = None if layers is None or isinstance(layers, LayerSelection) else set(layers)
    hosts: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    for path, layer in model.named_modules():
        name = path or ROOT
        # What an earlier wrap has grown is no place to grow at.
        if (named is not None and name not in named) or GROWN in path.split("."):
            continue
        kind = host_kind(layer)
        if kind is None or (named is None and kind not in selection.types):
            continue
        reason = refusal(layer)
        if reason is not None:
            if named is not None:
                raise WrapError(f"layers: {name}", reason, "layers that can host seeds")
            refused[name] = reason
        elif named is not None or selection.chooses(name, kind):
            hosts[name] = layer
    missing = sorted((named or set()) - set(hosts))
    if missing:
        possible = [n or ROOT for n, m in model.named_modules() if type(m) in KASMINA_CLASSES]
        raise WrapError("layers", ", ".join(missing), ", ".join(possible) or "none: no such layers")
    if not hosts:
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise WrapError(
            "model",
            f"{type(model).__name__} without a layer that can host ({why or 'none fits'})",
            f"a model with at least one layer that `layers` chooses: {', '.join(selection.types)}",
        )
    return hosts, refused


def _refuse_unfit(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise WrapError("model", type(model).__name__, "an nn.Module")
    if any(isinstance(module, MorphableModel | KasminaLayer) for module in model.modules()):
        raise WrapError("model", f"{type(model).__name__}, wrapped already", "a plain model")
    for ancestor in type(model).__mro__:
        if ancestor.__name__ in _OUTER_WRAPPERS:
            raise WrapError("model", ancestor.__name__, "the model inside: wrap it first")
    if any(is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        raise WrapError(
            "model", "uninitialised (lazy) parameters", "a model that has run once, so has shapes"
        )
    contents = {**model._modules, **model._parameters, **model._buffers}
    for name in ("morphology", "host_class", "statistics"):
        # A method of this name is the user's own; a part would hide behind ours.
        if name in contents or (name != "statistics" and hasattr(model, name)):
            raise WrapError("model", f"an attribute named {name}", "a model without one")


def _probe(morphology: Morphology, example_inputs: Any) -> None:
    if isinstance(example_inputs, Mapping):
        morphology.probe(**example_inputs)
    elif isinstance(example_inputs, tuple | list):
        morphology.probe(*example_inputs)
    else:
        morphology.probe(example_inputs)


def _refuse_empty(morphology: Morphology, layers: LayerSelection | Sequence[str] | None) -> None:
    asked = () if layers is None or isinstance(layers, LayerSelection) else layers
    for name in asked:
        if name in morphology.refused:
            raise WrapError(f"layers: {name}", morphology.refused[name], "layers that can host")
    if not morphology.layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in morphology.refused.items())
        raise WrapError(
            "layers", why or "no layer of the model", "at least one layer that can host seeds"
        )


def _restore_classes(layers: Any) -> None:
    for layer in layers:
        if isinstance(layer, KasminaLayer):
            become(layer, layer.host_class)
