"""Entity tags (RFC 9110, 8.8.3 and 13): a row's version, in quotes."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import Header, Request, Response

from esper.contracts.base import Contract
from esper.services.contracts import Stored
from esper.services.urza.api.routes import answer

IfMatch = Annotated[
    str | None,
    Header(
        pattern=r'^(\*|"[1-9][0-9]{0,8}")$',
        description="Change it only while this is its entity tag.",
        examples=['"3"'],
    ),
]
Item = TypeVar("Item", bound=Contract)


def version_of(if_match: str | None) -> int | None:
    """The version that an If-Match header asks for; None is any."""
    return None if if_match in {None, "*"} else int(str(if_match).strip('"'))


def tagged(stored: Stored[Item], *, status: int = 200, location: str | None = None) -> Response:
    """An asset with its entity tag, and where it lies if it was made now."""
    headers = {"ETag": f'"{stored.version}"'}
    if location is not None:
        headers["Location"] = location
    return answer(stored.item, status, headers)


def unless_known(request: Request, stored: Stored[Item]) -> Response:
    """The asset, or 304 where the caller's If-None-Match has its entity tag."""
    tag = f'"{stored.version}"'
    return not_modified(request, tag) or tagged(stored)


def not_modified(request: Request, tag: str) -> Response | None:
    """304 where the caller's If-None-Match has `tag`, else None."""
    asked = request.headers.get("if-none-match", "")
    known = {part.strip().removeprefix("W/") for part in asked.split(",")}
    if tag in known or "*" in known:
        return Response(status_code=304, headers={"ETag": tag})
    return None
