"""What a session optimises and how its quality is told: classification, regression, or the user's.

Shapes: B samples, C classes, D targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.errors import EntryPointError
from esper.services.tolaria.data import exited

FIELD = "spec.training.objective"


class Objective(Protocol):
    """A loss to train on, a metric for people, and a loss in nats for the gates."""

    @property
    def metric_name(self) -> str:
        """The metric's name, e.g. "accuracy"."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean training loss of a batch, 0-d."""

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric summed over the samples of a batch; its mean is higher for better models."""

    def nats(self, outputs: Tensor, targets: Tensor, fit: slice, score: slice) -> Tensor:
        """Per-sample loss in nats of the samples in `score`, one scale fitted on those in `fit`.

        Shape [len(score)], float64.
        """


class Classification:
    """Cross-entropy over C classes; outputs [B, C] (or [B, C, ...]), integer targets [B, ...]."""

    metric_name = "accuracy"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(outputs, targets)

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> float:
        """The number of samples whose largest output is the target's."""
        right = (outputs.argmax(dim=1) == targets).double()
        return float(right.reshape(len(right), -1).mean(dim=1).sum())

    def nats(self, outputs: Tensor, targets: Tensor, fit: slice, score: slice) -> Tensor:
        """Negative log-likelihood after one temperature (Guo et al. 2017), fitted on `fit`.

        Late in training the plain cross-entropy of an overconfident model rises while its
        predictions improve; with a temperature per arm the comparison keeps its sign.
        """
        logits = outputs.double()
        temperature = fitted_temperature(logits[fit], targets[fit])
        losses = F.cross_entropy(logits[score] / temperature, targets[score], reduction="none")
        return losses.reshape(len(losses), -1).mean(dim=1)


class Regression:
    """Mean squared error; outputs and targets [B, D] or [B]."""

    metric_name = "r2"

    def __init__(self, target_variance: float) -> None:
        """`target_variance` is that of the training targets, so that the metric is R²-like."""
        self._variance = max(target_variance, 1e-30)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs.reshape(targets.shape), targets.to(outputs.dtype))

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> float:
        """One minus the squared error over the targets' variance, summed over the samples."""
        return float((1.0 - self._squares(outputs, targets) / self._variance).sum())

    def nats(self, outputs: Tensor, targets: Tensor, fit: slice, score: slice) -> Tensor:
        """Gaussian negative log-likelihood, its variance fitted on `fit`: squared error in nats."""
        squares = self._squares(outputs, targets)
        variance = squares[fit].mean().clamp_min(1e-30)
        return 0.5 * (squares[score] / variance + torch.log(2 * math.pi * variance))

    @staticmethod
    def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
        squares = (outputs.double().reshape(targets.shape) - targets.double()) ** 2
        return squares.reshape(len(squares), -1).mean(dim=1)


class CustomObjective:
    """The user's own: an object with `loss(outputs, targets)` and, optionally, more.

    `sample_losses(outputs, targets) -> [B]` gives the gates their per-sample loss (without it,
    `loss` is called sample by sample); `metric(outputs, targets) -> float` the mean metric of a
    batch (without it, the negative loss is shown).
    """

    def __init__(self, user: object, entrypoint: str) -> None:
        loss = getattr(user, "loss", None)
        if not callable(loss):
            raise EntryPointError(
                FIELD,
                f"{entrypoint} -> {type(user).__name__}",
                "an entry point that returns an object with a method loss(outputs, targets)",
            )
        self._loss = loss
        self._sample_losses = getattr(user, "sample_losses", None)
        self._metric = getattr(user, "metric", None)
        self.metric_name = str(getattr(user, "metric_name", "metric" if self._metric else "score"))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The user's loss of a batch."""
        loss: Tensor = _said(self._loss, outputs, targets)
        return loss

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> float:
        """The user's metric times the batch's size."""
        if self._metric is not None:
            return float(_said(self._metric, outputs, targets)) * len(targets)
        return -float(self.loss(outputs, targets)) * len(targets)

    def nats(self, outputs: Tensor, targets: Tensor, fit: slice, score: slice) -> Tensor:
        """The user's per-sample loss, taken as nats; nothing is fitted."""
        del fit
        if self._sample_losses is not None:
            losses: Tensor = _said(self._sample_losses, outputs[score], targets[score])
            return losses.double()
        pairs = zip(outputs[score].split(1), targets[score].split(1), strict=True)
        return torch.stack([self.loss(o, t).double() for o, t in pairs])


def _said(method: Callable[[Tensor, Tensor], Any], outputs: Tensor, targets: Tensor) -> Any:
    try:
        return method(outputs, targets)
    except SystemExit as error:
        raise exited(FIELD, error) from error


def fitted_temperature(logits: Tensor, targets: Tensor, steps: int = 50) -> float:
    """The temperature T > 0 that minimises the cross-entropy of `logits / T` (Guo et al. 2017).

    `logits` are [B, C, ...], `targets` [B, ...]. Newton's method on log(1/T), which is convex in
    1/T, safeguarded to steps of at most 1; T stays within [1/100, 100]. Logits that are not finite
    give 1.
    """
    if not bool(torch.isfinite(logits).all()) or len(logits) == 0:
        return 1.0
    log_scale = 0.0
    classes = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    labels = targets.reshape(-1, 1).long()
    target = classes.gather(1, labels)[:, 0]
    limit = math.log(100.0)
    for _ in range(steps):
        scale = math.exp(log_scale)
        weights = F.softmax(classes * scale, dim=1)
        mean = (weights * classes).sum(dim=1)
        spread = (weights * classes**2).sum(dim=1) - mean**2
        slope = float((mean - target).mean()) * scale
        curvature = float(spread.mean()) * scale**2 + abs(slope)
        if curvature < 1e-12:
            break
        step = max(-1.0, min(1.0, -slope / curvature))
        log_scale = max(-limit, min(limit, log_scale + step))
        if abs(step) < 1e-6:
            break
    return math.exp(-log_scale)
