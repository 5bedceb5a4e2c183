"""One object at a time: what is known of it, a pure decision, and what that asks for.

A turn carries out one plan, or what of it fits into a moment. If that wrote anything, the object
lines up again behind the others: a session with much to be made does not keep the rest waiting.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import NoReturn

from esper.contracts.assets import CompiledKernel
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.enums import BlueprintState
from esper.errors import EsperError
from esper_operator.carrying import About, Carrier, Outcome
from esper_operator.children import names, secret
from esper_operator.decisions import blueprints, kernels, namespaces, requests, sessions
from esper_operator.errors import LeaseLost
from esper_operator.hearing import Reports, kernel_ready
from esper_operator.hub import Hub
from esper_operator.kinds import (
    BLUEPRINT,
    KERNEL,
    SECRET,
    SEED,
    SESSION,
)
from esper_operator.memory import Memories, Memory
from esper_operator.metrics import OperatorMetrics
from esper_operator.observed import (
    BlueprintObserved,
    KernelObserved,
    NamespaceObserved,
    Observed,
    RequestsObserved,
)
from esper_operator.options import Options
from esper_operator.plans import KernelOrder, Manifest, Plan
from esper_operator.pod_view import PodView
from esper_operator.store import NAMESPACE, Store
from esper_operator.views import JobView, KernelView, MetaView, Said, SessionView
from esper_operator.work import Key, WorkQueue

NO_STATUS = b"{}"
_log = logging.getLogger(__name__)

Reconcile = Callable[[Key], Awaitable[Outcome]]


async def work(queue: WorkQueue, reconcile: Reconcile, metrics: OperatorMetrics) -> NoReturn:
    """Take keys and reconcile them, for ever."""
    while True:
        turn = await queue.take()
        began = time.perf_counter()
        try:
            outcome = await reconcile(turn.key)
        except asyncio.CancelledError:
            raise
        except LeaseLost as error:
            # Whether the lease is lost is for the election to say; a later try may be in time.
            _log.warning("not written: %s", error)
            queue.failed(turn.key)
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
            if outcome.gone:
                queue.forget(turn.key)
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
        hub: Hub,
        options: Options,
        enqueue: Callable[[Iterable[Key]], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`enqueue` has other objects looked at; `clock` gives seconds since the epoch."""
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
            return self._gone(key)
        memory = self._memories.of(*key, session.uid)
        outcome = Outcome()
        await self._order(session, memory, outcome)
        plan = sessions.decide(self._observed(session, memory), self._options)
        about = About(SESSION, key.namespace, key.name, session.uid)
        first = session.status_text == NO_STATUS and plan.status is not None
        later = not first and tells_only(session, plan)
        there = later or await self._carrier.status(about, plan, outcome)
        if there and first:
            await self._carrier.notices(about, memory, plan, outcome)
        elif there:  # of a burst, each is acknowledged first
            if plan.credentials:
                child = names.secret(key.name)
                await self._carrier.secret(memory, child, self._of_session(session), outcome)
            await self._carrier.rest(about, memory, plan, outcome)
            if later and not outcome.wrote:
                await self._carrier.status(about, plan, outcome)
        return self._settled(memory, plan, outcome)

    async def _order(self, session: SessionView, memory: Memory, outcome: Outcome) -> None:
        """Make CompiledKernels of what the session asks for on the bus."""
        asked = self._reports.requests(session.uid)
        if not asked:
            return
        observed = RequestsObserved(
            session=session,
            requests=asked,
            blueprints=tuple(self._store.blueprints(session.namespace)),
            kernels=tuple(self._store.kernels(session.namespace)),
        )
        plan = requests.decide(observed, self._options)
        about = About(SESSION, session.namespace, session.name, session.uid)
        await self._carrier.rest(about, memory, plan, outcome)
        for request in asked:
            kernel = self._store.kernel(session.namespace, request.kernel)
            ready = None if kernel is None else kernel_ready(kernel)
            if ready is not None:
                await self._reports.answer(session.uid, session.namespace, ready)

    def _observed(self, session: SessionView, memory: Memory) -> Observed:
        own = self._store.deployment(session.namespace, names.tamiyo(session.name))
        shared = self._store.deployment(session.namespace, names.TAMIYO)
        jobs = self._store.children(session.uid, JobView)
        memory.forget_refusals(partial(self._is_there, session))
        shared_refusals = self._memories.refusals(NAMESPACE, session.namespace, "")
        no_pods = {f"Pod/{job.name}": self._store.pod_refusal(job) for job in jobs}
        return Observed(
            session=session,
            now=self._clock(),
            jobs=jobs,
            pods=self._store.children(session.uid, PodView),
            metas=self._store.children(session.uid, MetaView),
            tamiyo=own or shared,
            snapshot=self._reports.snapshot(session.uid),
            heard=self._reports.heard(session.uid),
            seed_statuses=memory.child_statuses,
            seed_times=memory.child_times,
            refusals={
                **shared_refusals,
                **memory.refusals(),
                **{k: said for k, said in no_pods.items() if said},
            },
            hearing_since=self._reports.hearing_since,
        )

    def _is_there(self, session: SessionView, child: str) -> bool:
        """Whether a CompiledKernel, whoever made it, or a Seed of the session has come since."""
        kind, _, name = child.partition("/")
        if kind == KERNEL.name:
            return self._store.kernel(session.namespace, name) is not None
        place = session.namespace, name, session.uid
        return kind == SEED.name and self._store.own(SEED, *place) is not None

    def _of_session(self, session: SessionView) -> Callable[[], Awaitable[Manifest]]:
        async def ask() -> Manifest:
            policy = session.spec().run_policy.deletion_policy
            issued = await self._hub.session_credentials(
                session.uid, session.namespace, deletion_policy=policy
            )
            blueprints = self._store.blueprints(session.namespace)
            return secret.manifest(session, issued, self._options, self._clock(), blueprints)

        return ask

    async def _blueprint(self, key: Key) -> Outcome:
        blueprint = self._store.blueprint(key.namespace, key.name)
        if blueprint is None:
            return self._gone(key)
        memory = self._memories.of(*key, blueprint.uid)
        kernels = self._store.kernels(key.namespace)
        observed = BlueprintObserved(
            blueprint=blueprint,
            now=self._clock(),
            kernels=tuple(kernel for kernel in kernels if kernel.blueprint == key.name),
            stored=memory.stored,
            asked_at=memory.asked_at,
            same_answers=memory.same_answers,
            refused=memory.hub_refusal,
        )
        plan, outcome = blueprints.decide(observed, self._options), Outcome()
        about = About(BLUEPRINT, key.namespace, key.name, blueprint.uid)
        if await self._carrier.status(about, plan, outcome):
            if plan.submit is not None:
                document = BlueprintDocument.model_validate(plan.submit.document)
                await self._ask(memory, lambda: self._hub.put_blueprint(document), outcome)
            await self._carrier.rest(about, memory, plan, outcome)
        return self._settled(memory, plan, outcome)

    async def _kernel(self, key: Key) -> Outcome:
        kernel = self._store.kernel(key.namespace, key.name)
        if kernel is None:
            self._look_at_asking(key.name)
            return self._gone(key)
        memory = self._memories.of(*key, kernel.uid)
        job = self._store.job_of_kernel(key.namespace, key.name)
        observed = KernelObserved(
            kernel=kernel,
            now=self._clock(),
            blueprint=self._store.blueprint(key.namespace, kernel.blueprint),
            job=job,
            pods=() if job is None else self._store.pods_of(job.uid),
            secret=self._store.meta(SECRET, key.namespace, names.kernel_secret(key.name)),
            stored=memory.stored,
            figures=memory.figures,
            refusals=memory.refusals(),
            refused=memory.hub_refusal,
        )
        plan, outcome = kernels.decide(observed, self._options), Outcome()
        about = About(KERNEL, key.namespace, key.name, kernel.uid)
        if await self._carrier.status(about, plan, outcome):
            if plan.order is not None:
                await self._ask(memory, partial(self._compiled, memory, plan.order), outcome)
            if plan.credentials:
                child = names.kernel_secret(key.name)
                await self._carrier.secret(memory, child, self._of_kernel(kernel), outcome)
            await self._carrier.rest(about, memory, plan, outcome)
        if outcome.wrote:
            self._look_at_asking(key.name)
        return self._settled(memory, plan, outcome)

    def _look_at_asking(self, kernel: str) -> None:
        """Have the sessions looked at that wait for a kernel."""
        asking = map(self._store.session_of_uid, self._reports.asking(kernel))
        self._enqueue(Key(SESSION.name, s.namespace, s.name) for s in asking if s is not None)

    async def _compiled(self, memory: Memory, order: KernelOrder) -> CompiledKernel:
        """How far the hub has the kernel; once it is compiled, with what was measured of it."""
        target = KernelTarget.model_validate(order.target)
        stored = await self._hub.request_kernel(order.blueprint_digest, target)
        if stored.state is BlueprintState.CHARACTERIZED:
            memory.figures = (await self._hub.metadata(order.kernel)).figures
        return stored

    def _of_kernel(self, kernel: KernelView) -> Callable[[], Awaitable[Manifest]]:
        async def ask() -> Manifest:
            issued = await self._hub.kernel_credentials(kernel.name)
            return secret.compile_manifest(kernel, issued, self._options, self._clock())

        return ask

    async def _shared(self, key: Key) -> Outcome:
        """What the sessions of a namespace share: its controller, and its Secret."""
        memory = self._memories.of(*key, key.namespace)
        observed = NamespaceObserved(
            namespace=key.namespace,
            now=self._clock(),
            sessions=tuple(self._store.sessions(key.namespace)),
            tamiyo=self._store.deployment(key.namespace, names.TAMIYO),
            secret=self._store.meta(SECRET, key.namespace, names.TAMIYO),
            refusals=memory.refusals(),
        )
        plan, outcome = namespaces.decide(observed, self._options), Outcome()
        refused = memory.refusals()
        if plan.credentials:
            await self._carrier.secret(
                memory, names.TAMIYO, self._of_namespace(key.namespace), outcome
            )
        await self._carrier.rest(None, memory, plan, outcome)
        if memory.refusals() != refused:
            self._enqueue(Key(SESSION.name, s.namespace, s.name) for s in observed.sessions)
        if not (observed.sessions or observed.tamiyo or observed.secret):
            return self._gone(key)
        return self._settled(memory, plan, outcome)

    def _gone(self, key: Key) -> Outcome:
        """The outcome for an object that is not there any more."""
        self._memories.forget(*key)
        return Outcome(gone=True)

    def _of_namespace(self, namespace: str) -> Callable[[], Awaitable[Manifest]]:
        async def ask() -> Manifest:
            issued = await self._hub.namespace_credentials(namespace)
            return secret.controller_manifest(namespace, issued, self._options, self._clock())

        return ask

    async def _ask(
        self, memory: Memory, ask: Callable[[], Awaitable[object]], outcome: Outcome
    ) -> None:
        """Ask the hub; what it refuses for good is remembered, what passes breaks the turn off."""
        before = memory.stored, memory.hub_refusal
        try:
            memory.stored, memory.hub_refusal = await ask(), None
        except EsperError as error:
            if not error.permanent:
                raise
            memory.hub_refusal = Said(type(error).__name__, str(error))
        news = before != (memory.stored, memory.hub_refusal)
        outcome.wrote |= news  # there is something new to decide on
        memory.asked_at = self._clock()
        memory.same_answers = 1 if news else memory.same_answers + 1

    def _settled(self, memory: Memory, plan: Plan, outcome: Outcome) -> Outcome:
        """The outcome; a decision that never comes to rest is a fault.

        Raises:
            WorkFailed: it has written something in too many turns in a row.
        """
        outcome.soon(plan.again_in)
        memory.took_turn(wrote=outcome.wrote)
        return outcome


def tells_only(session: SessionView, plan: Plan) -> bool:
    """Whether a plan's status is for people to read: its conditions differ, and nothing else.

    It can wait until what is to be made is made; most of what it says is over by then. What counts
    attempts, times and ends is written first, for whoever decides again after a crash.
    """
    if plan.status is None:
        return False
    before = session.status()
    return all(before.get(k) == value for k, value in plan.status.items() if k != "conditions")


def _named(key: Key) -> tuple[str, str, str]:
    return key.kind, key.name, key.namespace
