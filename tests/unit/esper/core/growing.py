"""Seeds from real blueprints, brought to a state, with weights that are far from zero."""

from __future__ import annotations

import torch
from torch import nn

from esper.contracts.blueprints import Graph
from esper.contracts.catalogue import builtin
from esper.contracts.ir import source_of
from esper.contracts.lowering import bind
from esper.core import MorphableModel
from esper.execution.builders import build
from esper.execution.state_layout import SeedLifecycleState as S

FOSSIL = (S.TRAINING, S.GRAFTING, S.FOSSILIZED)
GRAFTING = (S.TRAINING, S.GRAFTING)


def grow(
    model: MorphableModel,
    layer: str,
    graph: Graph | str,
    states: tuple[S, ...] = FOSSIL,
    *,
    slot: int = 0,
    **arguments: object,
) -> nn.Module:
    """Germinate a catalogue blueprint, or a graph, and take it through `states`."""
    morphology = model.morphology
    target = morphology.target(layer)
    bound = bind(builtin(graph, arguments).graph if isinstance(graph, str) else graph, target)
    seed = build(bound, target, generator_seed=slot)
    generator = torch.Generator().manual_seed(slot + 1)
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    morphology.germinate(
        layer,
        slot,
        seed,
        kernel=f"kernel-{slot}",
        source=source_of(bound),
        graph=bound,
    )
    for state in states:
        morphology.transition(layer, slot, state)
    return seed


def graph_of(*nodes: dict[str, object]) -> Graph:
    """A graph of these nodes; the last is the output."""
    return Graph.model_validate({"nodes": nodes, "output": nodes[-1]["id"]})
