"""What the operator counts, for Prometheus. The names are part of its interface."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)


class OperatorMetrics:
    """Every metric, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._reconciles = self._histogram(
            "reconcile_seconds", "Time to reconcile an object, without its wait in the queue"
        )
        self._waits = self._histogram(
            "queue_wait_seconds", "Time from being due to being reconciled"
        )
        self._in_all = self._histogram(
            "reconcile_with_wait_seconds", "Time from being due to being reconciled to the end"
        )
        self._errors = Counter(
            "esper_operator_reconcile_errors_total",
            "Reconciles that broke off, and are tried again",
            ("kind", "error"),
            registry=self.registry,
        )
        self._writes = Counter(
            "esper_operator_api_writes_total",
            "Writes to the API server, the lease's not counted",
            ("verb", "kind", "outcome"),
            registry=self.registry,
        )
        self._write_seconds = Histogram(
            "esper_operator_api_write_seconds",
            "Time for a write to the API server",
            ("verb", "kind"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._sessions = Gauge(
            "esper_operator_sessions",
            "Sessions by the reason of their condition Succeeded",
            ("state",),
            registry=self.registry,
        )
        self._watch_ages = Gauge(
            "esper_operator_watch_age_seconds",
            "Time since the store was last seen to agree with the API server",
            ("kind",),
            registry=self.registry,
        )
        self._depth = self._gauge("queue_depth", "Objects that wait to be reconciled")
        self._delayed = self._gauge("queue_delayed", "Objects that are due at a later time")
        self._busy = self._gauge("workers_busy", "Objects that are being reconciled")
        self._leading = self._gauge("leading", "Whether this process holds the lease")

    def _histogram(self, name: str, said: str) -> Histogram:
        return Histogram(
            f"esper_operator_{name}", said, ("kind",), buckets=_SECONDS, registry=self.registry
        )

    def _gauge(self, name: str, said: str) -> Gauge:
        return Gauge(f"esper_operator_{name}", said, registry=self.registry)

    def reconciled(self, kind: str, waited: float, took: float) -> None:
        """An object of `kind` was reconciled, in seconds after as many of waiting."""
        self._waits.labels(kind).observe(waited)
        self._reconciles.labels(kind).observe(took)
        self._in_all.labels(kind).observe(waited + took)

    def broke_off(self, kind: str, error: BaseException) -> None:
        """The reconcile of an object of `kind` broke off with `error`."""
        self._errors.labels(kind, type(error).__name__).inc()

    def wrote(self, verb: str, kind: str, outcome: str, took: float) -> None:
        """A write of that verb about an object of that kind was sent, and how it went."""
        self._writes.labels(verb, kind, outcome).inc()
        self._write_seconds.labels(verb, kind).observe(took)

    def show_sessions(self, states: Mapping[str, int]) -> None:
        """How many sessions there are in each state."""
        self._sessions.clear()
        for state, count in states.items():
            self._sessions.labels(state).set(count)

    def show_watches(self, ages: Mapping[str, float]) -> None:
        """Seconds since each kind's store was last seen to agree with the API server."""
        for kind, age in ages.items():
            self._watch_ages.labels(kind).set(age)

    def show_queue(self, depth: int, delayed: int, busy: int) -> None:
        """How the queue stands."""
        self._depth.set(depth)
        self._delayed.set(delayed)
        self._busy.set(busy)

    def show_lease(self, leading: bool) -> None:
        """Whether this process holds the lease."""
        self._leading.set(leading)

    def text(self) -> str:
        """All of it in Prometheus' text form."""
        return generate_latest(self.registry).decode()
