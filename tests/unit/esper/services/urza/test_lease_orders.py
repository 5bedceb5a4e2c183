"""Leases in any order and at any time, against a plain model of them."""

import asyncio
from contextlib import ExitStack
from unittest.mock import patch

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from esper.contracts.enums import BlueprintState
from esper.errors import Conflict
from esper.services.urza import leases
from tests.unit.esper.services.urza.hubs import DATA, DOCUMENT, Clock, described, opened, requested


class LeasesInAnyOrder(RuleBasedStateMachine):
    """Workers of two hubs over one database, in any order, at any time; against a plain model."""

    claims = Bundle("claims")
    place = None

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.runner = self.stack.enter_context(asyncio.Runner())
        self.clock = Clock()
        self.context = opened(self.place, clock=self.clock)
        self.hub = self.runner.run(self.context.__aenter__())
        self.stack.callback(lambda: self.runner.run(self.context.__aexit__(None, None, None)))
        self.runner.run(self.hub.delete_blueprint(DOCUMENT.digest))
        self.holders: dict[str, str] = {}
        self.ends: dict[str, object] = {}
        self.accepted: dict[str, str] = {}
        self.given_up: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.stack.enter_context(patch.object(leases, "MAX_ATTEMPTS", 3))

    def teardown(self) -> None:
        self.stack.close()

    @property
    def kernels(self) -> list[str]:
        return list(self.attempts)

    def open(self, kernel: str) -> bool:
        return kernel not in self.accepted and kernel not in self.given_up

    def give_up(self) -> None:
        """What the hub does with kernels that too many workers have lost."""
        for kernel in list(self.holders):
            late = self.open(kernel) and self.ends[kernel] < self.clock.now
            if late and self.attempts[kernel] >= leases.MAX_ATTEMPTS:
                self.given_up.add(kernel)
                del self.holders[kernel]

    def run(self, call):
        return self.runner.run(call)

    def holds(self, claim) -> bool:
        return self.holders.get(claim.kernel) == claim.lease

    @precondition(lambda self: len(self.kernels) < 3)
    @rule()
    def request(self) -> None:
        self.attempts[self.run(requested(self.hub, inputs=len(self.kernels) + 1))] = 0

    @rule(seconds=st.sampled_from([1.0, 5.0, 30.0]))
    def time_passes(self, seconds) -> None:
        self.clock.advance(seconds)

    @rule(target=claims, worker=st.sampled_from("ab"), seconds=st.sampled_from([2.0, 10.0]))
    def claim(self, worker, seconds):
        claim = self.run(self.hub.claim_next_kernel(worker, seconds))
        self.give_up()
        free = {
            kernel
            for kernel in self.kernels
            if self.open(kernel)
            and (kernel not in self.holders or self.ends[kernel] < self.clock.now)
        }
        if claim is None:
            assert not free
            return None
        assert claim.kernel in free
        assert self.attempts[claim.kernel] == min(self.attempts[kernel] for kernel in free)
        self.attempts[claim.kernel] += 1
        self.holders[claim.kernel] = claim.lease
        self.ends[claim.kernel] = claim.expires_at
        return claim

    @rule(claim=claims)
    def heartbeat(self, claim) -> None:
        if claim is None:
            return
        try:
            end = self.run(self.hub.heartbeat_kernel(claim.kernel, claim.lease, 7))
        except Conflict:
            assert not self.holds(claim) or claim.kernel in self.accepted
        else:
            assert self.holds(claim)
            self.ends[claim.kernel] = end

    @rule(claim=claims, worker=st.sampled_from("ab"), blamed=st.booleans())
    def release(self, claim, worker, blamed) -> None:
        if claim is None:
            return
        kernel = claim.kernel
        before = self.run(self.hub.kernel(kernel)).state
        self.run(self.hub.release_kernel(kernel, worker, token=claim.lease, blamed=blamed))
        after = self.run(self.hub.kernel(kernel)).state
        if before is BlueprintState.COMPILING and after is BlueprintState.PROPOSED:
            assert self.holds(claim)
            del self.holders[kernel]
            self.attempts[kernel] -= not blamed
        elif before != after:
            assert self.holds(claim)
            assert blamed
            assert self.attempts[kernel] >= leases.MAX_ATTEMPTS
            del self.holders[kernel]
            self.given_up.add(kernel)
        if blamed:
            self.give_up()

    @rule(claim=consumes(claims), succeeds=st.booleans())
    def finish(self, claim, succeeds) -> None:
        if claim is None:
            return
        kernel = claim.kernel
        try:
            if succeeds:
                self.run(self.hub.complete_kernel(described(kernel), DATA, token=claim.lease))
            else:
                self.run(self.hub.fail_kernel(kernel, "why", token=claim.lease))
        except Conflict:
            assert not self.holds(claim)
        else:
            assert self.holds(claim)
            assert self.accepted.setdefault(kernel, claim.lease) == claim.lease

    @invariant()
    def settled_kernels_are_those_with_an_accepted_result(self) -> None:
        settled = (BlueprintState.CHARACTERIZED, BlueprintState.FAILED)
        found = {kernel.kernel for kernel in self.run(self.hub.kernels(settled))}
        assert found == set(self.accepted) | self.given_up


def test_in_whatever_order_a_kernel_has_one_holder_and_one_result(place):
    machine = type("LeasesHere", (LeasesInAnyOrder,), {"place": place})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
