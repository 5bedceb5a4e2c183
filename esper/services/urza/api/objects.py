"""`/api/v1/sessions/{uid}/objects`: what a session keeps at the hub, checkpoints and results.

A session's own token reaches its own objects alone; nobody else's but an administrator's any.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, cast

from fastapi import Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from esper.contracts.kernels import Digest
from esper.errors import BadInput, NotFound, StorageFull
from esper.services.urza.api.routes import (
    BINARY,
    Responses,
    allowed,
    answer,
    caller_of,
    chunks,
    documented,
    router,
    urza_of,
)
from esper.services.urza.api.sessions import ROOT, Uid
from esper.services.urza.auth import Caller, Permission
from esper.services.urza.session_objects import MAX_OBJECTS, object_key, objects_of
from esper.services.urza.wire import SessionObjects, StoredObject
from esper.utils.object_store import MAX_KEY_CHARACTERS

objects = router(ROOT, "session objects")

ObjectName = Annotated[
    str,
    Path(
        min_length=1,
        max_length=MAX_KEY_CHARACTERS,
        description="A relative path of letters, digits, dots, dashes and underscores.",
    ),
]
_CONTENT: Responses = {
    200: {
        "description": "The object's bytes.",
        "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}},
    }
}


@objects.get(
    "/{uid}/objects", **allowed(Permission.KEEP_SESSIONS, documented({200: SessionObjects}))
)
async def list_objects(request: Request, uid: Uid) -> Response:
    """All objects of a session, in the order of their names."""
    _require_own(caller_of(request), uid)
    found = await objects_of(urza_of(request).store, uid)
    return answer(
        SessionObjects(
            objects=tuple(StoredObject(name=name, size=size) for name, size in found.items())
        )
    )


@objects.put(
    "/{uid}/objects/{name:path}",
    **allowed(
        Permission.KEEP_SESSIONS,
        documented({200: StoredObject}, 404),  # a name with a line break has no route
        takes=BINARY,
        limit="max_object_bytes",
    ),
)
async def put_object(
    request: Request,
    uid: Uid,
    name: ObjectName,
    digest: Annotated[Digest, Query(description="The SHA-256 of the bytes.")],
    num_bytes: Annotated[int, Query(alias="bytes", ge=0, le=2**53, description="How many.")],
) -> Response:
    """Keep an object: whole and with that digest, or not at all. One that is there stays."""
    _require_own(caller_of(request), uid)
    urza = urza_of(request)
    limit, most = urza.config.max_object_bytes, urza.config.max_session_bytes
    if num_bytes > limit:
        raise BadInput("bytes", num_bytes, f"at most {limit} (urza.max_object_bytes)")
    held = await objects_of(urza.store, uid)
    held.pop(name, None)  # what is sent again
    if len(held) >= MAX_OBJECTS or sum(held.values()) + num_bytes > most:
        raise StorageFull(
            f"session {uid}: got {num_bytes} bytes more in {len(held) + 1} objects; allowed: "
            f"{most} bytes in {MAX_OBJECTS} objects in all (urza.max_session_bytes)"
        )
    await urza.store.put_stream(
        object_key(uid, name), chunks(request, num_bytes), sha256=digest, max_bytes=num_bytes
    )
    return answer(StoredObject(name=name, size=num_bytes))


@objects.get(
    "/{uid}/objects/{name:path}",
    **allowed(Permission.KEEP_SESSIONS, {**documented({}, 404), **_CONTENT}),
)
async def read_object(request: Request, uid: Uid, name: ObjectName) -> Response:
    """An object's bytes."""
    _require_own(caller_of(request), uid)
    store, key = urza_of(request).store, object_key(uid, name)
    size = await store.size(key)
    found = None if size is None else await store.open_read(key)
    if found is None:
        raise NotFound("object", name, "one that the session keeps")
    headers = {"Content-Length": str(size)}
    return StreamingResponse(_closing(found), 200, headers, media_type=BINARY)


@objects.delete(
    "/{uid}/objects/{name:path}",
    status_code=204,
    **allowed(Permission.KEEP_SESSIONS, documented({204: None}, 404)),
)
async def delete_object(request: Request, uid: Uid, name: ObjectName) -> Response:
    """Remove an object, if there is one."""
    _require_own(caller_of(request), uid)
    await urza_of(request).store.delete(object_key(uid, name))
    return Response(status_code=204)


def _require_own(caller: Caller, uid: str) -> None:
    if caller.own_session is None:
        caller.require(Permission.ADMINISTER)
    caller.require_session(uid)


async def _closing(found: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Close the object also where the caller goes away before its end."""
    async with aclosing(cast("AsyncGenerator[bytes]", found)):
        async for chunk in found:
            yield chunk
