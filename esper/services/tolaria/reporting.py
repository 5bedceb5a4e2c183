"""How a session stands, gathered from what its trainer tells: for the status file and for the bus.

One source for both, so that `status.yaml` and a cluster's objects say the same. What is gathered
lies in this process alone and changes nothing in training.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import Any

from esper.contracts.base import utc_now
from esper.contracts.enums import SeedState, SessionOutcome
from esper.contracts.operational import (
    MAX_SNAPSHOT_BYTES,
    MAX_SNAPSHOT_SEEDS,
    MAX_SNAPSHOT_TRANSITIONS,
    AdaptationDecision,
    SeedObservation,
    SeedSnapshot,
    SeedTransition,
    SessionSnapshot,
)
from esper.contracts.resources import CheckpointStatus, LayerSummary, RefusedLayer, SeedCounts
from esper.contracts.resources.common import decimal_text
from esper.contracts.resources.seed import SeedTransitionStatus
from esper.contracts.resources.session import MAX_SUMMARIES
from esper.errors import one_line
from esper.services.tolaria.checkpoints import Written
from esper.services.tolaria.seeds import ALIVE, SeedRecord
from esper.services.tolaria.snapshots import Snapshot

MAX_REASON = 1024
MAX_TRANSITION_REASON = 256

_CUTS = ((256, 16), (128, 8), (64, 4), (32, 1))
"""Characters of a transition's reason and transitions of a seed, where all are too many bytes."""


@dataclass
class _Seed:
    """One slot that has left dormancy. `moved` grows with every transition of the session."""

    layer: str
    slot: int
    state: SeedState
    cycle: int
    blueprint: str | None = None
    kernel: str | None = None
    alpha: float = 0.0
    contribution: float | None = None
    moved: int = 0
    transitions: deque[SeedTransitionStatus] = field(
        default_factory=lambda: deque(maxlen=MAX_SNAPSHOT_TRANSITIONS)
    )

    def observe(self, seen: SeedObservation) -> None:
        self.state, self.cycle, self.alpha = seen.state, seen.cycle, seen.alpha
        self.blueprint, self.kernel = seen.blueprint, seen.kernel
        self.contribution = None if seen.measurement is None else seen.measurement.mean


class SessionReport:
    """An observer that knows how the session stands; any thread may ask and tell.

    `version` grows with every change, so that whoever looks now and then knows what is new.
    """

    def __init__(
        self,
        session: str,
        *,
        layers: Mapping[str, str],
        refused: Mapping[str, str],
        parameters_base: int,
        epochs: int,
        threads: int,
        seeds_per_layer: int = 1,
        processes: int = 1,
        attempt: int = 0,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """`layers` are the hosts' kinds by name, `refused` the other layers' reasons.

        `attempt` is the operator's, 0 where there is none.
        """
        self.version = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds = dict(layers)
        self._slots = len(layers) * seeds_per_layer
        self._refused = tuple(
            RefusedLayer(name=name, reason=one_line(reason, MAX_REASON))
            for name, reason in list(refused.items())[:MAX_SUMMARIES]
        )
        self._seeds: dict[tuple[str, int], _Seed] = {}
        self._health: dict[str, int] = {}
        self._moves = count(1)
        self._steps: Callable[[], int] = int
        self._sequence = 0
        self._time = clock()
        self._fields: dict[str, Any] = {
            "session": session,
            "attempt": attempt,
            "epochs": epochs,
            "parameters_base": parameters_base,
            "parameters": parameters_base,
            "threads": threads,
            "processes": processes,
        }

    # -- what the trainer tells -----------------------------------------------------------------

    def resumed(
        self,
        records: Iterable[SeedRecord],
        history: Iterable[tuple[datetime, SeedTransition]],
        written: Written,
        row: Mapping[str, Any] | None = None,
    ) -> None:
        """The session goes on from the checkpoint `written`, with these seeds and that history.

        `row` is the line of metrics.jsonl of that epoch.
        """
        with self._lock:  # it is news once the session has begun
            self._fields["epoch"] = written.epoch
            if row is not None:
                # The records know the seeds better than a line of the log, which lacks numbers.
                self._take({**row, "active": ()})
            for time, transition in history:
                self._move(transition, time)
            for record in records:
                self._seed(record.layer, record.slot).observe(record.observation())
            self._checkpointed(written)

    def begun(self, steps: Callable[[], int]) -> None:
        """Everything is there and training begins; `steps` is a number that grows with it."""
        with self._changing():
            self._steps = steps

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Take over an epoch's figures; at boundaries those of layers and seeds too."""
        with self._changing():
            self._take(row)

    def transition(self, transition: SeedTransition) -> None:
        """A seed has moved."""
        with self._changing():
            self._move(transition, self._clock())

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        """A decision shows in the seeds that it moves, not here."""

    def event(self, epoch: int, reason: str, message: str) -> None:
        """An event of the whole session is its message until the next."""
        with self._changing():
            self._fields["message"] = one_line(f"{reason}: {message}", MAX_REASON)

    def checkpoint(self, snapshot: Snapshot) -> None:
        """A checkpoint that is due is not there yet; `checkpointed` hears when it is."""

    def checkpointed(self, written: Written) -> None:
        """A checkpoint is complete."""
        with self._changing():
            self._checkpointed(written)

    def finish(
        self,
        outcome: SessionOutcome,
        message: str,
        *,
        test: float | None = None,
        parameters: int | None = None,
        flops: int | None = None,
    ) -> None:
        """How the session has ended; `test` is the metric on the test set."""
        with self._changing():
            self._fields |= {"outcome": outcome, "message": one_line(message, MAX_REASON)}
            if test is not None:
                metrics = self._fields.get("metrics", {})
                self._fields["metrics"] = metrics | {"test": decimal_text(test)}
            for name, value in (("parameters", parameters), ("flops", flops)):
                if value is not None:
                    self._fields[name] = value

    # -- what others ask ------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """A number that grows while the session gets on."""
        return self._steps()

    def heartbeat(self) -> None:
        """The session gets on; nothing else has changed."""
        with self._changing():
            pass

    def snapshot(self) -> SessionSnapshot:
        """How the session stands now, with all of it that fits into a status."""
        with self._lock:
            milliseconds = int(self._time.timestamp() * 1000)
            self._sequence = max(self._sequence + 1, milliseconds)
            seeds = sorted(self._seeds.values(), key=lambda seed: (_rank(seed), -seed.moved))
            return SessionSnapshot(
                sequence=self._sequence,
                time=self._time,
                layers=self._summaries(),
                refused_layers=self._refused,
                seed_counts=self._counts(),
                seeds=tuple(map(self._told, seeds[:MAX_SNAPSHOT_SEEDS])),
                seeds_left_out=max(0, len(seeds) - MAX_SNAPSHOT_SEEDS),
                **self._fields,
            )

    # -- parts ----------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            yield
            self._time = self._clock()
            self.version += 1

    def _take(self, row: Mapping[str, Any]) -> None:
        for layer in row.get("layers", ()):
            self._health[layer["layer"]] = round(100 * layer["healthScore"])
        for wire in row.get("active", ()):
            fields = {name: value for name, value in wire.items() if name != "reason"}
            seen = SeedObservation.model_validate(fields)
            self._seed(seen.layer, seen.slot).observe(seen)
        names = ("trainLoss", "validationLoss", "validationMetric")
        # A line of the log has nothing where a number was not finite.
        values = {name: math.nan if row[name] is None else row[name] for name in names}
        self._fields |= {
            "epoch": row["epoch"],
            "metrics": {name: decimal_text(value) for name, value in values.items()},
            "parameters": row["parameters"],
            "flops": row["flops"],
        }

    def _counts(self) -> SeedCounts:
        """Of the seeds as they are told of; slots that were never used are dormant."""
        counts = Counter(seed.state for seed in self._seeds.values())
        counts[SeedState.DORMANT] += max(0, self._slots - len(self._seeds))
        return SeedCounts.of(counts)

    def _seed(self, layer: str, slot: int) -> _Seed:
        new = _Seed(layer, slot, SeedState.DORMANT, 0)
        return self._seeds.setdefault((layer, slot), new)

    def _move(self, transition: SeedTransition, time: datetime) -> None:
        seed = self._seed(transition.layer, transition.slot)
        seed.state, seed.cycle = transition.current, transition.cycle
        seed.blueprint, seed.kernel = transition.blueprint, transition.kernel
        measured = transition.measurement
        seed.contribution = None if measured is None else measured.mean
        if transition.current is SeedState.FOSSILIZED:
            seed.alpha = 1.0
        elif transition.current is not SeedState.GRAFTING:
            seed.alpha = 0.0
        seed.moved = next(self._moves)
        seed.transitions.append(
            SeedTransitionStatus(
                time=time,
                epoch=transition.epoch,
                previous=transition.previous,
                current=transition.current,
                reason=one_line(transition.reason, MAX_TRANSITION_REASON),
            )
        )

    def _checkpointed(self, written: Written) -> None:
        self._fields["checkpoint"] = CheckpointStatus(
            name=written.where, epoch=written.epoch, time=written.time
        )

    def _summaries(self) -> tuple[LayerSummary, ...]:
        slots: dict[str, int] = {}
        for layer, _ in self._seeds:
            slots[layer] = slots.get(layer, 0) + 1
        return tuple(
            LayerSummary(
                name=name,
                kind=kind,
                seeds=slots.get(name, 0),
                health_percent=self._health.get(name),
            )
            for name, kind in list(self._kinds.items())[:MAX_SUMMARIES]
        )

    def _told(self, seed: _Seed) -> SeedSnapshot:
        measured = seed.contribution
        return SeedSnapshot(
            layer=seed.layer,
            slot=seed.slot,
            state=seed.state,
            blueprint=seed.blueprint,
            kernel=seed.kernel,
            alpha_percent=round(100 * seed.alpha),
            health_percent=self._health.get(seed.layer),
            contribution=None if measured is None else decimal_text(measured),
            cycle=seed.cycle,
            transitions=tuple(seed.transitions),
        )


def fitted(snapshot: SessionSnapshot, most: int = MAX_SNAPSHOT_BYTES) -> SessionSnapshot:
    """`snapshot`, cut down to at most so many bytes as JSON.

    First the reasons of transitions get shorter and the oldest transitions go. Then of seeds (which
    are counted as left out), refused layers and layers the last half of those goes that are most.
    """
    whole = snapshot
    for characters, transitions in _CUTS:
        if _size(snapshot) <= most:
            return snapshot
        seeds = tuple(_shortened(seed, characters, transitions) for seed in whole.seeds)
        snapshot = whole.model_copy(update={"seeds": seeds})
    while _size(snapshot) > most:
        sizes = {name: _size(snapshot, name) for name in ("seeds", "refused_layers", "layers")}
        name = max(sizes, key=lambda one: sizes[one])
        found = getattr(snapshot, name)
        if not found:
            return snapshot
        changes: dict[str, object] = {name: found[: len(found) // 2]}
        if name == "seeds":
            gone = len(found) - len(found) // 2
            changes["seeds_left_out"] = snapshot.seeds_left_out + gone
        snapshot = snapshot.model_copy(update=changes)
    return snapshot


def _shortened(seed: SeedSnapshot, characters: int, transitions: int) -> SeedSnapshot:
    kept = tuple(
        step.model_copy(update={"reason": one_line(step.reason, characters)})
        if len(step.reason) > characters
        else step
        for step in seed.transitions[-transitions:]
    )
    return seed.model_copy(update={"transitions": kept})


def _size(snapshot: SessionSnapshot, *parts: str) -> int:
    """In bytes as JSON; of these parts alone, if any are named."""
    include = set(parts) or None
    text = snapshot.model_dump_json(by_alias=True, exclude_none=True, include=include)
    return len(text.encode())


def _rank(seed: _Seed) -> bool:
    """Seeds that live come first."""
    return seed.state not in ALIVE
