"""What fossilized seeds come to when Esper leaves: larger or changed plain layers, or torch code.

A plan says for each layer what its own weight becomes and which seeds stay beside it; `fold`
carries it out on the model, and `esper.core.export` writes it as source.

Legend: o = outputs, i = inputs, k and l = window height and width, u = new units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from esper.contracts.ir import (
    Conv2dNode,
    Graph,
    InputNode,
    LayerGeometry,
    LinearNode,
    Node,
    inputs_of,
)
from esper.core.affine import Affine, affine_map
from esper.core.morphology import Morphology, geometry
from esper.core.tracing import WidenPair
from esper.errors import WrapError
from esper.execution.builders import submodule_name
from esper.execution.kasmina_layer import Branch, KasminaLayer, become
from esper.execution.state_layout import SeedLifecycleState

FOLDED = "folded into the layer's weight"
KEPT = "beside the layer"


@dataclass
class LayerPlan:
    """What one layer becomes.

    `weight` and `bias` are the layer's own in the end, (o, i) or (o, i, k, l) and (o); `outputs`
    and `inputs` its sizes before growth. `kept` are the seeds that stay modules, by slot; `notes`
    says for each slot what became of it. `tied` says that another layer has a parameter of this
    one; `feeds` names the (layer, slot) of kept seeds that read this layer's input.
    """

    name: str
    layer: KasminaLayer
    weight: Tensor
    bias: Tensor | None
    outputs: int
    inputs: int
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
        return int(self.weight.shape[0]) - self.outputs

    @property
    def new_inputs(self) -> int:
        """How many units its producer has gained."""
        return int(self.weight.shape[1]) * self.groups - self.inputs

    @property
    def groups(self) -> int:
        """Into how many groups a convolution is cut."""
        return self.layer.groups if isinstance(self.layer, nn.Conv2d) else 1

    @property
    def axis(self) -> int:
        """The dimension of an activation that counts units, from the end."""
        return -3 if isinstance(self.layer, nn.Conv2d) else -1


def plan(morphology: Morphology) -> dict[str, LayerPlan]:
    """The plans of all layers that growth has changed, by name, in execution order.

    The model is left as it is. Tensors are copies.
    """
    owners = Counter(id(p) for p in _all_parameters(morphology.model))
    plans = {name: _unchanged(name, layer, owners) for name, layer in morphology.layers.items()}
    for name, layer in morphology.layers.items():
        for slot, branch in sorted(layer.site.branches.items()):
            if morphology.state(name, slot) is SeedLifecycleState.FOSSILIZED:
                _settle(plans, morphology, name, slot, branch)
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
        if one.kept:
            keep_unfused(model, one.layer)
            _become_grown(one.layer, one)
        else:
            _resize(model, one.layer, one)
    return model


def keep_unfused(model: nn.Module, layer: nn.Module) -> None:
    """Keep the encoder layers around `layer` from reading its weight and passing over its seeds."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds(module, layer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and _holds(module, layer):
            module.use_nested_tensor = False


def _unchanged(name: str, layer: KasminaLayer, owners: Counter[int]) -> LayerPlan:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    sizes = geometry(layer)
    return LayerPlan(
        name=name,
        layer=layer,
        weight=weight.detach().clone(),
        bias=None if bias is None else bias.detach().clone(),
        outputs=sizes.outputs,
        inputs=sizes.inputs,
        tied=any(owners[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)),
    )


def _settle(
    plans: dict[str, LayerPlan], morphology: Morphology, name: str, slot: int, branch: Branch
) -> None:
    own = plans[name]
    if branch.graph is not None and branch.tap is None:
        change = affine_map(branch.graph, branch.module, geometry(own.layer))
        if change is not None:
            _add(own, change)
            own.notes[slot] = FOLDED
            return
    if branch.tap is not None:
        pair = next(pair for pair in morphology.pairs if pair.consumer == name)
        producer = plans[pair.producer]
        widening = _widening(branch, pair, geometry(producer.layer), geometry(own.layer))
        if widening is not None:
            first, last = widening
            rows, row_bias = _parameters(first)
            columns, shift = _parameters(last)
            producer.rows.append((rows, row_bias))
            own.columns.append(columns)
            if shift is not None:
                _add(own, Affine(None, shift.double()))
            own.notes[slot] = f"{rows.shape[0]} units between {pair.producer} and {name}"
            return
        producer.feeds.append((name, slot))
    own.kept[slot] = branch
    own.notes[slot] = KEPT


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
    assert isinstance(first, LinearNode | Conv2dNode)
    assert isinstance(last, LinearNode | Conv2dNode)
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
    if not isinstance(node, Conv2dNode) or layer.kind != "Conv2d":
        return False
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    same = all(getattr(node, name) == getattr(layer, name) for name in names)
    return same and node.groups == layer.groups == 1


def _add(own: LayerPlan, change: Affine) -> None:
    # In double precision, rounded once: two roundings would part further from what was trained.
    if change.matrix is not None:
        own.weight = (own.weight.double() + change.matrix).to(own.weight.dtype)
    if change.shift is not None:
        bias = torch.zeros(own.outputs) if own.bias is None else own.bias
        own.bias = (bias.double().to(change.shift.device) + change.shift).to(own.weight.dtype)


def _concatenate(own: LayerPlan) -> None:
    """[[weight, columns], [rows, 0]]: new units read the old inputs only, as they were trained."""
    if own.columns:
        own.weight = torch.cat([own.weight, *own.columns], dim=1)
    for rows, row_bias in own.rows:
        padded = rows.new_zeros(rows.shape[0], *own.weight.shape[1:])
        padded[:, : own.inputs] = rows
        own.weight = torch.cat([own.weight, padded], dim=0)
        if own.bias is None and row_bias is not None:
            own.bias = own.weight.new_zeros(own.weight.shape[0] - rows.shape[0])
        if own.bias is not None:
            added = rows.new_zeros(rows.shape[0]) if row_bias is None else row_bias
            own.bias = torch.cat([own.bias, added])


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    assert isinstance(module, nn.Linear | nn.Conv2d)
    bias = None if module.bias is None else module.bias.detach().clone()
    return module.weight.detach().clone(), bias


def _resize(model: nn.Module, layer: nn.Module, own: LayerPlan) -> None:
    """Give a plain layer its new weight and bias, in place where their shapes and owners allow."""
    for name, value in (("weight", own.weight), ("bias", own.bias)):
        old = layer._parameters[name]
        shared = sum(parameter is old for parameter in _all_parameters(model)) > 1
        if old is not None and value is not None and old.shape == value.shape and not shared:
            with torch.no_grad():
                old.copy_(value)
        else:
            layer.register_parameter(name, _parameter(old, value))
    _note_sizes(layer, own)


def _note_sizes(layer: nn.Module, own: LayerPlan) -> None:
    outputs, inputs = own.outputs + own.new_outputs, own.inputs + own.new_inputs
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = outputs, inputs
    else:
        layer.out_features, layer.in_features = outputs, inputs  # type: ignore[assignment]


def _become_grown(layer: nn.Module, own: LayerPlan) -> None:
    """Turn a plain layer into the module of it and its seeds, in place.

    In place, so that the model's own references to it, in lists say, lead to what grew. Its sizes,
    its hooks and what the user hung on it stay; `meta` keeps them through deepcopy.
    """
    _note_sizes(layer, own)
    grown = as_graph_module(own)
    held = ("_parameters", "_buffers", "_modules")
    kept = {name: value for name, value in layer.__dict__.items() if name not in held}
    layer.__dict__.update(vars(grown) | kept)
    become(layer, type(grown))
    assert isinstance(layer, fx.GraphModule)
    hooks = {name: value for name, value in kept.items() if "_forward_" in name}
    plain = {name: value for name, value in kept.items() if not name.startswith("_")}
    layer.meta["_user_preserved_attributes"] = hooks | plain


def as_graph_module(own: LayerPlan) -> fx.GraphModule:
    """The layer and the seeds that stay beside it, as a module of torch alone.

    It has `weight`, `bias` and `grown.<slot>` where the layer had them.
    """
    layer = own.layer
    root = nn.Module()
    root.register_parameter("weight", _parameter(layer._parameters["weight"], own.weight))
    root.register_parameter("bias", _parameter(layer._parameters["bias"], own.bias))
    root.add_module("grown", nn.ModuleDict({str(s): b.module for s, b in own.kept.items()}))
    graph = fx.Graph()
    source = graph.placeholder("input", type_expr=Tensor)
    weight = graph.get_attr("weight")
    bias = None if own.bias is None else graph.get_attr("bias")
    out = _host_operation(graph, layer, source, weight, bias)
    read = source
    if own.new_inputs:
        read = graph.call_function(torch.narrow, (source, own.axis, 0, own.inputs))
    for slot in own.kept:
        seed = graph.call_module(f"grown.{slot}", (read,))
        seed = graph.call_method("type_as", (seed, out))
        if own.new_outputs:
            # The new units are no seed's business: they lie behind the layer's own.
            behind = [0, 0] * (-own.axis - 1) + [0, own.new_outputs]
            seed = graph.call_function(F.pad, (seed, behind))
        out = graph.call_function(torch.add, (out, seed))
    graph.output(out)
    graph.lint()
    module = fx.GraphModule(root, graph, class_name=f"Grown{geometry(layer).kind}")
    module.train(layer.training)
    return module


def _host_operation(
    graph: fx.Graph, layer: nn.Module, source: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    if not isinstance(layer, nn.Conv2d):
        return graph.call_function(F.linear, (source, weight, bias))
    padding = layer.padding
    if layer.padding_mode != "zeros":
        repeated = list(layer._reversed_padding_repeated_twice)
        source = graph.call_function(F.pad, (source, repeated), {"mode": layer.padding_mode})
        padding = (0, 0)
    window = (layer.stride, padding, layer.dilation, layer.groups)
    return graph.call_function(F.conv2d, (source, weight, bias, *window))


def _parameter(old: nn.Parameter | None, value: Tensor | None) -> nn.Parameter | None:
    """The layer's own parameter where it stays as it was, else a new one."""
    if value is None or (old is not None and old.shape == value.shape and torch.equal(old, value)):
        return old
    return nn.Parameter(value, requires_grad=old is None or old.requires_grad)


def _all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of every module; one that two modules share comes twice."""
    return [p for module in model.modules() for p in module._parameters.values() if p is not None]


def _holds(module: nn.Module, layer: nn.Module) -> bool:
    return any(inner is layer for inner in module.modules())
