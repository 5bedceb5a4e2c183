"""What `esper run` shows while it trains: a live view on a terminal, plain lines elsewhere.

Everything goes to the stream it is given, which is stderr: stdout belongs to `--json`. The view
reads the same records that the run directory keeps, so it knows nothing of the trainer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Protocol, Self

from pydantic import ValidationError

from esper.cli import formats
from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import Measurement, SeedObservation

PLAIN_EPOCH_LINES = 100


class LiveView(Protocol):
    """Shows a session while it runs. Called at interval boundaries, in the order of events."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def epoch(self, metrics: Mapping[str, object]) -> None:
        """Show an epoch's line of metrics.jsonl."""

    def transition(self, event: Mapping[str, object]) -> None:
        """Show a transition or an event, as in events.jsonl."""

    def decision(self, decision: Mapping[str, object]) -> None:
        """Show a decision, as in decisions.jsonl; waiting is not worth a line."""


def make_view(
    stream: IO[str],
    epochs: int,
    session: str,
    force_plain: bool = False,
    *,
    policy: str = "",
    parameters_base: int | None = None,
    metric: str = "accuracy",
) -> LiveView:
    """The view for `stream`: live where it is a terminal that can move its cursor, else plain.

    Args:
        stream: where to write, stderr as a rule.
        epochs: how many epochs the session asks for.
        session: the session's name.
        force_plain: plain lines even on a terminal.
        policy: the controller's policy, for the header.
        parameters_base: parameters before any growth; the first epoch's where not given.
        metric: what the validation metric is called; "accuracy" is shown as a percentage.
    """
    facts = SessionFacts(session, policy, epochs, parameters_base, metric)
    if force_plain or not stream.isatty():
        return PlainView(stream, facts)
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        return PlainView(stream, facts)
    from esper.cli.terminal import TerminalView

    return TerminalView(console, facts)


class SessionFacts:
    """What a view knows of its session, kept up to date from the records it is shown."""

    def __init__(
        self,
        session: str,
        policy: str,
        epochs: int,
        parameters_base: int | None = None,
        metric: str = "accuracy",
    ) -> None:
        self.session = formats.printable(session)
        self.policy = formats.printable(policy)
        self.epochs = max(epochs, 1)
        self.parameters_base = parameters_base
        self.metric_name = formats.printable(metric)
        self.metrics: Mapping[str, object] = {}
        self.seeds: dict[tuple[str, int], SeedObservation] = {}
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the view was made."""
        return time.monotonic() - self._started

    @property
    def reached(self) -> int:
        """The last epoch shown, 0 before the first."""
        return whole(self.metrics.get("epoch")) or 0

    def take_epoch(self, metrics: Mapping[str, object]) -> None:
        """Take over an epoch's metrics and the seeds observed at its end."""
        self.metrics = metrics
        if self.parameters_base is None:
            self.parameters_base = whole(metrics.get("parameters"))
        active = metrics.get("active")
        if isinstance(active, list | tuple):
            seen = [seed for seed in map(_observation, active) if seed is not None]
            self.seeds = {(seed.layer, seed.slot): seed for seed in seen}

    def take_transition(self, event: Mapping[str, object]) -> None:
        """Move a seed to its new state between two epochs; a dormant one leaves the table."""
        seed = _observation(
            {
                "layer": event.get("layer"),
                "slot": event.get("slot"),
                "state": event.get("current"),
                "blueprint": event.get("blueprint"),
                "cycle": event.get("cycle", 0),
                "alpha": 1.0 if event.get("current") == SeedState.FOSSILIZED else 0.0,
                "measurement": event.get("measurement"),
            }
        )
        if seed is None:
            return
        key = (seed.layer, seed.slot)
        before = self.seeds.pop(key, None)
        if seed.state is SeedState.DORMANT:
            return
        if before is not None and before.cycle == seed.cycle:
            # A transition tells only what it is about; the rest of the seed stays known.
            known = {
                "blueprint": seed.blueprint or before.blueprint,
                "measurement": seed.measurement or before.measurement,
                "parameters": before.parameters,
            }
            seed = seed.model_copy(update=known)
        self.seeds[key] = seed

    def metric(self) -> str:
        """The last validation metric; an accuracy as a percentage."""
        value = number(self.metrics.get("validationMetric"))
        return formats.percent(value) if self.metric_name == "accuracy" else formats.figure(value)

    def parameters(self, arrow: str) -> str:
        """Parameters at birth and now, `base → now`."""
        now = whole(self.metrics.get("parameters"))
        base = self.parameters_base
        if base is None or now is None:
            return formats.count(base)
        grown = f" (+{(now - base) / base:.0%})".replace("%", " %") if now > base > 0 else ""
        return f"{base:,} {arrow} {now:,}{grown}"


class PlainView:
    """One line an epoch at most, and one for each transition and decision that is no wait.

    Lines are ASCII but for what the records themselves bring. A stream that closes early (`| head`)
    silences the view; it never ends a run.
    """

    def __init__(self, stream: IO[str], facts: SessionFacts) -> None:
        self._stream = stream
        self._facts = facts
        # A long session keeps to about a hundred lines.
        self._stride = math.ceil(facts.epochs / PLAIN_EPOCH_LINES)

    def __enter__(self) -> Self:
        policy = f", policy {self._facts.policy}" if self._facts.policy else ""
        self._write(f"session {self._facts.session}: {self._facts.epochs} epochs{policy}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def epoch(self, metrics: Mapping[str, object]) -> None:
        """Write the epoch's line, at most `PLAIN_EPOCH_LINES` of them over the session."""
        facts = self._facts
        facts.take_epoch(metrics)
        if facts.reached % self._stride and facts.reached != facts.epochs:
            return
        width = len(str(facts.epochs))
        self._write(
            f"epoch {facts.reached:>{width}}/{facts.epochs}"
            f"  train {formats.figure(number(metrics.get('trainLoss')))}"
            f"  validation {formats.figure(number(metrics.get('validationLoss')))}"
            f"  {facts.metric_name} {facts.metric()}"
            f"  parameters {facts.parameters('->')}"
            f"  {formats.flops(whole(metrics.get('flops')))}"
            f"  {formats.duration(facts.elapsed)}"
        )

    def transition(self, event: Mapping[str, object]) -> None:
        """Write a transition's or an event's line."""
        self._facts.take_transition(event)
        self._write(transition_line(event, "->"))

    def decision(self, decision: Mapping[str, object]) -> None:
        """Write a decision's line, unless it is to wait."""
        if decision.get("action") != DecisionAction.WAIT:
            self._write(decision_line(decision))

    def _write(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            # Closed at the other end: the run goes on and its directory holds everything.
            pass


def transition_line(event: Mapping[str, object], arrow: str) -> str:
    """A transition or another event in one line."""
    epoch = event.get("epoch", "?")
    if "current" not in event:
        reason, message = event.get("reason", ""), event.get("message", "")
        return formats.printable(f"epoch {epoch}: {reason} {message}")
    place = formats.where(str(event.get("layer")), whole(event.get("slot")))
    blueprint = f" {event['blueprint']}" if event.get("blueprint") else ""
    moved = f"{event.get('previous', '?')} {arrow} {event.get('current')}"
    reason = f": {event['reason']}" if event.get("reason") else ""
    return formats.printable(f"epoch {epoch}: {place}{blueprint} {moved}{reason}")


def decision_line(decision: Mapping[str, object]) -> str:
    """A decision in one line."""
    slot = whole(decision.get("slot"))
    layer = decision.get("layer")
    place = f" {formats.where(str(layer), slot)}" if layer is not None else ""
    blueprint = f" {decision['blueprint']}" if decision.get("blueprint") else ""
    refused = "" if decision.get("applied", True) else f" (not applied: {decision.get('outcome')})"
    return formats.printable(
        f"epoch {decision.get('epoch', '?')}: decision {decision.get('action')}{place}{blueprint}"
        f"{refused}: {decision.get('reason', '')}"
    )


def number(value: object) -> float | None:
    """A figure of a record as a float, None where there is none.

    Non-finite floats travel as strings ("NaN", "Infinity").
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def whole(value: object) -> int | None:
    """A figure of a record as an int, None where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def measurement_cells(measurement: Measurement | None) -> tuple[str, str, str]:
    """A measurement's mean, lower bound and rent as table cells."""
    if measurement is None:
        return formats.ABSENT, formats.ABSENT, formats.ABSENT
    return (
        formats.nats(measurement.mean),
        formats.nats(measurement.lower),
        formats.figure(measurement.rent),
    )


def _observation(record: object) -> SeedObservation | None:
    """A seed as observed; None where the record is none, since a view never ends a run."""
    try:
        return SeedObservation.model_validate(record)
    except ValidationError:
        return None
