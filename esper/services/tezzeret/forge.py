"""Work under a lease: a worker compiles what it has leased from the hub and hands in the result.

While it works it extends the lease; a worker that dies loses it, and another one takes over. The
hub accepts one result a kernel, so the worst that a lost lease costs is work done twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Protocol, TypeVar

from esper.contracts.assets import Blueprint, CompiledKernel
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.errors import (
    ConfigError,
    Conflict,
    EsperError,
    KernelError,
    NotFound,
    StorageFull,
    Unauthorized,
    Unavailable,
    WorkFailed,
)
from esper.services.contracts import BlueprintClaim, KernelClaim
from esper.services.tezzeret.samples import sample_targets
from esper.services.tezzeret.sandbox import CompilationKilled, CompiledBytes
from esper.services.urza.client import UrzaClient

BEATS_PER_LEASE = 3
_RETRY_SECONDS = 0.5
_NOT_THE_RESULTS_FAULT = (ConfigError, Conflict, NotFound, StorageFull, Unauthorized)
"""Permanent refusals that say nothing of the result that was handed in."""

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class Compiler(Protocol):
    """What makes a kernel of a blueprint and a target."""

    async def compile(self, document: BlueprintDocument, target: KernelTarget) -> CompiledBytes:
        """The kernel; KernelError where it can't be, Unavailable where another try may go well."""
        ...


class Forge:
    """Does leased work, one piece at a time; counts what came of it.

    Args:
        hub: where work comes from and results go.
        compiler: what compiles.
        worker: the name that leases are made out to, unlike any other worker's.
        lease_seconds: how long a lease lasts without a beat.
    """

    def __init__(
        self, hub: UrzaClient, compiler: Compiler, *, worker: str, lease_seconds: float
    ) -> None:
        self._hub = hub
        self._compiler = compiler
        self._worker = worker
        self._lease_seconds = lease_seconds
        self._turn = asyncio.Lock()
        self.counts = dict.fromkeys(
            ("compiled_total", "failed_total", "lost_total", "given_back_total", "validated_total"),
            0,
        )

    async def compile(self, kernel: str) -> CompiledKernel | None:
        """Compile that kernel; None where it is settled or another worker has it.

        Raises:
            KernelNotFound: the hub does not know it.
            Unavailable: the hub does not answer, or the compilation was killed from outside.
            StorageFull: there is no room for the artifact.
        """
        async with self._turn:
            claim = await self._hub.lease_kernel(kernel, self._worker, self._lease_seconds)
            return None if claim is None else await self._carry_out(claim)

    async def work_off(self) -> int:
        """Compile and validate until there is nothing left; how many pieces of work that was.

        Raises:
            Unavailable: the hub does not answer.
        """
        done = 0
        while await self._next_kernel() or await self._next_blueprint():
            done += 1
        return done

    async def _next_kernel(self) -> bool:
        async with self._turn:
            claim = await self._hub.claim_next_kernel(self._worker, self._lease_seconds)
            if claim is None:
                return False
            await self._carry_out(claim)
            return True

    async def _next_blueprint(self) -> bool:
        async with self._turn:
            claim = await self._hub.claim_next_blueprint(self._worker, self._lease_seconds)
            if claim is None:
                return False
            await self._validate(claim)
            return True

    async def _carry_out(self, claim: KernelClaim) -> CompiledKernel | None:
        """Compile under a lease and hand in the result; None where the lease was lost."""
        _log.info("compiling kernel %s of %s", claim.kernel, claim.blueprint.name)

        def beat() -> Awaitable[datetime]:
            return self._hub.heartbeat_kernel(claim.kernel, claim.lease, self._lease_seconds)

        try:
            async with self._beating(beat):
                try:
                    made = await self._compiler.compile(claim.blueprint, claim.target)
                    settled = await self._handed_in(
                        lambda: self._hub.complete_kernel(
                            made.metadata, made.data, token=claim.lease
                        )
                    )
                except EsperError as error:
                    reason = _judgement(error)
                    if reason is None:
                        raise
                    settled = await self._handed_in(
                        lambda: self._hub.fail_kernel(claim.kernel, reason, token=claim.lease)
                    )
                    self.counts["failed_total"] += 1
                    _log.warning("kernel %s: %s", claim.kernel, reason)
                    return settled
                self.counts["compiled_total"] += 1
                _log.info("kernel %s is compiled", claim.kernel)
                return settled
        except Conflict as error:
            self.counts["lost_total"] += 1
            _log.warning("kernel %s is another worker's now: %s", claim.kernel, error)
            return None
        except BaseException as error:
            # Not judged: a full store, a process killed from outside, a worker that stops. Where
            # giving it back fails too, the lease ends by itself.
            self.counts["given_back_total"] += 1
            with suppress(EsperError):
                await self._hub.release_kernel(
                    claim.kernel, self._worker, token=claim.lease, blamed=_is_to_blame(error)
                )
            raise

    async def _validate(self, claim: BlueprintClaim) -> Blueprint | None:
        """Compile a blueprint for sample hosts; None where the lease was lost."""

        def beat() -> Awaitable[datetime]:
            return self._hub.heartbeat_blueprint(claim.digest, claim.lease, self._lease_seconds)

        try:
            async with self._beating(beat):
                error = await self._fault(claim.document)
                if error is None:
                    settled = await self._handed_in(
                        lambda: self._hub.complete_blueprint(claim.digest, claim.lease)
                    )
                else:
                    settled = await self._handed_in(
                        lambda: self._hub.fail_blueprint(claim.digest, claim.lease, error)
                    )
                self.counts["validated_total"] += 1
                return settled
        except Conflict as error:
            self.counts["lost_total"] += 1
            _log.warning("blueprint %s is another worker's now: %s", claim.digest, error)
            return None
        except BaseException as error:
            self.counts["given_back_total"] += 1
            with suppress(EsperError):
                await self._hub.release_blueprint(
                    claim.digest, self._worker, token=claim.lease, blamed=_is_to_blame(error)
                )
            raise

    async def _fault(self, document: BlueprintDocument) -> str | None:
        """Why the blueprint compiles for none of the sample hosts that it fits; None: it does."""
        fault = None
        for target in sample_targets(document):
            try:
                await self._compiler.compile(document, target)
            except KernelError as error:
                fault = fault or str(error)
            else:
                return None
        return fault

    async def _handed_in(self, hand_in: Callable[[], Awaitable[Result]]) -> Result:
        """Hand in a result until the hub takes or refuses it: the work is done and shall count."""
        while True:
            try:
                return await hand_in()
            except Unavailable as error:
                _log.warning("a result waits for the hub: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    @asynccontextmanager
    async def _beating(self, beat: Callable[[], Awaitable[datetime]]) -> AsyncIterator[None]:
        """Inside, the lease is extended; where it is lost, the block ends with Conflict."""
        working = asyncio.current_task()
        lost: list[Conflict] = []

        async def extend() -> None:
            while True:
                await asyncio.sleep(self._lease_seconds / BEATS_PER_LEASE)
                try:
                    await beat()
                except Conflict as error:
                    lost.append(error)
                    if working is not None:
                        working.cancel()
                    return
                except (Unavailable, WorkFailed) as error:
                    _log.warning("a lease could not be extended: %s", error)

        beating = asyncio.create_task(extend(), name="lease")
        try:
            yield
        except asyncio.CancelledError:
            if lost and working is not None:
                working.uncancel()
                raise lost[0] from None
            raise
        finally:
            beating.cancel()
            await asyncio.wait({beating})


def _is_to_blame(error: BaseException) -> bool:
    """Whether the work itself may have ended the attempt at it."""
    return isinstance(error, CompilationKilled)


def _judgement(error: EsperError) -> str | None:
    """Why the kernel can't be had, for good; None where `error` says nothing of the kernel.

    A result that the hub refuses, as one above its size cap, would be refused from every worker.
    """
    if isinstance(error, KernelError) and not isinstance(error, NotFound):
        return str(error)
    if not error.permanent or isinstance(error, _NOT_THE_RESULTS_FAULT):
        return None
    return f"the hub refuses the result: {error}"
