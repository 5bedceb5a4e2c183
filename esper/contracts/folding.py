"""Which blueprints fold into their host's own layer, and so never count as growth."""

from __future__ import annotations

from esper.contracts.ir import (
    ActivationNode,
    AddNode,
    AffineNode,
    Conv1dNode,
    Conv2dNode,
    DropoutNode,
    EmbeddingNode,
    Graph,
    InputNode,
    LayerGeometry,
    LayerNode,
    LinearNode,
    Node,
    ZerosNode,
    inputs_of,
    reads_producer,
)
from esper.contracts.shapes import POSITION_AXES


def folds(graph: Graph, host: LayerGeometry | None = None) -> bool:
    """Whether the graph adds no function class to its host, so that it never counts as growth.

    True for zeros, for chains that are linear in the host's input and fit into the host's own
    window, and for such without a window on the host's own output; beside a norm, for a scale and
    shift of its output alone. `graph` may be bound; then `host` says which windows are the host's.
    A graph that reads the producer adds units and is never True.
    """
    if reads_producer(graph):
        return False
    windows: dict[str, int | None] = {}  # how many host windows deep; None: not linear, or wider
    for node in graph.nodes:
        if isinstance(node, ZerosNode):
            windows[node.id] = 0
            continue
        depths = [windows[name] for name in inputs_of(node)]
        step = _window_step(node, host)
        known = [depth for depth in depths if depth is not None]
        if step is None or len(known) < len(depths):
            windows[node.id] = None
        else:
            depth = max(known, default=0) + step
            windows[node.id] = depth if depth <= 1 else None
    return windows[graph.output] is not None


def _window_step(node: Node, host: LayerGeometry | None) -> int | None:
    """How many host windows the node adds to a linear chain; None when it ends the chain."""
    norm = host is not None and host.kind in ("LayerNorm", "BatchNorm2d")
    match node:
        case InputNode(source="output"):
            return 1  # the host has looked through its window
        case InputNode():
            return None if norm else 0
        case AddNode() | DropoutNode() | EmbeddingNode() | AffineNode():
            return 0
        case ActivationNode():
            return 0 if node.kind == "identity" else None
        case LinearNode() | LayerNode() | Conv1dNode() | Conv2dNode() if norm:
            return None
        case LinearNode():
            return 0
        case LayerNode():
            if host is not None and host.groups > 1:
                return None
            windowless = host is not None and not POSITION_AXES[host.kind]
            return 0 if node.pointwise or windowless else 1
        case Conv1dNode() | Conv2dNode():
            return _convolution_step(node, host)
        case _:
            return None


def _convolution_step(node: Conv1dNode | Conv2dNode, host: LayerGeometry | None) -> int | None:
    if host is not None and host.groups not in (1, node.groups):
        return None
    if node.kernel_size == "host":
        return 1
    if {*node.kernel_size, *node.stride} == {1} and (
        node.padding == "same" or not any(node.padding)
    ):
        return 0
    if host is None or node.padding_mode != host.padding_mode:
        return None
    window = (node.kernel_size, node.stride, node.padding, node.dilation)
    own = (host.kernel_size, host.stride, host.padding, host.dilation)
    return 1 if window == own else None
