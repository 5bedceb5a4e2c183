"""How a seed's output joins its host's: always added, never interpolated.

Interpolating (`(1 - a) * host + a * seed`) would take from the host what the rest of the model has
learned to rely on; adding takes nothing, and at alpha 0 the host is what it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.errors import BadInput


def blend(host: Tensor, seed: Tensor, alpha: Tensor | None = None) -> Tensor:
    """`host + alpha * seed`, or `host + seed` where `alpha` is None; in the host's dtype.

    Shapes: host (*), seed the same, alpha 0-d. Callers leave out a seed whose alpha is 0, because
    0 times infinity is NaN.
    """
    if seed.dtype != host.dtype:
        seed = seed.to(host.dtype)
    return host + seed if alpha is None else torch.addcmul(host, seed, alpha)


def ramped_alpha(age_epochs: int, ramp_epochs: int) -> float:
    """The alpha of a grafting seed in its n-th epoch of grafting, n = `age_epochs` from 0.

    It rises in equal steps, `1/(r+1)`, `2/(r+1)`, …, through the r = `ramp_epochs` epochs of the
    ramp and is 1 from then on; without a ramp it is 1 at once.

    Raises:
        BadInput: an argument is negative.
    """
    if age_epochs < 0 or ramp_epochs < 0:
        raise BadInput("ageEpochs, rampEpochs", (age_epochs, ramp_epochs), "0 or more")
    return min(1.0, (age_epochs + 1) / (ramp_epochs + 1))
