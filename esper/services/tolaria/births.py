"""Seeds born on data: the few training samples, and the pass over them, that a birth looks at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from esper.contracts.ir import Graph
from esper.core.compilation import uncompiled
from esper.execution.births import apply_births, births, moments
from esper.services.tolaria.data import epoch_order
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.randomness import stable_seed
from esper.services.tolaria.seeds import SeedRecord

BIRTH_SAMPLES = 256


def give_birth(engine: Engine, record: SeedRecord, module: nn.Module, graph: Graph) -> None:
    """Give the seed's module the first weights that its bound `graph` asks data for, if it does.

    The samples are drawn from the session's seed, the slot and its cycle, and pass through the
    model as in training; the work counts as a trial's. Of several ranks the first does it, and
    gives the weights to the others.

    Raises:
        BlueprintError: the graph asks for them where they have no meaning.
    """
    if not births(graph):
        return
    ranks = engine.ranks
    if engine.parallel.joint:
        _bear(engine, record, module, graph)
    else:
        ranks.led(lambda: _bear(engine, record, module, graph))
    for parameter in module.parameters():
        ranks.spread(parameter.data)


def _bear(engine: Engine, record: SeedRecord, module: nn.Module, graph: Graph) -> None:
    training = engine.config.training
    draw = stable_seed(training.seed, "birth", record.layer, record.slot, record.cycle)
    size = len(engine.datasets.train)
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(draw))[:BIRTH_SAMPLES]
    batches = [drawn[piece] for piece in epoch_order(len(drawn), training.batch_size, draw, 0)]
    sizes = tuple(len(batch) for batch in batches)
    key = ("birth", engine.structure_key(), record.layer, record.kernel, sizes)
    engine.model.train()
    with uncompiled(engine.model), engine.metered_once(*key):
        found = moments(
            engine.model,
            engine.model.morphology.layers[record.layer],
            graph,
            [_summed_loss(engine, batch) for batch in batches],
            random_seed=draw,
        )
        apply_births(module, graph, found)


def _summed_loss(engine: Engine, batch: Tensor) -> Callable[[], Tensor]:
    return lambda: engine.loss_of(batch) * len(batch)
