"""Whether the operator works, not merely whether its process runs.

It is dead, and to be started anew, when its event loop stands still, when an object has been worked
on for minutes, when what waits is not taken up, or when a watch has lost something that the API
server holds. It is alive when nothing happens: silence says nothing about a watch.
"""

from __future__ import annotations

import logging

from esper.services.health import ServiceHealth
from esper_operator.metrics import OperatorMetrics

STUCK_SECONDS = 180.0
"""No reconcile takes so long: each of its requests has a limit of a few seconds."""
_log = logging.getLogger(__name__)


class OperatorHealth(ServiceHealth):
    """The three answers of `esper.services.health`, with work and watches in them."""

    def __init__(self, metrics: OperatorMetrics) -> None:
        """`metrics` are what /metrics shows besides."""
        super().__init__("operator")
        self._shown = metrics
        self._fault: str | None = None

    def fault(self, complaint: str | None) -> None:
        """The operator's own judgement of itself: what it must be started anew for, or None."""
        if complaint is not None and complaint != self._fault:
            _log.error("the operator does not work: %s", complaint)
        self._fault = complaint
        self.report("work", complaint)

    def hangs(self) -> bool:
        """Whether the loop stands still, or what it runs does not work."""
        return super().hangs() or self._fault is not None

    def metrics(self) -> str:
        """Every number in Prometheus' text form."""
        return super().metrics() + self._shown.text()
