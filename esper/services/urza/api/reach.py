"""Which sessions a caller reaches: a session's token its own, a namespace's those in it."""

from __future__ import annotations

from fastapi import Request

from esper.contracts.assets import TrainingSession
from esper.errors import NotFound
from esper.services.contracts import Stored
from esper.services.urza.api.routes import caller_of, urza_of
from esper.services.urza.auth import Permission


async def reached_session(request: Request, uid: str) -> Stored[TrainingSession]:
    """The session of that uid; one of another namespace than the token's is as if not there.

    Raises:
        TooWeak: the token is another session's, or a compiler's.
        NotFound: there is none.
    """
    caller = caller_of(request)
    caller.require(Permission.SEE_SESSIONS)
    caller.require_session(uid)
    stored = await urza_of(request).hub.read_session(uid)
    if caller.own_namespace not in {None, stored.item.namespace}:
        raise NotFound("session uid", uid, "a session that was registered")
    return stored


async def reaches(request: Request, uid: str) -> bool:
    """Whether there is such a session for the caller.

    Raises:
        TooWeak: the token is another session's, or a compiler's.
    """
    try:
        await reached_session(request, uid)
    except NotFound:
        return False
    return True
