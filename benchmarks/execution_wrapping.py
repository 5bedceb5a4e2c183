"""What wrapping itself costs: time for ResNet-18, and bytes of state for each seed."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.execution_models import CASES
from esper.core import unwrap, wrap

REPEATS = 5
MILLISECONDS = 50.0
BYTES_A_SEED = 64
RESNET = next(case for case in CASES if case.name == "resnet18")


def wrapping(device: str) -> dict[str, Any]:
    """Structural wrap of ResNet-18, its two probes apart, and the layout's bytes a seed."""
    model, x = RESNET.seeded().to(device), RESNET.inputs(1).to(device)
    structural, probing = [], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        wrapped = wrap(model)
        structural.append(time.perf_counter() - started)
        started = time.perf_counter()
        wrapped.morphology.probe(x)
        probing.append(time.perf_counter() - started)
        tensors = wrapped.morphology.layout.tensors().values()
        seeds = wrapped.morphology.layout.alpha.numel()
        state = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        unwrap(wrapped)
    wrap_milliseconds, a_seed = min(structural) * 1e3, state / seeds
    return {
        "wrap-resnet18-milliseconds": {
            "figure": wrap_milliseconds,
            "repeats": [seconds * 1e3 for seconds in structural],
            "bar": f"< {MILLISECONDS:g}",
            "holds": wrap_milliseconds < MILLISECONDS,
        },
        "layout-bytes-a-seed": {
            "figure": a_seed,
            "tensors": len(tensors),
            "bar": f"<= {BYTES_A_SEED}",
            "holds": a_seed <= BYTES_A_SEED,
        },
        "probes-resnet18-milliseconds": {
            "figure": min(probing) * 1e3,
            "repeats": [seconds * 1e3 for seconds in probing],
        },
    }
