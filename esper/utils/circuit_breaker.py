"""A circuit breaker: a service that keeps failing is left alone for a while.

Closed, every request goes out. After `failures` in a row it opens: requests are refused at once,
without waiting for a time limit. `reset_seconds` later it is half-open: one request goes out as a
trial, and its outcome closes the circuit or opens it again (M. Nygard, Release It!, 2007).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Literal


class CircuitState(StrEnum):
    """What a breaker does with a request."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


Outcome = Literal["answered", "failed", "abandoned"]
"""How a request went; one that was abandoned says nothing about the service."""


class CircuitBreaker:
    """For the requests of one event loop to one service.

    Args:
        failures: how many in a row open the circuit, at least 1.
        reset_seconds: how long it stays open before a trial.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        failures: int,
        reset_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = failures
        self._reset_seconds = reset_seconds
        self._clock = clock
        self._failures = 0
        self._opened: float | None = None
        self._on_trial = False
        self._era = 0

    @property
    def state(self) -> CircuitState:
        """Half-open from the moment a trial may go out until its outcome is known."""
        if self._opened is None:
            return CircuitState.CLOSED
        if self._on_trial or self.seconds_left() == 0.0:
            return CircuitState.HALF_OPEN
        return CircuitState.OPEN

    def seconds_left(self) -> float:
        """How long until a trial may go out; 0 where nothing has to be waited for."""
        if self._opened is None:
            return 0.0
        return max(0.0, self._opened + self._reset_seconds - self._clock())

    def admit(self) -> int | None:
        """A ticket for one request, to be given to `report`; None where it must not go out."""
        if self._opened is not None:
            if self._on_trial or self.seconds_left() > 0.0:
                return None
            self._on_trial = True
        return self._era

    def report(self, ticket: int, outcome: Outcome) -> None:
        """Say how the request of `ticket` went.

        What was sent before the circuit last opened or closed changes nothing any more.
        """
        if ticket != self._era:
            return
        self._on_trial = False
        if outcome == "answered":
            if self._opened is not None:
                self._era += 1
            self._failures, self._opened = 0, None
        elif outcome == "failed":
            self._failures += 1
            if self._opened is not None or self._failures >= self._limit:
                self._era += 1
                self._opened = self._clock()
