"""Blueprints: what can grow, as data. The public face of the IR, of lowering and the catalogue."""

from __future__ import annotations

from esper.contracts.catalogue import BUILTIN_LABEL, CATALOGUE, BuiltinBlueprint, builtin
from esper.contracts.folding import folds
from esper.contracts.ir import (
    MAX_ACTIVATION_ELEMENTS,
    MAX_BYTES,
    MAX_FLOPS,
    MAX_NODES,
    MAX_PARAMETERS,
    BlueprintDocument,
    Graph,
    KernelTarget,
    LayerGeometry,
    Node,
    ProducerDescription,
    reads_producer,
    source_of,
)
from esper.contracts.lowering import GraphCost, bind, infer, input_shape, kernel_id, lower

__all__ = [
    "BUILTIN_LABEL",
    "CATALOGUE",
    "MAX_ACTIVATION_ELEMENTS",
    "MAX_BYTES",
    "MAX_FLOPS",
    "MAX_NODES",
    "MAX_PARAMETERS",
    "BlueprintDocument",
    "BuiltinBlueprint",
    "Graph",
    "GraphCost",
    "KernelTarget",
    "LayerGeometry",
    "Node",
    "ProducerDescription",
    "bind",
    "builtin",
    "folds",
    "infer",
    "input_shape",
    "kernel_id",
    "lower",
    "reads_producer",
    "source_of",
]
