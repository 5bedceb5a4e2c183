"""`/internal/`: work for the forge's workers under a lease, and credentials for sessions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Annotated, cast

from fastapi import Header, Path, Query, Request, Response

from esper.contracts.assets import Blueprint, CompiledKernel, Namespace
from esper.contracts.base import utc_now
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import Digest, KernelMetadata, artifact_key
from esper.errors import BadInput, KernelError
from esper.services.contracts import (
    BlueprintClaim,
    BlueprintFilter,
    IssuedCredentials,
    KernelClaim,
    KernelCredentials,
    KernelFilter,
    LeaseToken,
    OperatorCredentials,
    Page,
    SimpleBlueprintContract,
    SimpleCompiledKernelContract,
    SweepResult,
    SweptNamespaces,
)
from esper.services.urza.api.blueprints import BlueprintDigest
from esper.services.urza.api.kernels import KernelPath
from esper.services.urza.api.lists import Paged, page
from esper.services.urza.api.routes import (
    BINARY,
    JSON,
    allowed,
    answer,
    caller_of,
    chunks,
    documented,
    router,
    urza_of,
)
from esper.services.urza.api.sessions import Uid
from esper.services.urza.artifact_check import checked, read_manifest
from esper.services.urza.auth import LEEWAY_SECONDS, Permission
from esper.services.urza.session_objects import remove_objects
from esper.services.urza.store_sessions import revocation
from esper.services.urza.wire import (
    LEASE_HEADER,
    BlueprintResult,
    ClaimRequest,
    CredentialsRequest,
    KernelResult,
    LeaseExtension,
    LeaseRequest,
    ReleaseRequest,
    SweepRequest,
    UploadedArtifact,
)

internal = router("/internal", "internal")

SECONDS_A_DAY = 86_400.0
MIN_ARTIFACT_BYTES = 8

NamespaceName = Annotated[Namespace, Path(description="The namespace.")]


# Kernels to compile


@internal.get(
    "/requested-kernels",
    **allowed(Permission.WORK, documented({200: Page[SimpleCompiledKernelContract]})),
)
async def list_requested_kernels(request: Request, query: Annotated[Paged, Query()]) -> Response:
    """Kernels that wait for a worker, the oldest first."""
    waiting = KernelFilter(states=(BlueprintState.PROPOSED,))
    hub = urza_of(request).hub
    found = await hub.list_kernels(waiting, limit=query.limit, cursor=query.cursor)
    return page(found, Page[SimpleCompiledKernelContract], SimpleCompiledKernelContract.of)


@internal.post(
    "/requested-kernels/claim",
    **allowed(Permission.WORK, documented({200: KernelClaim, 204: None}), takes=JSON),
)
async def claim_kernel(request: Request, claim: ClaimRequest) -> Response:
    """Lease the oldest kernel that nobody compiles; 204 where there is none."""
    urza = urza_of(request)
    seconds = claim.lease_seconds or urza.config.lease_seconds
    found = await urza.hub.claim_next_kernel(claim.worker, seconds, token=claim.lease)
    return Response(status_code=204) if found is None else answer(found)


@internal.post(
    "/requested-kernels/{kernel}/claim",
    **allowed(Permission.COMPILE, documented({200: KernelClaim, 204: None}, 404), takes=JSON),
)
async def claim_that_kernel(request: Request, kernel: KernelPath, claim: ClaimRequest) -> Response:
    """Lease that kernel; 204 where it is settled or another worker has it."""
    caller_of(request).require_kernel(kernel)
    urza = urza_of(request)
    seconds = claim.lease_seconds or urza.config.lease_seconds
    found = await urza.hub.lease_kernel(kernel, claim.worker, seconds, token=claim.lease)
    return Response(status_code=204) if found is None else answer(found)


@internal.post(
    "/requested-kernels/{kernel}/heartbeat",
    **allowed(Permission.COMPILE, documented({200: LeaseExtension}, 404, 409), takes=JSON),
)
async def heartbeat_kernel(request: Request, kernel: KernelPath, lease: LeaseRequest) -> Response:
    """Keep a lease; 409 where it is lost, and the work not worth going on with."""
    caller_of(request).require_kernel(kernel)
    urza = urza_of(request)
    seconds = lease.lease_seconds or urza.config.lease_seconds
    until = await urza.hub.heartbeat_kernel(kernel, lease.lease, seconds)
    return answer(LeaseExtension(expires_at=until))


@internal.post(
    "/requested-kernels/{kernel}/release",
    status_code=204,
    **allowed(Permission.COMPILE, documented({204: None}), takes=JSON),
)
async def release_kernel(request: Request, kernel: KernelPath, claim: ReleaseRequest) -> Response:
    """Give up a lease, so that anyone may compile the kernel; a lost one changes nothing."""
    caller_of(request).require_kernel(kernel)
    await urza_of(request).hub.release_kernel(
        kernel, claim.worker, token=claim.lease, blamed=claim.blamed
    )
    return Response(status_code=204)


@internal.put(
    "/requested-kernels/{kernel}/artifact",
    **allowed(Permission.COMPILE, documented({200: UploadedArtifact}, 404, 409), takes=BINARY),
)
async def upload_artifact(
    request: Request,
    kernel: KernelPath,
    lease: Annotated[
        LeaseToken,
        Header(alias=LEASE_HEADER, description="The lease under which it was compiled."),
    ],
    digest: Annotated[Digest, Query(description="The SHA-256 of the bytes.")],
    num_bytes: Annotated[
        int, Query(alias="bytes", ge=MIN_ARTIFACT_BYTES, le=2**31 - 1, description="How many.")
    ],
) -> Response:
    """Upload what was compiled, before its result: checked on the way, kept only if all holds.

    It must be a safetensors file with the header that the compiler writes for this kernel.
    """
    caller_of(request).require_kernel(kernel)
    urza = urza_of(request)
    limit = urza.config.max_artifact_bytes
    if num_bytes > limit:
        raise BadInput("bytes", num_bytes, f"at most {limit}")
    found = await urza.hub.check_lease(kernel, lease)
    await urza.store.put_stream(
        artifact_key(digest),
        checked(chunks(request, limit), found, num_bytes),
        sha256=digest,
        max_bytes=num_bytes,
    )
    return answer(UploadedArtifact(artifact_digest=digest, artifact_bytes=num_bytes))


@internal.post(
    "/requested-kernels/{kernel}/result",
    **allowed(Permission.COMPILE, documented({200: CompiledKernel}, 404, 409), takes=JSON),
)
async def finish_kernel(request: Request, kernel: KernelPath, result: KernelResult) -> Response:
    """Hand in what became of a kernel; the first result under its lease is the one that counts."""
    caller_of(request).require_kernel(kernel)
    hub = urza_of(request).hub
    if result.metadata is None:
        error = result.error or ""
        return answer(await hub.fail_kernel(kernel, error, token=result.lease))
    if result.metadata.kernel != kernel:
        raise BadInput("metadata.kernel", result.metadata.kernel, kernel)
    await _require_uploaded(request, await hub.kernel(kernel), result.metadata)
    return answer(await hub.complete_uploaded_kernel(result.metadata, token=result.lease))


async def _require_uploaded(
    request: Request, kernel: CompiledKernel, metadata: KernelMetadata
) -> None:
    """Refuse a result that is not what the store has, or whose artifact is another kernel's."""
    digest, said = metadata.artifact_digest, metadata.artifact_bytes
    store = urza_of(request).store
    size = await store.size(artifact_key(digest))
    stored = await store.open_read(artifact_key(digest)) if size == said else None
    if stored is None:
        came = "none" if size is None else f"{size} bytes"
        raise KernelError(f"artifact {digest}: got {came} in the store; allowed: {said} bytes")
    async with aclosing(cast("AsyncGenerator[bytes]", stored)) as found:
        manifest = await read_manifest(found, kernel, said)
    figures = metadata.figures
    if figures is not None:
        for name in ("parameters", "flops"):
            came, counted = getattr(figures, name), getattr(manifest, name)
            if came != counted:
                raise BadInput(f"metadata.figures.{name}", came, f"{counted}, as counted")


# Blueprints to validate


@internal.get(
    "/unvalidated-blueprints",
    **allowed(Permission.WORK, documented({200: Page[SimpleBlueprintContract]})),
)
async def list_unvalidated_blueprints(
    request: Request, query: Annotated[Paged, Query()]
) -> Response:
    """Blueprints that wait for validation, the oldest first."""
    waiting = BlueprintFilter(states=(BlueprintState.PROPOSED,))
    hub = urza_of(request).hub
    found = await hub.list_blueprints(waiting, limit=query.limit, cursor=query.cursor)
    return page(found, Page[SimpleBlueprintContract], SimpleBlueprintContract.of)


@internal.post(
    "/unvalidated-blueprints/claim",
    **allowed(Permission.WORK, documented({200: BlueprintClaim, 204: None}), takes=JSON),
)
async def claim_blueprint(request: Request, claim: ClaimRequest) -> Response:
    """Lease the oldest blueprint that nobody has validated; 204 where there is none."""
    urza = urza_of(request)
    seconds = claim.lease_seconds or urza.config.lease_seconds
    found = await urza.hub.claim_next_blueprint(claim.worker, seconds, token=claim.lease)
    return Response(status_code=204) if found is None else answer(found)


@internal.post(
    "/unvalidated-blueprints/{digest}/heartbeat",
    **allowed(Permission.WORK, documented({200: LeaseExtension}, 404, 409), takes=JSON),
)
async def heartbeat_blueprint(
    request: Request, digest: BlueprintDigest, lease: LeaseRequest
) -> Response:
    """Keep a lease; 409 where it is lost."""
    urza = urza_of(request)
    seconds = lease.lease_seconds or urza.config.lease_seconds
    until = await urza.hub.heartbeat_blueprint(digest, lease.lease, seconds)
    return answer(LeaseExtension(expires_at=until))


@internal.post(
    "/unvalidated-blueprints/{digest}/release",
    status_code=204,
    **allowed(Permission.WORK, documented({204: None}), takes=JSON),
)
async def release_blueprint(
    request: Request, digest: BlueprintDigest, claim: ReleaseRequest
) -> Response:
    """Give up a lease, so that anyone may validate the blueprint; a lost one changes nothing."""
    await urza_of(request).hub.release_blueprint(
        digest, claim.worker, token=claim.lease, blamed=claim.blamed
    )
    return Response(status_code=204)


@internal.post(
    "/unvalidated-blueprints/{digest}/result",
    **allowed(Permission.WORK, documented({200: Blueprint}, 404, 409), takes=JSON),
)
async def finish_blueprint(
    request: Request, digest: BlueprintDigest, result: BlueprintResult
) -> Response:
    """Hand in whether a blueprint is sound."""
    hub = urza_of(request).hub
    if result.error is None:
        return answer(await hub.complete_blueprint(digest, result.lease))
    return answer(await hub.fail_blueprint(digest, result.lease, result.error))


# Sessions' credentials


@internal.post(
    "/sessions/sweep",
    **allowed(Permission.ADMINISTER, documented({200: SweepResult}), takes=JSON),
)
async def sweep(request: Request, swept: SweepRequest) -> Response:
    """End a namespace's sessions that are gone: their tokens, Redis users and streams with them.

    So do the objects of those whose deletion policy says it.

    Can be asked again at any time; it finds what an earlier sweep did not come to.
    """
    urza, now = urza_of(request), utc_now()
    before = min(swept.gathered_at.astimezone(UTC), now)
    found = await urza.hub.sweep(swept.namespace, swept.live_uids, before)
    await urza.refresh_revoked()
    await _forget(request, swept.namespace, found.revoked, now)
    return answer(found)


@internal.post(
    "/sessions/{uid}/credentials",
    **allowed(Permission.ADMINISTER, documented({200: IssuedCredentials}, 409), takes=JSON),
)
async def make_credentials(request: Request, uid: Uid, credentials: CredentialsRequest) -> Response:
    """What opens a session's rows and streams, and nothing else. Asking again gives the same."""
    urza = urza_of(request)
    lifetime = urza.config.credential_days * SECONDS_A_DAY
    row = await urza.hub.put_credentials(
        uid,
        credentials.namespace,
        lifetime,
        removes=credentials.deletion_policy == "Delete",
    )
    if not await urza.give_user(urza.secrets.session_user(row)):
        raise revocation(uid)
    return answer(urza.secrets.of_session(row), headers={"Cache-Control": "no-store"})


@internal.delete(
    "/sessions/{uid}/credentials",
    status_code=204,
    **allowed(Permission.ADMINISTER, documented({204: None}, 404)),
)
async def revoke_credentials(request: Request, uid: Uid) -> Response:
    """Revoke a session's credentials for good, and remove its Redis user and streams."""
    urza = urza_of(request)
    row = await urza.hub.credentials(uid)
    await urza.hub.revoke_credentials(uid)
    await urza.refresh_revoked()
    await _forget(request, row.namespace, (uid,), utc_now())
    return Response(status_code=204)


@internal.post(
    "/namespaces/{namespace}/credentials",
    **allowed(Permission.ADMINISTER, documented({200: IssuedCredentials})),
)
async def make_namespace_credentials(request: Request, namespace: NamespaceName) -> Response:
    """What opens the streams and rows of all sessions of a namespace, for its Tamiyo.

    Asked again in time they go on; else its Redis user goes when they have expired.
    """
    urza = urza_of(request)
    issued = urza.secrets.of_namespace(namespace, utc_now(), urza.config.credential_days)
    await urza.hub.put_namespace(namespace, issued.expires_at)
    await urza.give_user(urza.secrets.namespace_user(namespace))
    return answer(issued, headers={"Cache-Control": "no-store"})


@internal.get(
    "/namespaces",
    **allowed(Permission.ADMINISTER, documented({200: SweptNamespaces})),
)
async def swept_namespaces(request: Request) -> Response:
    """The namespaces in which a sweep may find something, and since when they are known.

    That is a little ago: the hub's processes may have clocks that differ as much.
    """
    as_of = utc_now() - timedelta(seconds=LEEWAY_SECONDS)
    found = await urza_of(request).hub.swept_namespaces()
    return answer(SweptNamespaces(namespaces=found, as_of=as_of))


@internal.post(
    "/operator/credentials",
    **allowed(Permission.ADMINISTER, documented({200: OperatorCredentials})),
)
async def make_operator_credentials(request: Request) -> Response:
    """What the operator hears sessions of all namespaces with."""
    urza = urza_of(request)
    await urza.give_user(urza.secrets.operator_user())
    return answer(urza.secrets.of_operator(), headers={"Cache-Control": "no-store"})


@internal.post(
    "/requested-kernels/{kernel}/credentials",
    **allowed(Permission.ADMINISTER, documented({200: KernelCredentials}, 404)),
)
async def make_kernel_credentials(request: Request, kernel: KernelPath) -> Response:
    """What one kernel is compiled with, for a Job that may compile no other."""
    urza = urza_of(request)
    found = await urza.hub.kernel(kernel)
    issued = urza.secrets.of_kernel(found.kernel, utc_now())
    return answer(issued, headers={"Cache-Control": "no-store"})


async def _forget(request: Request, namespace: str, uids: tuple[str, ...], now: datetime) -> None:
    """Remove what Redis knows of revoked sessions, and what they keep where that is to go.

    Their rows go once no token of theirs is good.
    """
    urza = urza_of(request)
    await urza.remove_sessions(namespace, uids)
    for row in await urza.hub.list_credentials(namespace, revoked=True):
        if row.removes:
            await remove_objects(urza.store, row.uid)
            await urza.hub.mark_removed(row.uid)
        if row.expires_at < now:
            await urza.hub.delete_credentials(row.uid)
