"""What Urza counts of itself, in Prometheus' terms; names and labels are frozen by a test."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from esper.services.urza.database import PoolStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 30.0)
UNKNOWN_ROUTE = "unknown"
OTHER_METHOD = "other"
# Whoever asks chooses the word, and each is kept for ever.
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class Metrics:
    """Counts of one Urza process, in a registry of its own.

    Args:
        pool: tells how many connections to the database there may be and are.
    """

    def __init__(self, pool: Callable[[], PoolStatistics]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "esper_urza_requests",
            "Requests answered, by the template of their path.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "esper_urza_request_seconds",
            "Seconds from a request's beginning to the end of its answer.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        running = Gauge(
            "esper_urza_requests_running", "Requests being answered now.", registry=self._registry
        )
        running.set_function(lambda: float(self.running))
        self.running = 0
        connections = Gauge(
            "esper_urza_database_connections",
            "Connections to the database that are at work, and how many there may be.",
            ("which",),
            registry=self._registry,
        )
        connections.labels("in_use").set_function(lambda: float(pool().in_use))
        connections.labels("limit").set_function(lambda: float(pool().limit))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """One more request was answered."""
        method = method if method in _METHODS else OTHER_METHOD
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self) -> bytes:
        """Every count, in Prometheus' text form."""
        return generate_latest(self._registry)
