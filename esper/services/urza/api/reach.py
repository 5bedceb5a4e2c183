"""What a caller reaches: which sessions, and with them which kernels that are under way."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request

from esper.contracts.assets import CompiledKernel, TrainingSession
from esper.errors import NotFound
from esper.services.contracts import BlueprintFilter, KernelFilter, Stored
from esper.services.urza.api.routes import caller_of, urza_of
from esper.services.urza.auth import PERMISSIONS, Permission
from esper.services.urza.store_rows import no_kernel

Uses = TypeVar("Uses", BlueprintFilter, KernelFilter)


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


async def reached_uses(request: Request, where: Uses) -> Uses | None:
    """A filter held to what the session uses that it names, or the caller is.

    None: there is no such session for the caller, so nothing passes.

    Raises:
        TooWeak: the token is another session's, or a compiler's.
    """
    user = where.session or caller_of(request).own_session
    if user is None:
        return where
    try:
        await reached_session(request, user)
    except NotFound:
        return None
    return where.model_copy(update={"session": user})


async def reached_kernel(request: Request, kernel: str) -> Stored[CompiledKernel]:
    """The kernel of that id; one without an artifact is as if not there for who does not use it.

    Its id is a hash of a blueprint and a layer's shape, which others may guess.

    Raises:
        KernelNotFound: there is none.
    """
    stored = await urza_of(request).hub.read_kernel(kernel)
    if stored.item.artifact_digest is None and not await _uses(request, kernel):
        raise no_kernel(kernel)
    return stored


async def _uses(request: Request, kernel: str) -> bool:
    """Whether the caller may see the work on a kernel; whoever asked for it uses it."""
    caller = caller_of(request)
    if Permission.WORK in PERMISSIONS[caller.role]:
        return True
    if Permission.COMPILE in PERMISSIONS[caller.role]:
        return caller.subject == kernel
    return await urza_of(request).hub.uses_kernel(
        kernel, session=caller.own_session, namespace=caller.own_namespace
    )
