"""Entity tags (RFC 9110, 8.8.3 and 13): which row it is, and its version, in quotes."""

from __future__ import annotations

import re
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import Header, Request, Response

from esper.contracts.assets import Asset
from esper.errors import BadInput, one_line
from esper.services.contracts import Stored, entity_tag
from esper.services.urza.api.routes import answer
from esper.services.urza.store_rows import Match

_TAG = r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"'
_TAGS = re.compile(rf"[ \t]*{_TAG}[ \t]*(,[ \t]*{_TAG}[ \t]*)*")
_MAX_CHARACTERS = 4096

IfMatch = Annotated[
    str | None,
    Header(
        max_length=_MAX_CHARACTERS,
        description="Change it only while one of these is its entity tag; * is any.",
        examples=[f'"{entity_tag(UUID(int=0), 3)}"'],
    ),
]
AnyAsset = TypeVar("AnyAsset", bound=Asset)


def match_of(if_match: str | None) -> Match:
    """The entity tags that an If-Match header names. A weak one matches nothing (RFC 9110, 13.1.1).

    Raises:
        BadInput: it holds no entity tags.
    """
    if if_match is None or if_match.strip() == "*":
        return None
    return {tag for weak, tag in _tags("If-Match", if_match) if not weak}


def _tags(name: str, value: str) -> list[tuple[str, str]]:
    if not _TAGS.fullmatch(value):
        raise BadInput(name, one_line(value, 80), 'entity tags in quotes, as in "tag", or *')
    return [(weak, tag) for weak, tag in re.findall(_TAG, value)]


def tagged(stored: Stored[AnyAsset], *, status: int = 200, location: str | None = None) -> Response:
    """An asset with its entity tag, and where it lies if it was made now."""
    headers = {"ETag": f'"{stored.tag}"'}
    if location is not None:
        headers["Location"] = location
    return answer(stored.item, status, headers)


def unless_known(request: Request, stored: Stored[AnyAsset]) -> Response:
    """The asset, or 304 where the caller's If-None-Match has its entity tag."""
    tag = f'"{stored.tag}"'
    return not_modified(request, tag) or tagged(stored)


def not_modified(request: Request, tag: str) -> Response | None:
    """304 where the caller's If-None-Match has `tag`, else None. Other words say nothing."""
    asked = request.headers.get("if-none-match", "")[:_MAX_CHARACTERS]
    # Weakly compared: what is meant is the same either way (RFC 9110, 13.1.2).
    known = {f'"{found}"' for _, found in re.findall(_TAG, asked)}
    if tag in known or asked.strip() == "*":
        return Response(status_code=304, headers={"ETag": tag})
    return None
