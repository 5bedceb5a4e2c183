"""What a session's probes keep from an epoch until its boundary, and the signals made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from esper.contracts.operational import HealthSignal
from esper.core.model_wrapper import MorphableModel
from esper.execution import probes


class Telemetry:
    """Collects an epoch's samples and gradients; both stay on the device until they are read."""

    def __init__(self, model: MorphableModel) -> None:
        self._model = model
        self._samples: probes.Samples | None = None
        self._gradients: probes.GradientSums | None = None

    @property
    def sampled(self) -> bool:
        """Whether a forward left samples since they were last read or forgotten."""
        return self._samples is not None

    @contextmanager
    def sampling(self, asked: bool = True) -> Iterator[None]:
        """Inside, a forward leaves samples if `asked`; the last one's count."""
        if not asked:
            yield
            return
        with probes.sampling(self._model.morphology.layers) as self._samples:
            yield

    def keep_gradients(self) -> None:
        """Take over the gradients of the backward pass just done."""
        self._gradients = probes.gradient_sums(self._model.morphology.layers)

    def forget_samples(self) -> None:
        """The model is another now: what was sampled says nothing about it."""
        self._samples = None

    def read(self) -> probes.Reading:
        """What the samples and the last gradients say; the samples are then gone."""
        samples, self._samples = self._samples or probes.Samples(), None
        return probes.read(self._model.morphology.layers, samples, self._gradients)


def health_signals(session: str, epoch: int, reading: probes.Reading) -> tuple[HealthSignal, ...]:
    """One signal a layer, in the order of the reading."""
    return tuple(
        HealthSignal(session=session, epoch=epoch, layer=name, **layer._asdict())
        for name, layer in reading.layers.items()
    )
