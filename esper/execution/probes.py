"""Kasmina's probes: the condition of each layer, read in a fraction of a training step.

While a forward runs, hooks keep a few rows of each layer's output; all layers of equal probe shape
are then reduced together, and one transfer brings every number to the host. A trainer validates
anyway, and samples a batch of that: a probe then costs no forward of its own.

Shapes: N probed rows, U probed units of a layer's W (features or channels), G layers of one
probe shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper.execution.calls import host_input, unfused
from esper.execution.isolation import evaluating, preserved_buffers, preserved_randomness
from esper.execution.kasmina_layer import GROWN, KasminaLayer
from esper.execution.state_layout import ACTIVE_STATES

PROBE_SAMPLES = 32
"""How many samples are looked at; of a larger batch they are taken evenly."""
PROBE_ROWS = 16
PROBE_UNITS = 64

_NARROW = (torch.float16, torch.bfloat16)
_NOT_LEARNING = (0.0, 0.0, 0.0)
_NOT_CALLED = (0.0, 1.0)
_GOLDEN = (math.sqrt(5) - 1) / 2


class LayerReading(NamedTuple):
    """One layer's condition; the fields mean what they mean in a `HealthSignal`."""

    gradient_norm: float
    gradient_variance: float
    gradient_to_weight_ratio: float
    activation_rank: float
    dead_fraction: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a probe read.

    `layers` has every layer asked about, in that order. `seeds` says of each active seed whose
    layer was called, by (layer, slot), whether it gave an output of its own, finite everywhere.
    """

    layers: dict[str, LayerReading]
    seeds: dict[tuple[str, int], bool]


@dataclass(slots=True)
class Sample:
    """What is kept of one layer's output, W units wide.

    A small output is there whole: `rows` [N, W]. Of any other there are `rows` [N, U] of the
    probed units, their maxima [U] over all positions, and the sum of all entries.
    """

    width: int
    rows: Tensor
    peaks: Tensor | None = None
    total: Tensor | None = None


@dataclass
class Samples:
    """What `sampling` keeps: of each layer its output, of a layer with active seeds its input.

    `fed` has by layer the input, and the producer's where a seed reads it; `autocast` the type that
    the forward computed in, where it was another than the parameters'.
    """

    layers: dict[str, Sample] = field(default_factory=dict)
    fed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    autocast: torch.dtype | None = None


@dataclass(frozen=True, kw_only=True)
class GradientSums:
    """What `gradient_sums` took from a backward pass, still on the device.

    `values` has the sums of all gradients, their norms, and the norms of all weights; `counts`
    are the entries of each gradient. Of each layer `learning` and `holding` say how many
    gradients and how many weights are its own, in the order of the layers.
    """

    values: Tensor
    counts: tuple[int, ...]
    learning: dict[str, int]
    holding: dict[str, int]


@torch.no_grad()
def gradient_sums(layers: Mapping[str, nn.Module]) -> GradientSums | None:
    """Sums over the layers' own parameters and gradients, between backward and step.

    Waits for nothing: the numbers stay on the device until a probe fetches them. None where no
    layer has a gradient.
    """
    gradients: list[Tensor] = []
    weights: list[Tensor] = []
    counts: list[int] = []
    learning, holding = {}, {}
    for name, layer in layers.items():
        own = _own_parameters(layer)
        found = [(p.numel(), _dense(p.grad)) for p in own if p.grad is not None]
        counts += [count for count, _ in found]
        gradients += [gradient for _, gradient in found]
        weights += [_widened(p) for p in own]
        learning[name], holding[name] = len(found), len(own)
    if not gradients:
        return None
    sums = [gradient.sum() for gradient in gradients]
    norms = torch._foreach_norm(gradients + weights)
    return GradientSums(
        values=torch.stack([_brought_together(value) for value in (*sums, *norms)]),
        counts=tuple(counts),
        learning=learning,
        holding=holding,
    )


@contextmanager
def sampling(layers: Mapping[str, nn.Module]) -> Iterator[Samples]:
    """Inside, each call of one of `layers` leaves its samples; the last call of a layer counts.

    Run the model there in eval mode and without gradients. Hooks are there only meanwhile.
    """
    samples = Samples()
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(_sampler(name, layer, samples)))
            if isinstance(layer, KasminaLayer) and _active_seeds(layer):
                handles += _feeding(name, layer, samples)
        with unfused():
            yield samples
    finally:
        for handle in handles:
            handle.remove()


def read(
    layers: Mapping[str, nn.Module], samples: Samples, gradients: GradientSums | None = None
) -> Reading:
    """What `samples` and the last backward pass say of `layers`, in one transfer.

    A layer without samples reads as dead; without `gradients` their readings are 0. The active
    seeds run once on their samples, and leave no trace.

    The activation rank is the participation ratio of the covariance C of a layer's units,
    (tr C)² / tr(C²) (Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and
    measurement"), over W: 1 for units that vary independently and equally, 1/W for units that
    move as one. Both traces are estimated without the bias of so few rows (Bai and Saranadasa
    1996, "Effect of high dimension", for normal rows) and scaled from the probed units to all.
    """
    with torch.no_grad():
        return _fetched(layers, samples, _seed_sums(layers, samples), gradients)


def probe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    forward: Callable[[], object],
    gradients: GradientSums | None = None,
) -> Reading:
    """`read` after a `forward` of `model` made for it, on `PROBE_SAMPLES` samples or so.

    It runs in eval mode and without gradients; buffers and random streams are put back.
    """
    with (
        torch.no_grad(),
        evaluating(model),
        preserved_buffers(model),
        preserved_randomness(),
        sampling(layers) as samples,
    ):
        forward()
    return read(layers, samples, gradients)


# -- on the device ------------------------------------------------------------------------------


def _sampler(name: str, layer: nn.Module, samples: Samples) -> Callable[..., None]:
    channels = _channel_dimension(layer)

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        samples.layers[name] = _sampled(output, channels)

    return hook


def _sampled(output: Tensor, channels: int) -> Sample:
    # All is reduced or copied here: what follows may write into the output in place.
    spread = _few(output if channels == -1 else output.movedim(channels, -1))
    width = spread.shape[-1]
    if spread.dim() == 2:
        return Sample(width, spread.clone())
    probed = spread[..., :: _unit_stride(width)]
    sizes = tuple(probed.shape[:-1])
    return Sample(
        width,
        rows=probed[_probed_rows(sizes, output.device)],
        peaks=probed.amax(dim=tuple(range(len(sizes)))),
        total=_sum(spread),
    )


def _few(batch: Tensor) -> Tensor:
    """At most PROBE_SAMPLES entries of the first dimension, evenly spread."""
    if batch.dim() < 2 or len(batch) <= PROBE_SAMPLES:
        return batch
    return batch[:: len(batch) // PROBE_SAMPLES][:PROBE_SAMPLES]


def _unit_stride(width: int) -> int:
    return -(-width // PROBE_UNITS)


def _feeding(
    name: str, layer: KasminaLayer, samples: Samples
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that keep what the seeds of `layer` read."""
    fed = samples.fed[name] = {}

    def keeping(source: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            whole = host_input(args, kwargs)
            fed[source] = _few(whole).clone()
            kind = whole.device.type
            on = torch.is_autocast_enabled(kind)
            samples.autocast = torch.get_autocast_dtype(kind) if on else None

        return hook

    handles = [layer.register_forward_pre_hook(keeping("host"), with_kwargs=True)]
    if layer.site.producer is not None:
        hook = keeping("producer")
        handles.append(layer.site.producer.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _seed_sums(layers: Mapping[str, nn.Module], samples: Samples) -> dict[tuple[str, int], Tensor]:
    """By (layer, slot) the sum of all entries of each active seed's own output."""
    sums = {}
    for name, fed in samples.fed.items():
        layer = layers[name]
        assert isinstance(layer, KasminaLayer)
        for slot in _active_seeds(layer) if fed else ():
            branch = layer.site.branches[slot]
            source = fed["host"]
            autocast = torch.autocast(
                source.device.type, samples.autocast, enabled=samples.autocast is not None
            )
            with evaluating(layer), preserved_buffers(layer), preserved_randomness(), autocast:
                if branch.source == "output":
                    # Of the host alone: the output that was seen may hold its seeds' already.
                    source = layer.host_class.forward(layer, source)
                elif branch.source == "producer":
                    source = fed["producer"]
                try:
                    sums[name, slot] = _sum(branch.module(source))
                except Exception:  # its own fault, as in training, and not the probe's
                    sums[name, slot] = torch.full((), math.nan, device=source.device)
    return sums


def _active_seeds(layer: KasminaLayer) -> list[int]:
    site = layer.site
    return [slot for slot in site.branches if site.record(slot).state in ACTIVE_STATES]


def _channel_dimension(layer: nn.Module) -> int:
    """Where a layer's output has its units, counted from the end."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return -1 - len(layer.kernel_size)
    return -3 if isinstance(layer, nn.BatchNorm2d) else -1


@lru_cache(maxsize=1024)
def _probed_rows(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Indices into dimensions of these `sizes` of at most PROBE_ROWS rows, evenly spread.

    Rows lie a golden section apart within their share, so that they do not all look at one place
    of the image, as an even stride over whole images would.
    """
    total = math.prod(sizes)
    count = min(total, PROBE_ROWS)
    chosen = [int((i + (i * _GOLDEN) % 1) * total / count) for i in range(count)]
    indices: list[list[int]] = []
    for size in reversed(sizes):
        indices.insert(0, [row % size for row in chosen])
        chosen = [row // size for row in chosen]
    return tuple(torch.tensor(one, dtype=torch.int64, device=device) for one in indices)


def _layer_sums(samples: Sequence[Sample]) -> Tensor:
    """Of samples of one shape: [G, 5] with covariance sums, the number of dead units, the total.

    With D the probed rows, centred, the first three are the sums of squares of D, of
    D Dᵀ, and of the column sums of D².
    """
    first = samples[0]
    rows = torch.stack([sample.rows for sample in samples])
    if first.total is None:
        totals, step = rows.sum(dim=(1, 2), dtype=torch.float64), _unit_stride(first.width)
        peaks = rows.amax(dim=1)[:, ::step]  # of all units: slower where memory is skipped
        rows = rows[:, :: max(1, rows.shape[1] // PROBE_ROWS), ::step][:, :PROBE_ROWS]
    else:
        totals = torch.stack([sample.total for sample in samples if sample.total is not None])
        peaks = torch.stack([sample.peaks for sample in samples if sample.peaks is not None])
    # In float32 the fourth powers that follow would overflow from 1e9 on.
    rows = rows.double()
    # Against the first row a constant output is exactly zero, where its mean would be rounded.
    centred = rows - rows[:, :1]
    centred -= centred.mean(dim=1, keepdim=True)
    columns = centred.square().sum(dim=1)
    gram = torch.bmm(centred, centred.transpose(1, 2))
    parts = (
        columns.sum(dim=1),
        gram.square_().sum(dim=(1, 2)),
        columns.square().sum(dim=1),
        (peaks <= 0).sum(dim=1, dtype=torch.float64),
        totals.double(),
    )
    return torch.stack(parts, dim=1)


def _own_parameters(layer: nn.Module) -> list[nn.Parameter]:
    if not layer._modules:
        return [parameter for parameter in layer._parameters.values() if parameter is not None]
    return [p for key, p in layer.named_parameters() if not key.startswith(f"{GROWN}.")]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _NARROW else tensor


def _brought_together(value: Tensor) -> Tensor:
    """A figure of a tensor that ranks share out, from all of their parts."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def _dense(gradient: Tensor) -> Tensor:
    """The entries of a gradient; those that a sparse one leaves out are 0 and add nothing."""
    return _widened(gradient.coalesce().values() if gradient.is_sparse else gradient)


def _sum(tensor: Tensor) -> Tensor:
    """The sum of all entries: finite only where each of them is."""
    return tensor.sum(dtype=_wide(tensor))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in _NARROW else tensor.dtype


# -- on the host --------------------------------------------------------------------------------


def rank_share(
    squares: float, products: float, columns: float, *, rows: int, units: int, width: int
) -> float:
    """The participation ratio over `width`, in [0, 1], from the sums of `_layer_sums`.

    With S the sample covariance of `rows` rows, v = rows - 1 and normal rows, unbiased estimates
    are v² / ((v + 2)(v - 1)) (tr S² - (tr S)² / v) of tr C² and v / (v + 2) S_ii² of C_ii².
    The part off the diagonal grows with the square of the number of units, the part on it with
    the number: so the traces of all `width` units follow from those of the `units` probed.
    """
    if not squares > 0:
        return 0.0
    if rows < 3:
        return 1 / width
    free = rows - 1
    trace, trace_of_square = squares / free, products / free**2
    inner = free**2 / ((free + 2) * (free - 1)) * (trace_of_square - trace**2 / free)
    diagonal = free / (free + 2) * columns / free**2
    outer = trace**2 - 2 * inner / free
    grown = width / units
    pairs = grown * (width - 1) / (units - 1) if units > 1 else 0.0
    inner = diagonal * grown + (inner - diagonal) * pairs
    outer = diagonal * grown + (outer - diagonal) * pairs
    # Noise may carry the estimates out of what Cauchy and Schwarz allow.
    return min(max(outer / (width * inner), 1 / width), 1.0) if inner > 0 else 1.0


def _fetched(
    layers: Mapping[str, nn.Module],
    samples: Samples,
    seed_sums: Mapping[tuple[str, int], Tensor],
    gradients: GradientSums | None,
) -> Reading:
    """Every number in one transfer, and the readings made of them."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, sample in samples.layers.items():
        shape = (sample.rows.shape, sample.width, sample.total is None, sample.rows.dtype)
        groups.setdefault(shape, []).append(name)
    pieces = [] if gradients is None else [gradients.values]
    pieces += [total.reshape(1) for total in seed_sums.values()]
    pieces += [
        _layer_sums([samples.layers[name] for name in names]).flatten() for names in groups.values()
    ]
    numbers = iter(torch.cat(pieces).tolist() if pieces else ())

    learning = {} if gradients is None else _gradient_readings(gradients, numbers)
    seeds = {site: math.isfinite(next(numbers)) for site in seed_sums}
    acting = {
        name: _output_readings(samples.layers[name], *islice(numbers, 5))
        for names in groups.values()
        for name in names
    }
    return Reading(
        layers={
            name: LayerReading(*learning.get(name, _NOT_LEARNING), *acting.get(name, _NOT_CALLED))
            for name in layers
        },
        seeds=seeds,
    )


def _output_readings(
    sample: Sample, squares: float, products: float, columns: float, dead: float, total: float
) -> tuple[float, float]:
    """The activation rank and the dead fraction."""
    if not math.isfinite(total):
        return math.nan, math.nan
    width, rows = sample.width, min(len(sample.rows), PROBE_ROWS)
    units = -(-width // _unit_stride(width))
    rank = rank_share(squares, products, columns, rows=rows, units=units, width=width)
    return rank, dead / units


def _gradient_readings(
    gradients: GradientSums, numbers: Iterator[float]
) -> dict[str, tuple[float, float, float]]:
    """Norm, variance and ratio of each layer that has gradients, from the first of `numbers`."""
    total = len(gradients.counts)
    sums, norms = iter(list(islice(numbers, total))), iter(list(islice(numbers, total)))
    counts = iter(gradients.counts)
    found = {}
    for name, held in gradients.holding.items():
        weight, count = math.hypot(*islice(numbers, held)), gradients.learning[name]
        if count:
            entries = sum(islice(counts, count))
            mean = sum(islice(sums, count)) / entries
            norm = math.hypot(*islice(norms, count))
            variance = max(norm**2 / entries - mean**2, 0.0)
            found[name] = norm, variance, norm / max(weight, 1e-12)
    return found
