"""The breaker under every order of requests, outcomes and pauses."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from esper.utils.circuit_breaker import CircuitBreaker, CircuitState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def broken(failures: int = 3) -> tuple[CircuitBreaker, Clock]:
    clock = Clock()
    breaker = CircuitBreaker(failures, 10.0, clock=clock)
    for _ in range(failures):
        ticket = breaker.admit()
        assert ticket is not None
        breaker.report(ticket, "failed")
    return breaker, clock


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    breaker = CircuitBreaker(3, 10.0, clock=Clock())
    for outcome in ("failed", "failed", "answered", "failed", "failed"):
        breaker.report(breaker.admit(), outcome)
        assert breaker.state is CircuitState.CLOSED
    breaker.report(breaker.admit(), "failed")
    assert breaker.state is CircuitState.OPEN
    assert breaker.admit() is None
    assert breaker.seconds_left() == 10.0


def test_one_trial_goes_out_and_its_answer_closes_the_circuit() -> None:
    breaker, clock = broken()
    clock.now += 9.9
    assert breaker.admit() is None
    clock.now += 0.2
    assert breaker.state is CircuitState.HALF_OPEN
    trial = breaker.admit()
    assert trial is not None
    assert breaker.admit() is None
    breaker.report(trial, "answered")
    assert breaker.state is CircuitState.CLOSED
    breaker.report(breaker.admit(), "failed")
    assert breaker.state is CircuitState.CLOSED, "failures are counted from 0 again"


def test_a_trial_that_fails_opens_it_for_as_long_again() -> None:
    breaker, clock = broken()
    clock.now += 11
    breaker.report(breaker.admit(), "failed")
    assert breaker.state is CircuitState.OPEN
    assert breaker.seconds_left() == 10.0


def test_a_trial_that_is_abandoned_leaves_room_for_another() -> None:
    breaker, clock = broken()
    clock.now += 11
    breaker.report(breaker.admit(), "abandoned")
    assert breaker.state is CircuitState.HALF_OPEN
    assert breaker.admit() is not None


def test_an_outcome_from_before_the_circuit_opened_changes_nothing() -> None:
    clock = Clock()
    breaker = CircuitBreaker(1, 10.0, clock=clock)
    early, late = breaker.admit(), breaker.admit()
    breaker.report(early, "failed")
    breaker.report(late, "answered")
    assert breaker.state is CircuitState.OPEN
    clock.now += 11
    trial = breaker.admit()
    breaker.report(late, "failed")
    assert breaker.admit() is None, "the trial is still out"
    breaker.report(trial, "answered")
    assert breaker.state is CircuitState.CLOSED


class Rules(RuleBasedStateMachine):
    """However requests overlap: open lets none out, half-open one, closed all."""

    @initialize(failures=st.integers(1, 4))
    def begin(self, failures: int) -> None:
        self.clock = Clock()
        self.limit = failures
        self.breaker = CircuitBreaker(failures, 10.0, clock=self.clock)
        self.out: list[tuple[int, int]] = []
        self.era = 0
        self.in_a_row = 0
        self.opened: float | None = None
        self.trial = False

    @rule()
    def ask(self) -> None:
        ticket = self.breaker.admit()
        if self.opened is None:
            assert ticket is not None
        elif self.trial or self.clock.now < self.opened + 10.0:
            assert ticket is None
        else:
            assert ticket is not None
            self.trial = True
        if ticket is not None:
            self.out.append((ticket, self.era))

    @rule(
        index=st.integers(0, 9),
        outcome=st.sampled_from(["answered", "failed", "failed", "abandoned"]),
    )
    def end(self, index: int, outcome: str) -> None:
        if index >= len(self.out):
            return
        ticket, era = self.out.pop(index)
        self.breaker.report(ticket, outcome)
        if era != self.era:
            return
        self.trial = False
        if outcome == "answered":
            self.era += self.opened is not None
            self.opened, self.in_a_row = None, 0
        elif outcome == "failed":
            self.in_a_row += 1
            if self.opened is not None or self.in_a_row >= self.limit:
                self.opened = self.clock.now
                self.era += 1

    @rule(seconds=st.sampled_from([0.5, 5.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def shows_where_it_stands(self) -> None:
        if not hasattr(self, "breaker"):
            return
        if self.opened is None:
            expected = CircuitState.CLOSED
        elif self.trial or self.clock.now >= self.opened + 10.0:
            expected = CircuitState.HALF_OPEN
        else:
            expected = CircuitState.OPEN
        assert self.breaker.state is expected


TestRules = Rules.TestCase
TestRules.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
