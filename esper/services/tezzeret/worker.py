"""The forge's worker: requests for kernels in, kernels in the hub and answers out.

A trainer waits for the kernel that a decision names, so every request is answered, whatever goes
wrong. All of it can happen twice: a request comes again after a crash, and what is compiled by
then is answered at once.
"""

from __future__ import annotations

import contextlib
import logging

from pydantic import ValidationError

from esper.contracts.assets import CompiledKernel
from esper.contracts.enums import BlueprintState, ComponentType
from esper.contracts.messages import KernelReady, KernelRequested, OonaMessage, TopicNames
from esper.errors import BusUnavailable, EsperError, KernelError, one_line
from esper.services.listening import listen
from esper.services.oona_client import Oona, Subscription
from esper.services.tezzeret.forge import Forge
from esper.services.urza.client import UrzaClient

CONSUMER_GROUP = "tezzeret"
_SETTLED = (BlueprintState.CHARACTERIZED, BlueprintState.FAILED)

_log = logging.getLogger(__name__)


class TezzeretWorker:
    """Compiles the kernels that `bus` asks for and keeps them in `hub`.

    With a `forge` it compiles under leases, as one of many workers. Without one it compiles in
    this process, for a hub in this process, and `name` is what it claims kernels under: started
    again after a crash it has its old name, and so its old claims.
    """

    def __init__(
        self, bus: Oona, hub: UrzaClient, *, name: str = "tezzeret", forge: Forge | None = None
    ) -> None:
        self._bus = bus
        self._hub = hub
        self._name = name
        self._forge = forge

    async def subscribe(self) -> Subscription:
        """The worker's place in the queue of requests, for `run`.

        Raises:
            BusUnavailable: the bus is closed, or does not answer.
        """
        # One at a time: what this worker has not begun, another can do meanwhile.
        topics = {TopicNames.KERNEL_REQUESTED}
        return await self._bus.subscribe(topics, CONSUMER_GROUP, prefetch=1)

    async def run(self, subscription: Subscription) -> None:
        """Answer requests until cancelled or until the bus closes."""
        try:
            await listen(subscription, self.handle)
        except BusUnavailable as error:
            _log.info("the bus is closed, kernels are no longer compiled: %s", error)

    async def handle(self, message: OonaMessage) -> None:
        """Answer one request.

        Raises:
            BusUnavailable: the bus does not take the answer.
        """
        try:
            request = KernelRequested.model_validate(message.payload)
        except ValidationError as error:
            _log.error("request %s is not of the contract: %s", message.id, one_line(str(error)))
            return
        answer = await self.answer(request)
        if answer is not None:
            await self._bus.publish(
                OonaMessage.carrying(
                    TopicNames.KERNEL_READY,
                    answer,
                    ComponentType.TEZZERET,
                    trace_id=message.trace_id,
                    scope=message.scope,
                )
            )

    async def answer(self, request: KernelRequested) -> KernelReady | None:
        """The kernel's artifact or the reason why there is none; None if another worker has it."""
        try:
            kernel = await self._settled(request)
        except EsperError as error:
            reason = str(error)
        except Exception as error:
            # The worker outlives faults that nobody foresaw; the next request may go well.
            _log.exception("kernel %s of %s", request.kernel, request.blueprint)
            reason = f"{type(error).__name__}: {one_line(str(error))}"
        else:
            if kernel is None:
                return None
            return KernelReady(
                kernel=kernel.kernel,
                blueprint=request.blueprint,
                artifact_digest=kernel.artifact_digest,
                error=kernel.error,
            )
        return KernelReady(kernel=request.kernel, blueprint=request.blueprint, error=reason)

    async def _settled(self, request: KernelRequested) -> CompiledKernel | None:
        kernel = await self._hub.request_kernel(request.blueprint_digest, request.target)
        if kernel.kernel != request.kernel:
            raise KernelError(
                f"kernel: got {request.kernel} for {request.blueprint}; allowed: {kernel.kernel}, "
                "the identity of that blueprint for that target"
            )
        if kernel.state in _SETTLED:
            return kernel
        if self._forge is not None:
            settled = await self._forge.compile(kernel.kernel)
            return settled or _if_settled(await self._hub.kernel(kernel.kernel))
        if not await self._hub.claim_kernel(kernel.kernel, self._name):
            return None
        try:
            return await self._compiled(kernel)
        except BaseException:
            # Not the kernel's fault (a full disk, a cancelled task): it can be asked for again.
            # A claim that can't be given up either is this worker's to find again.
            with contextlib.suppress(EsperError):
                await self._hub.release_kernel(kernel.kernel, self._name)
            raise

    async def _compiled(self, kernel: CompiledKernel) -> CompiledKernel:
        # Imports torch, which a worker with a forge has in other processes.
        from esper.services.tezzeret.compiler import compile_kernel

        blueprint = await self._hub.blueprint(kernel.blueprint_digest)
        try:
            artifact = compile_kernel(blueprint.document, kernel.target)
        except KernelError as error:
            return await self._hub.fail_kernel(kernel.kernel, str(error))
        return await self._hub.complete_kernel(artifact.metadata, artifact.data)


def _if_settled(kernel: CompiledKernel) -> CompiledKernel | None:
    return kernel if kernel.state in _SETTLED else None
