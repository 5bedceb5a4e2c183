"""Faults of seeds on trial, counted in the order of the shards, whichever rank has met them.

A seed may fail on some samples only, and three faults in a row open its circuit. What is in a row
must not depend on the number of ranks: each pass over a shard, or over a piece of a dataset, is
noted, and once all ranks have done theirs every rank counts all of them, in their order. A pass
with a fault counts as one, however often the seed has failed in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from esper.core.model_wrapper import MorphableModel
from esper.execution.state_layout import FAULT_LIMIT
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.learning import Site


class NotedFaults:
    """What seeds have failed at since all ranks last counted."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._noted: dict[int, dict[tuple[int, int], str]] = {}

    @contextmanager
    def passing(self, model: MorphableModel, number: int) -> Iterator[None]:
        """Inside, `model` passes over shard or piece `number`: its faults are noted, not counted.

        Outside, what seeds fail at leaves no trace: one rank may do there what others do not.
        """
        layout = model.morphology.layout
        found: dict[tuple[int, int], str] = {}
        layout.noted = found
        try:
            yield
        finally:
            self._noted[number] = found
            layout.noted = {}

    def count(self, model: MorphableModel, sites: Sequence[Site], own: Iterable[int]) -> None:
        """Count the faults of the seeds at `sites`, which took part in every pass.

        `own` are the passes to which this rank speaks; every other one is another rank's.
        """
        noted, self._noted = self._noted, {}
        if not sites:
            return
        hosts = [model.morphology.layers[layer] for layer, _ in sites]
        places = [(host.site.index, slot) for host, (_, slot) in zip(hosts, sites, strict=True)]
        rows: list[list[Any]] = [
            [number, *(noted[number].get(place) for place in places)] for number in own
        ]
        faulty = any(reason is not None for row in rows for reason in row[1:])
        # Most often there is none, which a byte can say.
        if self._ranks.gathered(torch.tensor([faulty], dtype=torch.uint8)).any():
            told = self._ranks.exchanged(rows)
            rows = sorted((row for of_rank in told for row in of_rank), key=lambda row: int(row[0]))
        else:
            rows = [[0, *(None for _ in sites)]]
        for column, (host, (_, slot)) in enumerate(zip(hosts, sites, strict=True), start=1):
            record = host.site.record(slot)
            errors, fallbacks, fault = record.errors, record.fallbacks, record.fault or ""
            for reason in (row[column] for row in rows):
                if errors >= FAULT_LIMIT:
                    break
                if reason is None:
                    errors = 0
                else:
                    errors, fallbacks, fault = errors + 1, fallbacks + 1, str(reason)
            if (errors, fallbacks) != (record.errors, record.fallbacks):
                host.count_faults(slot, errors, fallbacks, fault)
