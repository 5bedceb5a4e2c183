"""`/api/v1/kernels/`: blueprints compiled, or to be compiled, for one kind of host."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, cast

from fastapi import Path, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from esper.contracts.assets import CompiledKernel
from esper.contracts.kernels import KernelId, KernelMetadata, artifact_key
from esper.errors import KernelError, KernelNotFound
from esper.services.contracts import (
    KernelFilter,
    Page,
    SimpleCompiledKernelContract,
)
from esper.services.urza.api.blueprints import UsedBy
from esper.services.urza.api.conditions import (
    IfMatch,
    match_of,
    not_modified,
    tagged,
    unless_known,
)
from esper.services.urza.api.lists import KernelQuery, filter_of, page
from esper.services.urza.api.reach import reached_kernel, reached_uses
from esper.services.urza.api.routes import (
    BINARY,
    JSON,
    Refused,
    Responses,
    allowed,
    answer,
    caller_of,
    documented,
    router,
    urza_of,
)
from esper.services.urza.auth import Permission
from esper.services.urza.wire import KernelCreation

ROOT = "/api/v1/kernels"
PRESIGNED_SECONDS = 300
kernels = router(ROOT, "kernels")

KernelPath = Annotated[KernelId, Path(description="The kernel's id.")]
_ARTIFACT: Responses = {
    200: {
        "description": "The artifact, a safetensors file; its entity tag is its SHA-256.",
        "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}},
    },
    304: {"description": "The caller has it."},
    307: {"description": "Where the object store gives it out itself, for some minutes."},
}


@kernels.get(
    "/",
    **allowed(
        Permission.LIST,
        documented({200: Page[SimpleCompiledKernelContract] | Page[CompiledKernel]}),
    ),
)
async def list_kernels(request: Request, query: Annotated[KernelQuery, Query()]) -> Response:
    """Kernels that pass the filter, the oldest first; archived ones only where asked for.

    A session's token lists what it uses, a token of a namespace what sessions in it use.
    """
    where = await reached_uses(request, filter_of(query, KernelFilter))
    if where is None:
        return answer(Page[SimpleCompiledKernelContract](items=()))
    found = await urza_of(request).hub.list_kernels(
        where, limit=query.limit, cursor=query.cursor, namespace=caller_of(request).own_namespace
    )
    if query.view == "full":
        return page(found, Page[CompiledKernel], lambda item: item)
    return page(found, Page[SimpleCompiledKernelContract], SimpleCompiledKernelContract.of)


@kernels.post(
    "/",
    **allowed(
        Permission.PROPOSE,
        documented({200: CompiledKernel, 201: CompiledKernel}, 404, etag=True),
        takes=JSON,
    ),
)
async def request_kernel(
    request: Request, creation: KernelCreation, session: UsedBy = None
) -> Response:
    """Ask for a kernel: 201 where it is new, 200 where it was asked for before."""
    if session is not None:
        caller_of(request).require_session(session)
    stored, made = await urza_of(request).hub.add_kernel(
        creation.blueprint_digest, creation.target, session=session
    )
    return tagged(stored, status=201 if made else 200, location=f"{ROOT}/{stored.item.kernel}")


@kernels.get(
    "/{kernel}",
    **allowed(Permission.READ, documented({200: CompiledKernel, 304: None}, 404, etag=True)),
)
async def read_kernel(request: Request, kernel: KernelPath) -> Response:
    """One kernel; until it is compiled those see it that use it, and who works on it."""
    return unless_known(request, await reached_kernel(request, kernel))


@kernels.get(
    "/{kernel}/metadata", **allowed(Permission.READ, documented({200: KernelMetadata}, 404))
)
async def read_metadata(request: Request, kernel: KernelPath) -> Response:
    """What a kernel cache needs before it fetches the artifact; 404 until it is compiled."""
    return answer(await _metadata(request, kernel))


@kernels.get(
    "/{kernel}/artifact",
    **allowed(Permission.READ, {**documented({}, 404), **_ARTIFACT}),
)
async def read_artifact(
    request: Request,
    kernel: KernelPath,
    presigned: Annotated[
        bool, Query(description="Redirect to the object store where it can give it out itself.")
    ] = False,
) -> Response:
    """The bytes of a compiled kernel."""
    store, found = urza_of(request).store, await _metadata(request, kernel)
    tag = f'"{found.artifact_digest}"'
    known = not_modified(request, tag)
    if known is not None:
        return known
    key = artifact_key(found.artifact_digest)
    if presigned:
        url = await store.presigned(key, PRESIGNED_SECONDS)
        if url is not None:
            return RedirectResponse(url, 307, {"Cache-Control": "no-store"})
    size = await store.size(key)
    chunks = await store.open_read(key) if size == found.artifact_bytes else None
    if chunks is None:
        lost = f"kernel {kernel}: its artifact {found.artifact_digest} is not in the store"
        raise Refused(404, KernelError(lost))
    headers = {"ETag": tag, "Content-Length": str(size)}
    return StreamingResponse(_closing(chunks), 200, headers, media_type=BINARY)


@kernels.post(
    "/{kernel}/archive",
    **allowed(Permission.ADMINISTER, documented({200: CompiledKernel}, 404, 412, etag=True)),
)
async def archive_kernel(
    request: Request, kernel: KernelPath, if_match: IfMatch = None
) -> Response:
    """Take a kernel out of lists and of work; whoever requests it again brings it back."""
    hub = urza_of(request).hub
    return tagged(await hub.archive_kernel(kernel, match=match_of(if_match)))


@kernels.delete(
    "/{kernel}",
    status_code=204,
    **allowed(Permission.ADMINISTER, documented({204: None}, 404, 409, 412)),
)
async def delete_kernel(request: Request, kernel: KernelPath, if_match: IfMatch = None) -> Response:
    """Delete a kernel and its artifact; not while a live session uses it."""
    if not await urza_of(request).hub.delete_kernel(kernel, match=match_of(if_match)):
        raise KernelNotFound("kernel", kernel, "a kernel that the hub has")
    return Response(status_code=204)


async def _closing(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Close the object also where the caller goes away before its end."""
    async with aclosing(cast("AsyncGenerator[bytes]", chunks)):
        async for chunk in chunks:
            yield chunk


async def _metadata(request: Request, kernel: str) -> KernelMetadata:
    try:
        return await urza_of(request).hub.metadata(kernel)
    except KernelNotFound:
        raise
    except KernelError as error:
        await reached_kernel(request, kernel)  # or it is not even said that there is one
        raise Refused(404, error) from error
