"""The hub elsewhere, over its REST interface: what `UrzaHub` is in its own process.

Errors are the hub's own, with its words: whoever calls need not know where the hub is. Requests
are tried again as `http_requests` says; what is claimed by a request whose answer was lost is free
again once its lease has run out.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TypeVar

import httpx

from esper.configs import HubConfig
from esper.contracts.assets import Blueprint, CompiledKernel, TrainingSession
from esper.contracts.base import Contract
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import KernelMetadata
from esper.errors import (
    Conflict,
    ConflictReason,
    EsperError,
    KernelError,
    Unauthorized,
    WorkFailed,
)
from esper.services.contracts import (
    MAX_PAGE_ITEMS,
    BlueprintClaim,
    IssuedCredentials,
    KernelClaim,
    KernelCredentials,
    OperatorCredentials,
    Page,
    SimpleBlueprintContract,
    SimpleCompiledKernelContract,
    SweepResult,
    SweptNamespaces,
)
from esper.services.urza.http_answers import (
    Answer,
    Params,
    built,
    checked_digest,
    checked_uid,
    given,
    held_lease,
    hub_error,
    in_states,
    read_answer,
)
from esper.services.urza.http_kernels import HttpKernelSource
from esper.services.urza.http_kernels import checked_kernel as _kernel
from esper.services.urza.http_requests import HubRequest
from esper.services.urza.wire import (
    LEASE_HEADER,
    BlueprintResult,
    ClaimRequest,
    CredentialsRequest,
    DeletionPolicy,
    KernelCreation,
    KernelResult,
    LeaseExtension,
    LeaseRequest,
    ReleaseRequest,
    SweepRequest,
)

MAX_ANSWER_BYTES = 64 * 2**20
_NO_TAG = '""'
"""An entity tag that nothing has."""
OWN_LEASE_SECONDS = 3600.0
"""How long a kernel that was claimed without a lease of the caller's stays claimed."""

_BLUEPRINTS, _KERNELS, _SESSIONS = "/api/v1/blueprints", "/api/v1/kernels", "/api/v1/sessions"
_REQUESTED, _UNVALIDATED = "/internal/requested-kernels", "/internal/unvalidated-blueprints"
_BINARY = "application/octet-stream"
MAX_REASON_CHARACTERS = 2000

Item = TypeVar("Item")


class HttpUrza(HttpKernelSource):
    """An `UrzaClient` over HTTP; for one event loop, closed by `async with`.

    `claim_kernel` takes a lease that this object remembers; without `token`, `release_kernel`,
    `complete_kernel` and `fail_kernel` are under it.

    Every method raises HubUnavailable where the hub does not answer, and Unauthorized, which names
    `hub.token`, where it refuses the token.

    Raises:
        ConfigError: no address is set.
    """

    def __init__(
        self, config: HubConfig, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(config, transport=transport)
        self._leases: dict[str, str] = {}

    async def put_blueprint(
        self, document: BlueprintDocument, *, session: str | None = None
    ) -> Blueprint:
        """The blueprint of that content, made unless it is there; its first name stays."""
        return await self._asked(
            Blueprint, "POST", f"{_BLUEPRINTS}/", body=document, params=given(session=session)
        )

    async def blueprint(self, digest: str) -> Blueprint:
        """The blueprint of that digest; BlueprintNotFound where there is none."""
        return await self._asked(Blueprint, "GET", f"{_BLUEPRINTS}/{checked_digest(digest)}")

    async def blueprint_outlines(self) -> tuple[SimpleBlueprintContract, ...]:
        """All blueprints without their graphs, the oldest first."""
        kind = Page[SimpleBlueprintContract]
        pages = self._pages(kind, f"{_BLUEPRINTS}/", in_states(BlueprintState), view="outline")
        return tuple([item async for item in pages])

    async def blueprints(self) -> tuple[Blueprint, ...]:
        """All blueprints, the oldest first."""
        pages = self._pages(Page[Blueprint], f"{_BLUEPRINTS}/", in_states(BlueprintState))
        return tuple([item async for item in pages])

    async def request_kernel(
        self, blueprint_digest: str, target: KernelTarget, *, session: str | None = None
    ) -> CompiledKernel:
        """The kernel for that target, made in state proposed unless it is there."""
        creation = KernelCreation(blueprint_digest=checked_digest(blueprint_digest), target=target)
        return await self._asked(
            CompiledKernel, "POST", f"{_KERNELS}/", body=creation, params=given(session=session)
        )

    async def kernel(self, kernel: str) -> CompiledKernel:
        """The kernel of that id, in whatever state; KernelNotFound where there is none."""
        return await self._asked(CompiledKernel, "GET", f"{_KERNELS}/{_kernel(kernel)}")

    async def kernels(
        self, states: Sequence[BlueprintState] = tuple(BlueprintState)
    ) -> tuple[CompiledKernel, ...]:
        """The kernels in one of `states`, by default all, the oldest first."""
        if not states:
            return ()
        pages = self._pages(Page[CompiledKernel], f"{_KERNELS}/", in_states(states))
        return tuple([item async for item in pages])

    async def kernel_outlines(
        self, blueprint: str | None = None
    ) -> tuple[SimpleCompiledKernelContract, ...]:
        """The kernels of the blueprint with that digest, or all, the oldest first."""
        kind = Page[SimpleCompiledKernelContract]
        params = in_states(BlueprintState)
        if blueprint is not None:
            params["blueprint"] = checked_digest(blueprint)
        pages = self._pages(kind, f"{_KERNELS}/", params, view="outline")
        return tuple([item async for item in pages])

    # Work

    async def claim_kernel(self, kernel: str, worker: str) -> bool:
        """Whether `worker` may now compile the kernel, for `OWN_LEASE_SECONDS`."""
        held = self._leases.get(kernel)
        if held is not None:
            try:
                await self.heartbeat_kernel(kernel, held, OWN_LEASE_SECONDS)
            except Conflict:
                del self._leases[kernel]
            else:
                return True
        claim = await self.lease_kernel(kernel, worker, OWN_LEASE_SECONDS)
        if claim is None:
            return False
        self._leases[kernel] = claim.lease
        return True

    async def claim_next_kernel(self, worker: str, lease_seconds: float) -> KernelClaim | None:
        """Lease the oldest kernel that nobody compiles; None where there is none."""
        return await self._claimed(KernelClaim, f"{_REQUESTED}/claim", worker, lease_seconds)

    async def lease_kernel(
        self, kernel: str, worker: str, lease_seconds: float
    ) -> KernelClaim | None:
        """Lease that kernel; None where it is settled or another worker has it."""
        place = f"{_REQUESTED}/{_kernel(kernel)}/claim"
        return await self._claimed(KernelClaim, place, worker, lease_seconds)

    async def heartbeat_kernel(self, kernel: str, token: str, lease_seconds: float) -> datetime:
        """Keep a lease for that long from now; Conflict where it is lost."""
        return await self._extended(f"{_REQUESTED}/{_kernel(kernel)}", token, lease_seconds)

    async def release_kernel(
        self, kernel: str, worker: str, *, token: str | None = None, blamed: bool = False
    ) -> None:
        """Give up `worker`'s claim; else do nothing."""
        lease = token or self._leases.pop(kernel, None)
        if lease is not None:
            await self._sent(
                "POST",
                f"{_REQUESTED}/{_kernel(kernel)}/release",
                body=built(ReleaseRequest, worker=worker, lease=lease, blamed=blamed),
            )

    async def complete_kernel(
        self, metadata: KernelMetadata, data: bytes, *, token: str | None = None
    ) -> CompiledKernel:
        """Keep a compiled kernel's artifact; Conflict where the lease is lost."""
        digest = hashlib.sha256(data).hexdigest()
        if (digest, len(data)) != (metadata.artifact_digest, metadata.artifact_bytes):
            raise KernelError(
                f"kernel {metadata.kernel}: got {len(data)} bytes with digest {digest}; allowed: "
                f"{metadata.artifact_bytes} bytes with digest {metadata.artifact_digest}"
            )
        lease = self._lease(metadata.kernel, token)
        place = f"{_REQUESTED}/{_kernel(metadata.kernel)}"
        await self._sent(
            "PUT",
            f"{place}/artifact",
            content=data,
            params={"digest": digest, "bytes": str(len(data))},
            headers={LEASE_HEADER: lease},
        )
        result = KernelResult(lease=lease, metadata=metadata)
        return await self._settled(metadata.kernel, result)

    async def fail_kernel(
        self, kernel: str, error: str, *, token: str | None = None
    ) -> CompiledKernel:
        """Record why a kernel can't be compiled; Conflict where the lease is lost."""
        reason = error[:MAX_REASON_CHARACTERS] or "no reason was given"
        return await self._settled(
            kernel, KernelResult(lease=self._lease(kernel, token), error=reason)
        )

    async def claim_next_blueprint(
        self, worker: str, lease_seconds: float
    ) -> BlueprintClaim | None:
        """Lease the oldest blueprint that nobody has validated; None where there is none."""
        return await self._claimed(BlueprintClaim, f"{_UNVALIDATED}/claim", worker, lease_seconds)

    async def heartbeat_blueprint(self, digest: str, token: str, lease_seconds: float) -> datetime:
        """Keep a lease for that long from now; Conflict where it is lost."""
        return await self._extended(
            f"{_UNVALIDATED}/{checked_digest(digest)}", token, lease_seconds
        )

    async def complete_blueprint(self, digest: str, token: str) -> Blueprint:
        """Record that a blueprint is valid; Conflict where the lease is lost."""
        return await self._validated(digest, BlueprintResult(lease=held_lease(token)))

    async def fail_blueprint(self, digest: str, token: str, error: str) -> Blueprint:
        """Record why a blueprint is not valid; Conflict where the lease is lost."""
        reason = error[:MAX_REASON_CHARACTERS] or "no reason was given"
        return await self._validated(digest, BlueprintResult(lease=held_lease(token), error=reason))

    async def release_blueprint(
        self, digest: str, worker: str, *, token: str, blamed: bool = False
    ) -> None:
        """Give up `worker`'s lease; else do nothing."""
        place = f"{_UNVALIDATED}/{checked_digest(digest)}/release"
        held = built(ReleaseRequest, worker=worker, lease=held_lease(token), blamed=blamed)
        await self._sent("POST", place, body=held)

    # Sessions

    async def register_session(self, session: TrainingSession) -> TrainingSession:
        """The session of that uid: `session` itself the first time, as stored from then on."""
        return await self._asked(TrainingSession, "POST", f"{_SESSIONS}/", body=session)

    async def update_session(self, session: TrainingSession) -> TrainingSession:
        """Replace what is stored of a registered session."""
        return await self._asked(TrainingSession, "PUT", f"{_SESSIONS}/{session.uid}", body=session)

    async def require_session(self, uid: str) -> None:
        """Return if the token may keep the session of that uid; changes nothing.

        It asks for a change under an entity tag that no session comes to have: whoever may not
        make it is told so, before the tag is looked at.

        Raises:
            Unauthorized: it may not.
        """
        probe = TrainingSession(
            name="probe", uid=checked_uid(uid), epochs=1, num_layers=0, num_slots=1
        )
        try:
            await self._sent("PUT", f"{_SESSIONS}/{uid}", body=probe, headers={"If-Match": _NO_TAG})
        except EsperError as error:
            if isinstance(error, Unauthorized) or not error.permanent:
                raise

    async def require_work(self) -> None:
        """Return if the token may take work from the hub; takes none.

        Raises:
            Unauthorized: it may not.
        """
        await self._sent("GET", _REQUESTED, params={"limit": "1"})

    async def session_credentials(
        self, uid: str, namespace: str, *, deletion_policy: DeletionPolicy = "Retain"
    ) -> IssuedCredentials:
        """What opens a session's rows, objects and streams; asking again gives the same.

        With "Delete" a sweep that finds the session gone removes what it keeps at the hub.
        """
        return await self._asked(
            IssuedCredentials,
            "POST",
            f"/internal/sessions/{checked_uid(uid)}/credentials",
            body=built(CredentialsRequest, namespace=namespace, deletion_policy=deletion_policy),
        )

    async def namespace_credentials(self, namespace: str) -> IssuedCredentials:
        """What opens the streams of all sessions of a namespace, for its Tamiyo."""
        checked = built(CredentialsRequest, namespace=namespace).namespace
        return await self._asked(
            IssuedCredentials, "POST", f"/internal/namespaces/{checked}/credentials"
        )

    async def operator_credentials(self) -> OperatorCredentials:
        """What opens the operator's streams of all namespaces."""
        return await self._asked(OperatorCredentials, "POST", "/internal/operator/credentials")

    async def kernel_credentials(self, kernel: str) -> KernelCredentials:
        """With what that kernel is compiled, and no other."""
        return await self._asked(
            KernelCredentials, "POST", f"/internal/requested-kernels/{_kernel(kernel)}/credentials"
        )

    async def revoke_credentials(self, uid: str) -> None:
        """Revoke a session's credentials for good; NotFound where it has none."""
        await self._sent("DELETE", f"/internal/sessions/{checked_uid(uid)}/credentials")

    async def namespaces(self) -> SweptNamespaces:
        """The namespaces in which a sweep may find something, and the hub's time for it."""
        return await self._asked(SweptNamespaces, "GET", "/internal/namespaces")

    async def sweep(
        self, namespace: str, live: Sequence[str], gathered_at: datetime
    ) -> SweepResult:
        """End the sessions of a namespace that are not `live`; those made later are left alone."""
        request = built(
            SweepRequest, namespace=namespace, live_uids=tuple(live), gathered_at=gathered_at
        )
        return await self._asked(SweepResult, "POST", "/internal/sessions/sweep", body=request)

    async def health(self) -> bool:
        """Whether the hub answers, and all that it stands on."""
        try:
            await self._sent("GET", "/readyz", probe=True)
        except EsperError:
            return False
        return True

    # Requests

    def _lease(self, kernel: str, token: str | None) -> str:
        lease = token or self._leases.get(kernel)
        if lease is None:
            raise Conflict(
                ConflictReason.LEASE_LOST,
                f"kernel {kernel}: got no lease; allowed: that of a claim",
            )
        return held_lease(lease)

    async def _settled(self, kernel: str, result: KernelResult) -> CompiledKernel:
        place = f"{_REQUESTED}/{_kernel(kernel)}/result"
        settled = await self._asked(CompiledKernel, "POST", place, body=result)
        self._leases.pop(kernel, None)
        return settled

    async def _validated(self, digest: str, result: BlueprintResult) -> Blueprint:
        place = f"{_UNVALIDATED}/{checked_digest(digest)}/result"
        return await self._asked(Blueprint, "POST", place, body=result)

    async def _extended(self, place: str, token: str, lease_seconds: float) -> datetime:
        lease = built(LeaseRequest, lease=held_lease(token), lease_seconds=lease_seconds)
        found = await self._asked(LeaseExtension, "POST", f"{place}/heartbeat", body=lease)
        return found.expires_at

    async def _claimed(
        self, kind: type[Answer], path: str, worker: str, lease_seconds: float
    ) -> Answer | None:
        # The token is drawn here: a request that is sent again because its answer was lost finds
        # the work that the first one was given.
        token = secrets.token_hex(16)
        claim = built(ClaimRequest, worker=worker, lease_seconds=lease_seconds, lease=token)
        data = await self._sent("POST", path, body=claim)
        return read_answer(kind, data, path) if data else None

    async def _pages(
        self, kind: type[Page[Item]], path: str, params: Params, *, view: str = "full"
    ) -> AsyncIterator[Item]:
        asked = {**params, "view": view, "limit": str(MAX_PAGE_ITEMS)}
        seen: set[str] = set()
        while True:
            found = read_answer(kind, await self._sent("GET", path, params=asked), path)
            for item in found.items:
                yield item
            if found.next_cursor is None:
                return
            if found.next_cursor in seen:
                raise WorkFailed(
                    f"the hub's answer to {path}: got the nextCursor of an earlier page; allowed: "
                    "a new one, or none at the end; see hub.url"
                )
            seen.add(found.next_cursor)
            asked["cursor"] = found.next_cursor

    async def _asked(
        self,
        kind: type[Answer],
        method: str,
        path: str,
        *,
        body: Contract | None = None,
        params: Params | None = None,
    ) -> Answer:
        return read_answer(kind, await self._sent(method, path, body=body, params=params), path)

    async def _sent(
        self,
        method: str,
        path: str,
        *,
        body: Contract | None = None,
        content: bytes | None = None,
        params: Params | None = None,
        headers: dict[str, str] | None = None,
        probe: bool = False,
    ) -> bytes:
        if body is not None:
            content = body.model_dump_json(by_alias=True, exclude_none=True).encode()
        return await self._requests.body(
            HubRequest(
                subject=f"{method} {path}",
                path=path,
                refusal=hub_error,
                method=method,
                probe=probe,
                limit=MAX_ANSWER_BYTES,
                params=params or {},
                content=content,
                content_type="application/json" if body is not None else _BINARY,
                headers=headers or {},
            )
        )

    def _refusal(self, kernel: str, status: int, problem: bytes) -> EsperError:
        return hub_error(status, problem)
