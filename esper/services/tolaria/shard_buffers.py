"""Buffers, normalisation statistics above all, brought together from the shards of a batch.

A forward may make, replace or resize a buffer, on one shard otherwise than on another. All ranks
find out together, so that none waits for what another does not send.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from esper.execution.isolation import writable
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.flat import Flat
from esper.services.tolaria.model_state import buffer_places

Buffers = dict[str, Tensor]

_FLAG_BYTES = 16
"""Of each shard's row: as many keep the next row where numbers can be looked at."""


def held_buffers(model: nn.Module) -> Buffers:
    """The buffers by their place; one that lies at two places counts at both."""
    return {name: buffer for name, buffer in buffer_places(model).items() if buffer is not None}


def merged(ranks: Ranks, base: Mapping[str, Tensor], own: Sequence[Buffers]) -> Buffers:
    """Where the shards' buffers lead from `base`: on average, in the shards' order.

    `own` are those of this rank's shards, `base` is the same on all ranks. Of a buffer whose shape
    differs from shard to shard, as of one that has a row a sample, the first shard's counts.
    """
    names, layout = sorted(base), _layout(base)
    usual = all(_layout(became) == layout for became in own)
    flat = Flat.of([base[name] for name in names])
    rows = torch.stack(
        [flat.bytes_of([became[name] if usual else None for name in names]) for became in own]
    )
    flags = rows.new_full((len(own), _FLAG_BYTES), int(usual))
    rows = ranks.gathered(torch.cat([rows, flags], dim=1)).flatten(0, 1)
    if not rows[:, -1].all():
        return _merged_anew(ranks, base, own)
    shards = [flat.tensors_in(row[: flat.size]) for row in rows]
    return {
        name: _moved_on(base[name], [shard[place] for shard in shards])
        for place, name in enumerate(names)
    }


def spread(ranks: Ranks, own: Buffers) -> Buffers:
    """Rank 0's buffers, on every rank."""
    layouts = ranks.exchanged(_layout(own))
    if any(layout != layouts[0] for layout in layouts):
        return {
            name: ranks.relayed(own[name] if ranks.rank == 0 else None, 0) for name in layouts[0]
        }
    names = sorted(own)
    flat = Flat.of([own[name] for name in names])
    row = flat.bytes_of([own[name] for name in names])
    if flat.size:
        ranks.spread(row)
    return dict(zip(names, flat.tensors_in(row), strict=True))


@torch.no_grad()
def assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the model these buffers, by their place, and no others."""
    for name, buffer in buffer_places(model).items():
        path, _, key = name.rpartition(".")
        value = values.get(name)
        if (
            buffer is not None
            and value is not None
            and buffer.shape == value.shape
            and writable(buffer)
        ):
            buffer.copy_(value)
        elif buffer is not value:
            model.get_submodule(path)._buffers[key] = value


def _merged_anew(ranks: Ranks, base: Mapping[str, Tensor], own: Sequence[Buffers]) -> Buffers:
    """As `merged`, where the shards do not all have the buffers of before."""
    told = ranks.exchanged([_layout(became) for became in own])
    layouts = [layout for of_rank in told for layout in of_rank]
    found: Buffers = {}
    for name in sorted({name for layout in layouts for name in layout}):
        kinds = [layout.get(name) for layout in layouts]
        if all(kind == kinds[0] for kind in kinds):
            flat = Flat.of([own[0][name]])
            rows = torch.stack([flat.bytes_of([became[name]]) for became in own])
            rows = ranks.gathered(rows).flatten(0, 1)
            values = [flat.tensors_in(row)[0] for row in rows]
            found[name] = _moved_on(base.get(name), values)
        else:
            first = next(number for number, kind in enumerate(kinds) if kind is not None)
            owner, place = divmod(first, len(own))
            value = own[place][name] if ranks.rank == owner else None
            found[name] = ranks.relayed(value, owner)
    return found


def _layout(buffers: Mapping[str, Tensor]) -> dict[str, list[object]]:
    """The type and shape of each, JSON-ready."""
    return {name: [str(one.dtype), list(one.shape)] for name, one in sorted(buffers.items())}


def _moved_on(base: Tensor | None, values: Sequence[Tensor]) -> Tensor:
    """The mean of `values`, summed in their order as steps away from `base`.

    So what no shard has moved stays to the bit. What is no float, a counter say, is the first's.
    """
    first = values[0]
    if not first.is_floating_point():
        return first.clone()
    if base is None or base.shape != first.shape:
        base = torch.zeros_like(first)
    total = torch.zeros_like(first)
    for value in values:
        total += value - base
    return base + total / len(values)
