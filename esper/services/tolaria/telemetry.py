"""When a session's layers are probed, what is kept for it, and the signals made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from esper.contracts.operational import HealthSignal
from esper.core.model_wrapper import MorphableModel
from esper.execution import probes
from esper.services.tolaria.distribution import Ranks


class Telemetry:
    """When a session's layers are probed, and what was read.

    Every boundary is, while a seed is on trial; else one at most every `interval_steps` optimiser
    steps, so that the probes of a dormant model cost next to nothing however short its epochs
    are. Between two probes `reading` is the last one, of the end of `epoch`. An epoch's samples
    and gradients stay on the device until they are read.
    """

    def __init__(self, model: MorphableModel, interval_steps: int) -> None:
        self.reading = probes.Reading(layers={}, seeds={})
        self.epoch = 0
        self._model = model
        self._interval_steps = interval_steps
        self._steps = 0
        self._samples: probes.Samples | None = None
        self._gradients: probes.GradientSums | None = None

    def attend(self, model: MorphableModel) -> None:
        """Watch this model from now on: the same one, built anew."""
        self._model = model

    @property
    def due(self) -> bool:
        """Whether the next boundary is probed."""
        active = self._model.morphology.active > 0
        return active or self._steps >= self._interval_steps or not self.reading.layers

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

    def count_step(self, *, last: bool) -> None:
        """An optimiser step is about to be taken; the `last` of an epoch has its gradients kept."""
        self._steps += 1
        if last and self.due:
            self._gradients = probes.gradient_sums(self._model.morphology.layers)

    def read(self, epoch: int) -> None:
        """Make `reading` of the samples, which are then gone, and the last gradients."""
        self.epoch = epoch
        samples, self._samples = self._samples or probes.Samples(), None
        self.reading = probes.read(self._model.morphology.layers, samples, self._gradients)
        self._steps = 0

    def share(self, ranks: Ranks) -> None:
        """Give every rank the reading of rank 0, which alone has read."""
        if ranks.size == 1:
            return
        seeds = [[*site, finite] for site, finite in self.reading.seeds.items()]
        told = ranks.told(self.to_state() | {"seeds": seeds})
        if ranks.rank:
            self.restore(told)
            found = {(layer, slot): finite for layer, slot, finite in told["seeds"]}
            self.reading = replace(self.reading, seeds=found)

    def to_state(self) -> dict[str, Any]:
        """JSON-ready, for a checkpoint; samples are not kept beyond their boundary."""
        return {"steps": self._steps, "epoch": self.epoch, "layers": self.reading.layers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_state` gave."""
        self._steps, self.epoch = state["steps"], state["epoch"]
        layers = {name: probes.LayerReading(*one) for name, one in state["layers"].items()}
        self.reading = probes.Reading(layers=layers, seeds={})
        self._samples = None


def health_signals(session: str, epoch: int, reading: probes.Reading) -> tuple[HealthSignal, ...]:
    """One signal a layer, in the order of the reading."""
    return tuple(
        HealthSignal(session=session, epoch=epoch, layer=name, **layer._asdict())
        for name, layer in reading.layers.items()
    )
