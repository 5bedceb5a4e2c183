"""One look at a model as it runs: which layers are called, with what shapes, in which order.

The model's forward runs once in training and once in evaluation mode. Nothing of that stays:
buffers, random streams, modes, attributes and gradients are as before, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from esper.core.tracing import Dataflow, trace
from esper.execution.calls import host_input, unfused
from esper.execution.isolation import (
    evaluating,
    preserved_buffers,
    preserved_parameters,
    preserved_randomness,
)
from esper.execution.kasmina_layer import KasminaLayer

NEVER_CALLED = "its forward is never called: a seed there would take no part"
TRAINING_ONLY = "its forward is called in training mode only: a seed there could not be measured"
EVALUATION_ONLY = "its forward is called in evaluation mode only: a seed there could not learn"
NO_TENSOR = "it is not called with one plain tensor"

_UNBATCHED: Mapping[type[nn.Module], int] = {
    nn.Conv1d: 2,
    nn.Conv2d: 3,
    nn.BatchNorm2d: 3,
    nn.Embedding: 0,
}
"""The dimensions of an input without a batch, by kind; 1 for the others."""


@dataclass(frozen=True)
class LayerShapes:
    """The shapes of a host's first call, without the batch dimension where there is one."""

    input: tuple[int, ...]
    output: tuple[int, ...]


@dataclass
class Probe:
    """What the probe found.

    `order` is the hosts in order of first call, `refused` names the others with the reason;
    `shapes` has an entry for each host. `failure` is what the model raised where it ran in
    neither mode.
    """

    order: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, LayerShapes] = field(default_factory=dict)
    dataflow: Dataflow = field(default_factory=Dataflow)
    failure: Exception | None = None


def probe(
    model: nn.Module,
    hosts: Mapping[str, KasminaLayer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Probe:
    """Run `model(*args, **kwargs)` in both modes, on copies of the inputs, and look.

    A mode in which the model raises (BatchNorm refuses a training batch of one) is left out; the
    layers are then judged by the other. The edges are those of the evaluation mode, the widen
    pairs those that both modes show; a model that can't be traced has neither, and each of its
    layers may be lent.
    """
    found = Probe()
    shapes: dict[str, LayerShapes] = {}

    def forward() -> Any:
        own_args, own_kwargs = tree_map(_copied, (args, dict(kwargs)))
        return model(*own_args, **own_kwargs)

    in_training = Dataflow()
    with undisturbed(model):
        model.train()
        called_training, training_error = _called(hosts, shapes, forward)
        if training_error is None:
            in_training = _traced(model, hosts, forward, training=True)
    with undisturbed(model), evaluating(model), unfused():
        called_evaluation, evaluation_error = _called(hosts, shapes, forward)
        if evaluation_error is None:
            found.dataflow = _traced(model, hosts, forward, training=False)
    if training_error is None:
        # A training-only head, say, would meet the units that widening gives the others.
        pairs = tuple(pair for pair in found.dataflow.pairs if pair in in_training.pairs)
        lent = found.dataflow.lent | in_training.lent
        found.dataflow = replace(found.dataflow, pairs=pairs, lent=lent)
    if training_error is not None and evaluation_error is not None:
        found.failure = training_error
        return found
    training = called_training if training_error is None else called_evaluation
    evaluation = called_evaluation if evaluation_error is None else called_training
    first = called_evaluation if evaluation_error is None else called_training
    for name in hosts:
        if name not in training and name not in evaluation:
            found.refused[name] = NEVER_CALLED
        elif name not in evaluation:
            found.refused[name] = TRAINING_ONLY
        elif name not in training:
            found.refused[name] = EVALUATION_ONLY
        elif name not in shapes:
            found.refused[name] = NO_TENSOR
    found.order = [name for name in first if name not in found.refused]
    found.shapes = {name: shapes[name] for name in found.order}
    return found


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
    hosts: Mapping[str, KasminaLayer],
    shapes: dict[str, LayerShapes],
    forward: Callable[[], Any],
) -> tuple[dict[str, None], Exception | None]:
    """The hosts that one forward calls, in order, and what it raised; notes their shapes."""
    called: dict[str, None] = {}

    def noting(name: str) -> Callable[..., None]:
        def hook(module: KasminaLayer, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            called[name] = None
            read = host_input(args, kwargs)
            if name not in shapes and isinstance(read, Tensor) and isinstance(output, Tensor):
                shapes[name] = _shapes_of(module, read, output)

        return hook

    handles = [
        layer.register_forward_hook(noting(name), with_kwargs=True) for name, layer in hosts.items()
    ]
    try:
        forward()
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
    forward: Callable[[], Any],
    *,
    training: bool,
) -> Dataflow:
    try:
        return trace(model, hosts, forward, training=training)[0]
    # A model that can't run under the trace has already run without it.
    except Exception:
        return Dataflow(lent=frozenset(hosts))


def _shapes_of(module: KasminaLayer, read: Tensor, made: Tensor) -> LayerShapes:
    skip = 0 if read.dim() == _UNBATCHED.get(module.host_class, 1) else 1
    return LayerShapes(tuple(read.shape[skip:]), tuple(made.shape[skip:]))


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
