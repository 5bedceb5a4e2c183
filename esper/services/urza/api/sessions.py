"""`/api/v1/sessions/`: training sessions.

A session's own token reaches its own alone, a token of a namespace those in it, a compiler's none.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request, Response

from esper.contracts.assets import SessionUid, TrainingSession
from esper.errors import BadInput, NotFound
from esper.services.contracts import Page, SessionFilter
from esper.services.urza.api.conditions import IfMatch, match_of, tagged, unless_known
from esper.services.urza.api.lists import SessionQuery, filter_of, page
from esper.services.urza.api.reach import reached_session
from esper.services.urza.api.routes import (
    JSON,
    allowed,
    caller_of,
    documented,
    router,
    urza_of,
)
from esper.services.urza.auth import Permission

ROOT = "/api/v1/sessions"
sessions = router(ROOT, "sessions")

Uid = Annotated[SessionUid, Path(description="The session's uid.")]


@sessions.get("/", **allowed(Permission.SEE_SESSIONS, documented({200: Page[TrainingSession]})))
async def list_sessions(request: Request, query: Annotated[SessionQuery, Query()]) -> Response:
    """Sessions that pass the filter, the oldest first, of those that the token reaches."""
    caller, where = caller_of(request), filter_of(query, SessionFilter)
    if caller.own_namespace is not None:
        caller.require_namespace(where.namespace or caller.own_namespace)
        where = where.model_copy(update={"namespace": caller.own_namespace})
    found = await urza_of(request).hub.list_sessions(
        where, limit=query.limit, cursor=query.cursor, uid=caller.own_session
    )
    return page(found, Page[TrainingSession], lambda item: item)


@sessions.post(
    "/",
    **allowed(
        Permission.KEEP_SESSIONS,
        documented({200: TrainingSession, 201: TrainingSession}, 409, etag=True),
        takes=JSON,
    ),
)
async def register_session(request: Request, session: TrainingSession) -> Response:
    """Register a session: 201 the first time, 200 with what is stored from then on."""
    caller = caller_of(request)
    caller.require_session(session.uid)
    caller.require_namespace(session.namespace)
    stored, made = await urza_of(request).hub.add_session(session)
    return tagged(stored, status=201 if made else 200, location=f"{ROOT}/{stored.item.uid}")


@sessions.get(
    "/{uid}",
    **allowed(
        Permission.SEE_SESSIONS, documented({200: TrainingSession, 304: None}, 404, etag=True)
    ),
)
async def read_session(request: Request, uid: Uid) -> Response:
    """One session and its seeds."""
    return unless_known(request, await reached_session(request, uid))


@sessions.put(
    "/{uid}",
    **allowed(
        Permission.KEEP_SESSIONS,
        documented({200: TrainingSession}, 404, 409, 412, etag=True),
        takes=JSON,
    ),
)
async def update_session(
    request: Request, uid: Uid, session: TrainingSession, if_match: IfMatch = None
) -> Response:
    """Replace what is known of a session; the kernels of its seeds are in use while it lives."""
    caller_of(request).require_session(uid)
    caller_of(request).require_namespace(session.namespace)
    if session.uid != uid:
        raise BadInput("session.uid", session.uid, uid)
    hub = urza_of(request).hub
    return tagged(await hub.replace_session(session, match=match_of(if_match)))


@sessions.post(
    "/{uid}/archive",
    **allowed(Permission.ADMINISTER, documented({200: TrainingSession}, 404, 409, 412, etag=True)),
)
async def archive_session(request: Request, uid: Uid, if_match: IfMatch = None) -> Response:
    """Take an ended session out of lists."""
    hub = urza_of(request).hub
    return tagged(await hub.archive_session(uid, match=match_of(if_match)))


@sessions.delete(
    "/{uid}",
    status_code=204,
    **allowed(Permission.ADMINISTER, documented({204: None}, 404, 409, 412)),
)
async def delete_session(request: Request, uid: Uid, if_match: IfMatch = None) -> Response:
    """Delete an ended session."""
    if not await urza_of(request).hub.delete_session(uid, match=match_of(if_match)):
        raise NotFound("session uid", uid, "a session that was registered")
    return Response(status_code=204)
