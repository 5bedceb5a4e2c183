"""What fossilized seeds come to when Esper leaves: larger or changed plain layers, or torch code.

A plan says for each layer what its own weight becomes and which seeds stay beside it; `fold`
carries it out on the model, and `esper.core.export` writes it as source.

Legend: o = outputs, i = inputs, … = a convolution's window, u = new units.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from esper.contracts.ir import (
    Conv1dNode,
    Conv2dNode,
    Graph,
    InputNode,
    LayerGeometry,
    LinearNode,
    Node,
    inputs_of,
)
from esper.contracts.shapes import POSITION_AXES
from esper.core.affine import Affine, affine_map
from esper.core.morphology import Morphology, geometry
from esper.core.tracing import WidenPair
from esper.errors import WrapError
from esper.execution.branches import Branch
from esper.execution.builders import submodule_name
from esper.execution.kasmina_layer import GROWN, KasminaLayer
from esper.execution.state_layout import SeedLifecycleState

NO_CHANGE = Affine(None, None)
FOLDED = "folded into the layer's weight"
KEPT = "beside the layer"


@dataclass
class LayerPlan:
    """What one layer becomes.

    `weight` and `bias` are the layer's own in the end; `sizes` are its sizes before growth. `kept`
    are the seeds that stay modules, by slot; `notes` says for each slot what became of it. `tied`
    says that another layer has a parameter of this one; `feeds` names the (layer, slot) of kept
    seeds that read this layer's input.
    """

    name: str
    layer: KasminaLayer
    sizes: LayerGeometry
    weight: Tensor
    bias: Tensor | None
    tied: bool = False
    kept: dict[int, Branch] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    rows: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    feeds: list[tuple[str, int]] = field(default_factory=list)

    @property
    def is_root(self) -> bool:
        """Whether the layer is the whole model."""
        return "morphology" in self.layer.__dict__

    @property
    def new_outputs(self) -> int:
        """How many units the layer has gained."""
        if not self._grows:
            return 0
        return int(self.weight.shape[0]) - self.sizes.outputs

    @property
    def new_inputs(self) -> int:
        """How many units its producer has gained."""
        if not self._grows:
            return 0
        return int(self.weight.shape[1]) * self.sizes.groups - self.sizes.inputs

    @property
    def axis(self) -> int:
        """The dimension of an activation that counts units, from the end."""
        return -1 - POSITION_AXES[self.sizes.kind]

    @property
    def _grows(self) -> bool:
        return isinstance(self.layer, nn.Linear | nn.Conv1d | nn.Conv2d)


def plan(morphology: Morphology) -> dict[str, LayerPlan]:
    """The plans of all layers that growth has changed, by name, in execution order.

    The model is left as it is. Tensors are copies.
    """
    owners = Counter(id(p) for p in _all_parameters(morphology.model))
    plans = {name: _unchanged(name, layer, owners) for name, layer in morphology.layers.items()}
    for name, layer in morphology.layers.items():
        fossils = {
            slot: branch
            for slot, branch in sorted(layer.site.branches.items())
            if morphology.state(name, slot) is SeedLifecycleState.FOSSILIZED
        }
        _settle_layer(plans, morphology, name, fossils)
    for one in plans.values():
        _concatenate(one)
    return {name: one for name, one in plans.items() if one.notes or one.rows or one.feeds}


def fold(morphology: Morphology, discard: Callable[[], nn.Module]) -> nn.Module:
    """Fold what has grown into the model that `discard` unwraps, and return that.

    Raises:
        WrapError: a seed that reads its producer's input is no widening, so that only source
            code can express it.
    """
    plans = plan(morphology)
    for one in plans.values():
        if one.feeds:
            raise WrapError(
                f"{one.feeds[0][0]}[{one.feeds[0][1]}]",
                "a seed that reads its producer's input and does not fold",
                "a widening; export writes any other as source code",
            )
    for layer in morphology.layers.values():
        layer.shed()
    model = discard()
    for one in plans.values():
        _resize(model, one.layer, one)
        if one.kept:
            keep_unfused(model, one.layer)
            _keep_seeds(one.layer, one)
    return model


def keep_unfused(model: nn.Module, layer: nn.Module) -> None:
    """Keep the encoder layers around `layer` from reading its weight and passing over its seeds."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds(module, layer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and _holds(module, layer):
            module.use_nested_tensor = False


def _unchanged(name: str, layer: KasminaLayer, owners: Counter[int]) -> LayerPlan:
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    return LayerPlan(
        name=name,
        layer=layer,
        sizes=geometry(layer),
        weight=weight.detach().clone(),
        bias=None if bias is None else bias.detach().clone(),
        tied=any(owners[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)),
    )


def _settle_layer(
    plans: dict[str, LayerPlan],
    morphology: Morphology,
    name: str,
    fossils: Mapping[int, Branch],
) -> None:
    own = plans[name]
    changes = {
        slot: affine_map(branch.graph, branch.module, own.layer, own.sizes)
        for slot, branch in fossils.items()
        if branch.graph is not None and branch.source != "producer"
    }
    if name in morphology.lent:
        # Who reads the weight from outside must find what it found before.
        changes = {slot: change for slot, change in changes.items() if change == NO_CHANGE}
    # A seed that reads the output reads the layer's own: nothing may be folded into it then.
    watched = any(
        branch.source == "output" and changes.get(slot) is None for slot, branch in fossils.items()
    )
    for slot, branch in fossils.items():
        change = changes.get(slot)
        if change is not None and (not watched or change == NO_CHANGE):
            _add(own, change)
            own.notes[slot] = FOLDED
        elif branch.source != "producer" or not _concatenated(
            plans, morphology, own, slot, branch, watched
        ):
            own.kept[slot] = branch
            own.notes[slot] = KEPT


def _concatenated(
    plans: dict[str, LayerPlan],
    morphology: Morphology,
    own: LayerPlan,
    slot: int,
    branch: Branch,
    watched: bool,
) -> bool:
    """Plan a widening as larger layers; False where it is none, and then the producer feeds it."""
    pair = next(pair for pair in morphology.pairs if pair.consumer == own.name)
    producer = plans[pair.producer]
    widening = None if watched else _widening(branch, pair, producer.sizes, own.sizes)
    if widening is None:
        producer.feeds.append((own.name, slot))
        return False
    first, last = widening
    rows, row_bias = _parameters(first)
    columns, shift = _parameters(last)
    producer.rows.append((rows, row_bias))
    own.columns.append(columns)
    if shift is not None:
        _add(own, Affine(None, shift.double()))
    own.notes[slot] = f"{rows.shape[0]} units between {pair.producer} and {own.name}"
    return True


def _widening(
    branch: Branch, pair: WidenPair, producer: LayerGeometry, host: LayerGeometry
) -> tuple[nn.Module, nn.Module] | None:
    """The two layers of a seed that is: like the producer, the traced chain, like the host."""
    path = _straight_path(branch.graph)
    if path is None or len(path) != len(pair.chain) + 3:
        return None
    first, *between, last = path[1:]
    for node, op in zip(between, pair.chain, strict=True):
        if node.model_dump(exclude={"id", "input"}) != op.model_dump():
            return None
    if not (is_like(first, producer) and is_like(last, host)):
        return None
    return (
        branch.module.get_submodule(submodule_name(first.id)),
        branch.module.get_submodule(submodule_name(last.id)),
    )


def _straight_path(graph: Graph | None) -> Sequence[Node] | None:
    """The nodes in order, if each reads the one before and the last is the output."""
    if graph is None or not isinstance(graph.nodes[0], InputNode):
        return None
    for before, node in zip(graph.nodes, graph.nodes[1:], strict=False):
        if inputs_of(node) != (before.id,):
            return None
    return graph.nodes


def is_like(node: Node, layer: LayerGeometry) -> bool:
    """Whether a node is a layer of this kind and window, in one group."""
    if isinstance(node, LinearNode):
        return layer.kind == "Linear"
    if not isinstance(node, Conv1dNode | Conv2dNode) or layer.groups != 1 or node.groups != 1:
        return False
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return all(getattr(node, name) == getattr(layer, name) for name in names)


def _add(own: LayerPlan, change: Affine) -> None:
    # In double precision, rounded once: two roundings would part further from what was trained.
    if change.matrix is not None:
        own.weight = (own.weight.double() + change.matrix).to(own.weight.dtype)
    if change.shift is not None:
        bias = torch.zeros(own.sizes.outputs) if own.bias is None else own.bias
        own.bias = (bias.double().to(change.shift.device) + change.shift).to(own.weight.dtype)


def _concatenate(own: LayerPlan) -> None:
    """[[weight, columns], [rows, 0]]: new units read the old inputs only, as they were trained."""
    if own.columns:
        own.weight = torch.cat([own.weight, *own.columns], dim=1)
    for rows, row_bias in own.rows:
        padded = rows.new_zeros(rows.shape[0], *own.weight.shape[1:])
        padded[:, : own.sizes.inputs] = rows
        own.weight = torch.cat([own.weight, padded], dim=0)
        if own.bias is None and row_bias is not None:
            own.bias = own.weight.new_zeros(own.weight.shape[0] - rows.shape[0])
        if own.bias is not None:
            added = rows.new_zeros(rows.shape[0]) if row_bias is None else row_bias
            own.bias = torch.cat([own.bias, added])


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    bias = module._parameters.get("bias")
    weight = module.get_parameter("weight").detach().clone()
    return weight, None if bias is None else bias.detach().clone()


def _resize(model: nn.Module, layer: nn.Module, own: LayerPlan) -> None:
    """Give a plain layer its new weight and bias, in place where their shapes and owners allow."""
    for name, value in (("weight", own.weight), ("bias", own.bias)):
        old = layer._parameters.get(name)
        if value is None or (old is not None and _same(old, value)):
            continue
        shared = sum(parameter is old for parameter in _all_parameters(model)) > 1
        if old is not None and old.shape == value.shape and not shared:
            with torch.no_grad():
                old.copy_(value)
        else:
            learns = old is None or old.requires_grad
            layer.register_parameter(name, nn.Parameter(value, requires_grad=learns))
    outputs, inputs = own.sizes.outputs + own.new_outputs, own.sizes.inputs + own.new_inputs
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        layer.out_channels, layer.in_channels = outputs, inputs
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = outputs, inputs


def _keep_seeds(layer: nn.Module, own: LayerPlan) -> None:
    """Leave a plain layer with the seeds that stay beside it, under their names, and add them.

    The layer keeps its class, its keys, its hooks and what refers to it. Adding is a forward hook
    ahead of the user's: code of torch alone, which copies and pickles with the layer.
    """
    layer.add_module(GROWN, nn.ModuleDict({str(s): b.module for s, b in own.kept.items()}))
    layer.register_forward_hook(adding(own), prepend=True, with_kwargs=True)


def adding(own: LayerPlan) -> fx.GraphModule:
    """A forward hook of the layer that adds what its kept seeds give to its output.

    Called as (module, args, kwargs, output).
    """
    graph = fx.Graph()
    layer, args, kwargs, out = map(graph.placeholder, ("layer", "args", "kwargs", "output"))
    # The layer's input, by position or by name.
    padded = graph.call_function(operator.add, (args, (None,)))
    first = graph.call_function(operator.getitem, (padded, 0))
    source = graph.call_method("get", (kwargs, "input", first))
    grown = graph.call_function(getattr, (layer, GROWN))
    host = out
    for slot, branch in own.kept.items():
        extra, read = (own.new_inputs, source)
        if branch.source == "output":
            extra, read = (own.new_outputs, host)
        if extra:
            size = own.sizes.outputs if branch.source == "output" else own.sizes.inputs
            read = graph.call_function(torch.narrow, (read, own.axis, 0, size))
        module = graph.call_function(operator.getitem, (grown, str(slot)))
        seed = graph.call_method("__call__", (module, read))
        seed = graph.call_method("type_as", (seed, host))
        if own.new_outputs:
            # The new units are no seed's business: they lie behind the layer's own.
            behind = [0, 0] * (-own.axis - 1) + [0, own.new_outputs]
            seed = graph.call_function(F.pad, (seed, behind))
        out = graph.call_function(torch.add, (out, seed))
    graph.output(out)
    graph.lint()
    return fx.GraphModule(nn.Module(), graph, class_name="Adding")


def _same(old: Tensor, value: Tensor) -> bool:
    return old.shape == value.shape and torch.equal(old, value)


def _all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of every module; one that two modules share comes twice."""
    return [p for module in model.modules() for p in module._parameters.values() if p is not None]


def _holds(module: nn.Module, layer: nn.Module) -> bool:
    return any(inner is layer for inner in module.modules())
