"""One look at a model as it runs: which layers are called, with what shapes, in which order.

The model's forward runs a few times in training and in evaluation mode. Nothing of that stays:
buffers, random streams, modes, attributes and gradients are as before, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from esper.contracts import nodes as contracts
from esper.core.positions import (
    CAUSAL,
    Inputs,
    Shape,
    batch_axes,
    batch_of,
    causal_layers,
    other_batches,
    refusal_to_mix,
    without_batch,
)
from esper.core.tracing import Dataflow, trace
from esper.execution.calls import host_input, unfused
from esper.execution.isolation import (
    preserved_buffers,
    preserved_parameters,
    preserved_randomness,
)
from esper.execution.kasmina_layer import KasminaLayer

NEVER_CALLED = "its forward is never called: a seed there would take no part"
TRAINING_ONLY = "its forward is called in training mode only: a seed there could not be measured"
EVALUATION_ONLY = "its forward is called in evaluation mode only: a seed there could not learn"
NO_TENSOR = "it is not called with one plain tensor"
NO_KERNELS = "no kernel is made for such shapes"

_UNBATCHED: Mapping[type[nn.Module], int] = {
    nn.Conv1d: 2,
    nn.Conv2d: 3,
    nn.BatchNorm2d: 3,
    nn.Embedding: 0,
}
"""The dimensions of an input without a batch, by kind; 1 for the others."""
_WINDOWED = (nn.Conv1d, nn.Conv2d, nn.BatchNorm2d)
"""Kinds that have the batch in front, or none, by their own rule."""


_SHAPE = TypeAdapter[Shape](contracts.Shape)


@dataclass(frozen=True)
class LayerShapes:
    """The shapes of a host's first call, without the dimensions that grow with the batch."""

    input: tuple[int, ...]
    output: tuple[int, ...]


@dataclass
class Probe:
    """What the probe found.

    `order` is the hosts in order of first call, `refused` names the others with the reason;
    `shapes` has an entry for each host, `unmixed` one for each whose positions may not look at each
    other, with the reason. `failure` is what the model raised where it ran in
    neither mode.
    """

    order: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, LayerShapes] = field(default_factory=dict)
    unmixed: dict[str, str] = field(default_factory=dict)
    dataflow: Dataflow = field(default_factory=Dataflow)
    failure: Exception | None = None


def probe(
    model: nn.Module,
    hosts: Mapping[str, KasminaLayer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Probe:
    """Run `model(*args, **kwargs)` in both modes, on copies of the inputs, and look.

    It also runs with another batch, and a few times with other values at one place.

    A mode in which the model raises (BatchNorm refuses a training batch of one) is left out; the
    layers are then judged by the other. The edges are those of the evaluation mode, the widen
    pairs those that both modes show; a model that can't be traced has neither, and each of its
    layers may be lent.
    """
    found = Probe()
    inputs: Inputs = (args, dict(kwargs))
    in_training, in_evaluation = (_look(model, hosts, inputs, mode) for mode in (True, False))
    found.dataflow = in_evaluation.dataflow
    if in_training.error is None:
        # A training-only head, say, would meet the units that widening gives the others.
        pairs = tuple(p for p in found.dataflow.pairs if p in in_training.dataflow.pairs)
        lent = found.dataflow.lent | in_training.dataflow.lent
        found.dataflow = replace(found.dataflow, pairs=pairs, lent=lent)
    looks = [look for look in (in_training, in_evaluation) if look.error is None]
    if not looks:
        found.failure = in_training.error
        return found
    training, evaluation, first = looks[0].calls, looks[-1].calls, looks[-1].calls
    for name in hosts:
        if name not in training and name not in evaluation:
            found.refused[name] = NEVER_CALLED
        elif name not in evaluation:
            found.refused[name] = TRAINING_ONLY
        elif name not in training:
            found.refused[name] = EVALUATION_ONLY
        elif not (training[name] or evaluation[name]):
            found.refused[name] = NO_TENSOR
    found.order = [name for name in first if name not in found.refused]
    for name in list(found.order):
        calls = [one for one in (look.of(name) for look in looks) if one.shapes]
        shapes = _shapes_of(hosts[name], calls[0])
        if not _told(shapes):
            found.refused[name] = f"{NO_KERNELS}: {shapes.input} to {shapes.output}"
            found.order.remove(name)
            continue
        found.shapes[name] = shapes
        reasons = (_refusal_to_mix(hosts[name], one, batch_of(inputs)) for one in calls)
        reason = next((reason for reason in reasons if reason), None)
        if reason is not None:
            found.unmixed[name] = reason
    left = found.dataflow.pairs
    pairs = tuple(p for p in left if p.producer in found.shapes and p.consumer in found.shapes)
    found.dataflow = replace(found.dataflow, pairs=pairs)
    causal = _causal(model, hosts, inputs, training=looks[-1] is in_training)
    for name in found.order:
        if name in causal:
            found.unmixed.setdefault(name, CAUSAL)
    return found


@dataclass
class _Calls:
    """The calls of one host with plain tensors, and what differs of them with the batch."""

    shapes: list[tuple[Shape, Shape]]
    axes: list[set[int]] | None


@dataclass
class _Look:
    """What the model does in one mode: its calls of hosts by name, or what it raised."""

    calls: dict[str, list[tuple[Shape, Shape]]]
    other: dict[str, list[tuple[Shape, Shape]]]
    error: Exception | None
    dataflow: Dataflow = field(default_factory=Dataflow)

    def of(self, name: str) -> _Calls:
        mine, others = self.calls.get(name, []), self.other.get(name, [])
        return _Calls(mine, batch_axes([read for read, _ in mine], [read for read, _ in others]))


def _look(
    model: nn.Module, hosts: Mapping[str, KasminaLayer], inputs: Inputs, training: bool
) -> _Look:
    with undisturbed(model), unfused():
        model.train(training)
        calls, error = _called(model, hosts, inputs)
        look = _Look(calls, {}, error)
        if error is None:
            look.dataflow = _traced(model, hosts, inputs, training=training)
    for other in other_batches(inputs) if error is None else ():
        with undisturbed(model), unfused():
            model.train(training)
            found, refused = _called(model, hosts, other)
        if refused is None:
            look.other = found
            break
    return look


def _causal(
    model: nn.Module, hosts: Mapping[str, KasminaLayer], inputs: Inputs, *, training: bool
) -> set[str]:
    def run(changed: Inputs) -> tuple[Any, dict[str, Any]]:
        marks: dict[str, Any] = {}

        def marking(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    both = torch.stack([output.double().sum(), output.double().square().sum()])
                    marks[name] = (*marks.get(name, ()), *both.tolist())

            return hook

        handles = [layer.register_forward_hook(marking(name)) for name, layer in hosts.items()]
        try:
            with undisturbed(model), unfused():
                model.train(training)
                return forwarded(model, changed), marks
        finally:
            for handle in handles:
                handle.remove()

    try:
        return causal_layers(inputs, run)
    # A model may refuse other values than it was given.
    except Exception:
        return set()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model may run without gradients; at the end it is as it was, to the bit.

    Parameters, buffers (also replaced ones), modes, plain attributes, the modules' own torch
    generators and the global random streams are put back. Objects that a forward changes in place
    are not seen, tensors in buffers and parameters aside, nor the other attributes of a scripted
    module.
    """
    # A scripted module's attributes lie in its code, its tables are no dicts.
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    modes = [(module, module.training) for module in scripted]
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(module, dict(module.__dict__)) for module in modules]
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table))
        for module in modules
        for table in cast("Any", (module._parameters, module._buffers, module._modules))
    ]
    generators = [
        (value, value.get_state())
        for module in modules
        for value in module.__dict__.values()
        if isinstance(value, torch.Generator)
    ]
    with (
        preserved_randomness(),
        preserved_buffers(model),
        preserved_parameters(model),
        torch.no_grad(),
    ):
        try:
            yield
        finally:
            for module, before in attributes:
                module.__dict__.clear()
                module.__dict__.update(before)
            for table, entries in tables:
                table.clear()
                table.update(entries)
            for generator, state in generators:
                generator.set_state(state)
            for module, training in modes:
                module.training = training
            # Casts of weights made here carry no graph, and autocast would hand them out again.
            torch.clear_autocast_cache()


def _called(
    model: nn.Module, hosts: Mapping[str, KasminaLayer], inputs: Inputs
) -> tuple[dict[str, list[tuple[Shape, Shape]]], Exception | None]:
    """The hosts that one forward calls, in order, with the shapes of each call on plain tensors.

    With them what the model raised.
    """
    called: dict[str, list[tuple[Shape, Shape]]] = {}

    def noting(name: str) -> Callable[..., None]:
        def hook(module: KasminaLayer, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            calls, read = called.setdefault(name, []), host_input(args, kwargs)
            if isinstance(read, Tensor) and isinstance(output, Tensor):
                calls.append((tuple(read.shape), tuple(output.shape)))

        return hook

    handles = [
        layer.register_forward_hook(noting(name), with_kwargs=True) for name, layer in hosts.items()
    ]
    try:
        forwarded(model, inputs)
    # Whatever the user's model raises is the probe's finding, not its failure.
    except Exception as error:
        return called, error
    finally:
        for handle in handles:
            handle.remove()
    return called, None


def _traced(
    model: nn.Module,
    hosts: Mapping[str, KasminaLayer],
    inputs: Inputs,
    *,
    training: bool,
) -> Dataflow:
    try:
        return trace(model, hosts, lambda: forwarded(model, inputs), training=training)[0]
    # A model that can't run under the trace has already run without it.
    except Exception:
        return Dataflow(lent=frozenset(hosts))


def forwarded(model: nn.Module, inputs: Inputs) -> Any:
    """What the model makes of a copy of the inputs."""
    args, kwargs = tree_map(_copied, inputs)
    return model(*args, **kwargs)


def _refusal_to_mix(layer: KasminaLayer, calls: _Calls, batch: int | None) -> str | None:
    shapes = [read for read, _ in calls.shapes]
    return refusal_to_mix(shapes, calls.axes, batch, windowed=layer.host_class in _WINDOWED)


def _shapes_of(layer: KasminaLayer, calls: _Calls) -> LayerShapes:
    read, made = calls.shapes[0]
    windowed = layer.host_class in _WINDOWED
    axes = calls.axes[0] if calls.axes and not windowed else set()
    kept = without_batch(read, axes, _UNBATCHED.get(layer.host_class, 1))
    if windowed:
        return LayerShapes(read[kept[0] :], made[kept[0] :])
    features = made[-1:] if layer.host_class is nn.Embedding else ()
    return LayerShapes(tuple(read[i] for i in kept), tuple(made[i] for i in kept) + features)


def _told(shapes: LayerShapes) -> bool:
    """Whether a kernel's target has words for these shapes."""
    try:
        for shape in (shapes.input, shapes.output):
            if shape:
                _SHAPE.validate_python(shape)
    except ValidationError:
        return False
    return True


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
