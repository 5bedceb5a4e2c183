"""One object at a time: what is known of it, a pure decision, and what that asks for.

A turn carries out one plan. If that wrote anything, the object lines up again behind the others: a
session with much to be made does not keep the rest waiting.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NoReturn

from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.errors import EsperError, WorkFailed
from esper_operator.carrying import About, Carrier, Outcome
from esper_operator.errors import LeaseLost
from esper_operator.kinds import BLUEPRINT, JOB, KERNEL, POD, SECRET, SEED, SERVICE, SESSION
from esper_operator.memory import Memories
from esper_operator.metrics import OperatorMetrics
from esper_operator.plans import Plan
from esper_operator.store import NAMESPACE, Store
from esper_operator.work import Key, WorkQueue

MAX_BUSY_TURNS = 50
"""Turns in a row that may write; a decision that never comes to rest is at fault."""
_log = logging.getLogger(__name__)

Reconcile = Callable[[Key], Awaitable[Outcome]]


async def work(
    queue: WorkQueue, reconcile: Reconcile, metrics: OperatorMetrics, lost: Callable[[], None]
) -> NoReturn:
    """Take keys and reconcile them, for ever; `lost` is told where the lease is."""
    while True:
        turn = await queue.take()
        began = time.perf_counter()
        try:
            outcome = await reconcile(turn.key)
        except asyncio.CancelledError:
            raise
        except LeaseLost as error:
            _log.warning("not written: %s", error)
            queue.failed(turn.key)
            lost()
        except EsperError as error:
            metrics.broke_off(turn.key.kind, error)
            _log.warning("%s/%s of %s: to be tried again: %s", *_named(turn.key), error)
            queue.failed(turn.key)
        except Exception as error:  # one object must not stop the work on all others
            metrics.broke_off(turn.key.kind, error)
            _log.exception("%s/%s of %s: to be tried again", *_named(turn.key))
            queue.failed(turn.key)
        else:
            again = None if outcome.again_in == math.inf else max(0.0, outcome.again_in)
            queue.done(turn.key, again)
            if outcome.wrote:
                queue.add(turn.key)
        metrics.reconciled(turn.key.kind, turn.waited, time.perf_counter() - began)


class Reconciler:
    """Reconciles one object of any kind."""

    def __init__(
        self,
        store: Store,
        carrier: Carrier,
        reports: Reports,
        hub: HubPort,
        options: Options,
        enqueue: Callable[[Key], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`enqueue` has another object looked at; `clock` gives seconds since the epoch."""
        self._store = store
        self._carrier = carrier
        self._reports = reports
        self._hub = hub
        self._options = options
        self._enqueue = enqueue
        self._clock = clock
        self._memories = Memories()

    async def reconcile(self, key: Key) -> Outcome:
        """One turn of the object of that key."""
        by_kind = {
            SESSION.name: self._session,
            BLUEPRINT.name: self._blueprint,
            KERNEL.name: self._kernel,
            NAMESPACE: self._shared,
        }
        return await by_kind[key.kind](key)

    async def _session(self, key: Key) -> Outcome:
        session = self._store.session(key.namespace, key.name)
        if session is None:
            self._memories.forget(*key)
            return Outcome()
        memory = self._memories.of(*key, session.uid)
        observed = self._observed(session, memory)
        plan = decide(observed, self._options)
        about = About(SESSION, key.namespace, key.name, session.uid)
        outcome = Outcome()
        outcome.soon(plan.again_in)
        first = session.status_text == b"{}"
        if not await self._carrier.status(about, plan, outcome) or (first and outcome.wrote):
            return outcome  # of a burst, each is acknowledged before any is worked on
        if plan.credentials:
            await self._carrier.secret(
                memory, names.secret(key.name), lambda: self._credentials(session), outcome
            )
        await self._carrier.rest(about, memory, plan, outcome)
        return outcome


def _named(key: Key) -> tuple[str, str, str]:
    return key.kind, key.name, key.namespace
