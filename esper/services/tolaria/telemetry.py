"""Kasmina's probes: each host layer's condition at an interval boundary, as health signals.

Shapes: B samples of the probe batch, U units (features or channels) of a layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esper.contracts.operational import HealthSignal

PROBE_SAMPLES = 256
PROBE_UNITS = 128


@contextmanager
def captured_outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside, the last output of each layer stands in the yielded dict; hooks only meanwhile."""
    outputs: dict[str, Tensor] = {}

    def keeping(name: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[name] = output.detach()

        return hook

    handles = [
        layer.register_forward_hook(keeping(name))  # type: ignore[arg-type]
        for name, layer in layers.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def unit_rows(output: Tensor, kind: str) -> Tensor:
    """A layer's output as rows [rows, U], at most PROBE_SAMPLES rows and PROBE_UNITS units.

    Rows and units beyond are left out by an even stride, so that the cost has a bound.
    """
    rows = output.movedim(1, -1) if kind == "Conv2d" and output.dim() == 4 else output
    rows = rows.reshape(-1, rows.shape[-1])
    rows = rows[:: max(1, len(rows) // PROBE_SAMPLES)][:PROBE_SAMPLES]
    return rows[:, :: max(1, -(-rows.shape[1] // PROBE_UNITS))].double()


def effective_rank_share(rows: Tensor) -> float:
    """The effective rank of centred `rows` [rows, U] over U, in [0, 1].

    The exponential of the entropy of the normalised singular values (Roy & Vetterli 2007).
    """
    centred = rows - rows.mean(dim=0)
    if not float(centred.norm()) > 1e-12 * float(rows.norm()):
        return 0.0  # what the mean's rounding leaves of a constant output is no rank
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    total = float(values.sum())
    if not total > 0:
        return 0.0
    shares = values / total
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    return float(entropy.exp()) / rows.shape[1]


def layer_gradients(layers: Mapping[str, nn.Module]) -> dict[str, tuple[float, float, float]]:
    """Per layer: its gradients' norm and variance, and the norm over its weights' norm.

    Read after a backward pass, before the gradients are dropped. A layer without gradients gives
    zeros.
    """
    found = {}
    for name, layer in layers.items():
        own = [p for key, p in layer.named_parameters() if not key.startswith("grown.")]
        gradients = [p.grad.reshape(-1) for p in own if p.grad is not None]
        if not gradients:
            found[name] = (0.0, 0.0, 0.0)
            continue
        flat = torch.cat(gradients).double()
        weights = torch.cat([p.detach().reshape(-1) for p in own]).double()
        norm = float(flat.norm())
        variance = float(flat.var(correction=0))
        found[name] = (norm, variance, norm / max(float(weights.norm()), 1e-12))
    return found


def health_signals(
    session: str,
    epoch: int,
    kinds: Mapping[str, str],
    gradients: Mapping[str, tuple[float, float, float]],
    outputs: Mapping[str, Tensor],
) -> tuple[HealthSignal, ...]:
    """One signal a layer, from its gradients and its outputs on the probe batch."""
    signals = []
    for name, kind in kinds.items():
        norm, variance, ratio = gradients.get(name, (0.0, 0.0, 0.0))
        rank, dead = 0.0, 1.0
        if name in outputs:
            rows = unit_rows(outputs[name], kind)
            if bool(torch.isfinite(rows).all()):
                rank = effective_rank_share(rows)
                dead = float((rows.amax(dim=0) <= 0).double().mean())
            else:
                rank, dead = float("nan"), float("nan")
        signals.append(
            HealthSignal(
                session=session,
                epoch=epoch,
                layer=name,
                gradient_norm=norm,
                gradient_variance=variance,
                gradient_to_weight_ratio=ratio,
                activation_rank=rank,
                dead_fraction=dead,
            )
        )
    return tuple(signals)
