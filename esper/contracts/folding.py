"""Which blueprints fold into their host's own layer, and so never count as growth."""

from __future__ import annotations

from esper.contracts.ir import (
    ActivationNode,
    AddNode,
    Conv2dNode,
    DropoutNode,
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


def folds(graph: Graph, host: LayerGeometry | None = None) -> bool:
    """Whether the graph adds no function class to its host, so that it never counts as growth.

    True for zeros and for chains that are linear in the host's input and fit into the host's own
    window. `graph` may be bound; then `host` says which windows are the host's. A graph that reads
    the producer adds units and is never True.
    """
    if reads_producer(graph):
        return False
    windows: dict[str, int | None] = {}  # how many host windows deep; None: not linear, or wider
    for node in graph.nodes:
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
    match node:
        case InputNode() | ZerosNode() | LinearNode() | AddNode() | DropoutNode():
            return 0
        case ActivationNode():
            return 0 if node.kind == "identity" else None
        case LayerNode():
            if host is not None and host.groups > 1:
                return None
            return 0 if node.pointwise or (host and host.kind == "Linear") else 1
        case Conv2dNode():
            if host is not None and host.groups not in (1, node.groups):
                return None
            window = (node.kernel_size, node.stride, node.padding, node.dilation)
            if window[:2] == ((1, 1), (1, 1)) and node.padding in ("same", (0, 0)):
                return 0
            if node.kernel_size == "host":
                return 1
            if host is None or node.padding_mode != host.padding_mode:
                return None
            own = (host.kernel_size, host.stride, host.padding, host.dilation)
            return 1 if window == own else None
        case _:
            return None
