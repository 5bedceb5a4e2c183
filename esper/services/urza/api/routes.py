"""What happens to every request before an endpoint sees it, and to every answer after.

In this order: who asks (401), may they (403), is the body of the right type (415), small enough
(413) and JSON that can be read safely (400). So nobody without a token has a body read, and none
is read beyond its cap. A route can't be made without saying what permission it asks for.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from esper.contracts.base import Contract
from esper.errors import BadInput, EsperError
from esper.services.urza.api.state import Urza
from esper.services.urza.auth import Caller, Permission
from esper.services.urza.problems import MEDIA_TYPE, Problem

MAX_JSON_DEPTH = 64
MAX_DIGITS = 40
"""Of one number: more than any float or 64-bit integer has, less than what costs time to read."""

JSON = "application/json"
BINARY = "application/octet-stream"
PERMISSION = "x-permission"
LIMIT = "x-limit"
PUBLIC = "none"

# Python's own phrases change with its version, and with them the reference would.
PHRASES: Mapping[int, str] = {
    200: "OK",
    201: "Created",
    204: "No content",
    304: "Not modified: the caller has it",
    400: "The body is not JSON that can be read safely",
    401: "No token, or one that is not good",
    403: "The token's role may not do this",
    404: "Not found",
    409: "The hub's state refuses it",
    412: "It was changed since that entity tag",
    413: "The body is too large",
    415: "The body is of another type",
    422: "A value is not allowed",
    503: "The hub, or what it stands on, does not answer",
    507: "No room left",
}

# Strings are matched whole, so that what stands in them is not taken for structure; one without
# an end too, or each of its quotes would be tried as a beginning.
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Responses = dict[int | str, dict[str, Any]]


class Refused(Exception):  # noqa: N818 - an answer, not an error of Esper
    """A request that is answered with a problem of that status, whatever class its error has."""

    def __init__(self, status: int, error: EsperError) -> None:
        super().__init__(str(error))
        self.status = status
        self.error = error


class GuardedRoute(APIRoute):
    """A route that lets in only whom its permission allows, with a body that can be trusted."""

    def get_route_handler(self) -> Handler:
        """The endpoint behind its guards.

        Raises:
            TypeError: the route names no permission.
        """
        handle = super().get_route_handler()
        extra = self.openapi_extra or {}
        if PERMISSION not in extra:
            raise TypeError(f"{self.path}: names no permission; make it with `allowed`")
        permission = None if extra[PERMISSION] == PUBLIC else Permission(extra[PERMISSION])
        takes_json = self.body_field is not None
        limit = extra.get(LIMIT)

        async def guarded(request: Request) -> Response:
            urza = urza_of(request)
            if permission is not None:
                caller = urza.tokens.caller(request.headers.get("authorization"))
                caller.require(permission)
                request.state.caller = caller
                urza.require_open()
            if b"%00" in request.scope["query_string"]:
                raise Refused(422, BadInput("query", "the character U+0000", "text without it"))
            if takes_json:
                data = await _whole(request, urza.config.max_body_bytes)
                refuse_unsafe(data)
                request = Request(request.scope, _replayed(data))
            elif limit is not None:
                _refuse_type(request, BINARY)
                _refuse_length(request, getattr(urza.config, limit))
            return await handle(request)

        return guarded


def router(prefix: str, tag: str) -> APIRouter:
    """A router of guarded routes under `prefix`, shown under `tag` in the reference."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=GuardedRoute)


def public(responses: Responses) -> dict[str, Any]:
    """A route's arguments where everyone may ask."""
    return {"openapi_extra": {PERMISSION: PUBLIC}, "responses": responses}


def allowed(
    permission: Permission,
    responses: Responses,
    *,
    takes: str | None = None,
    limit: str = "max_artifact_bytes",
) -> dict[str, Any]:
    """A route's arguments where the caller needs `permission`; adds what every such route answers.

    `takes` is the media type of the body, None where there is none; `limit` is the setting of
    `urza` that a binary one is held to.
    """
    usual = [401, 403, 422, 503]
    if takes is not None:
        usual += [400, 413, 415, 507]
    extra: dict[str, Any] = {PERMISSION: permission.value}
    if takes == BINARY:
        schema = {"schema": {"type": "string", "format": "binary"}}
        extra["requestBody"] = {"required": True, "content": {BINARY: schema}}
        extra[LIMIT] = limit
    return {"openapi_extra": extra, "responses": {**documented({}, *usual), **responses}}


def documented(good: Mapping[int, Any], *problems: int, etag: bool = False) -> Responses:
    """The answers of a route: contracts by status (None: an empty body), and problems.

    With `etag` the good ones carry an entity tag.
    """
    found: Responses = {}
    for status, model in good.items():
        found[status] = {"description": PHRASES[status]}
        if model is not None:
            found[status]["model"] = model
        if etag:
            found[status]["headers"] = {"ETag": {"schema": {"type": "string"}, "required": True}}
    for status in problems:
        found[status] = {"description": PHRASES[status], "model": Problem}
    return found


def urza_of(request: Request) -> Urza:
    """What the service is made of."""
    return cast("Urza", request.app.state.urza)


def caller_of(request: Request) -> Caller:
    """Whoever sent the request, once its route has let it in."""
    return cast("Caller", request.state.caller)


async def chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it comes, never more than `limit` bytes of it.

    Raises:
        Refused: more came, announced or not; or the caller went away before the end.
    """
    seen = 0
    try:
        async for chunk in request.stream():
            seen += len(chunk)
            if seen > limit:
                raise Refused(413, _too_long(seen, limit))
            yield chunk
    except ClientDisconnect:
        # Nobody reads the answer; it is counted as what it is, no failure of the hub.
        raise Refused(400, BadInput("body", f"{seen} bytes of it", "all of it")) from None


def refuse_unsafe(data: bytes) -> None:
    """Refuse JSON that costs more to read than its size says, or that no database can keep.

    Raises:
        Refused: not in UTF-8, nested deeper than `MAX_JSON_DEPTH`, a number of more than
            `MAX_DIGITS` digits in a row, or the character U+0000.
    """
    # Python also reads JSON in UTF-16 and UTF-32, where none of the looks below would see a thing.
    if b"\0" in data:
        raise Refused(400, BadInput("body", "bytes of zero", "JSON in UTF-8 (RFC 8259)"))
    if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH:
        depth = 0
        for match in _STRUCTURE.finditer(data):
            first = match[0][0]
            depth += (first in b"[{") - (first in b"]}")
            if depth > MAX_JSON_DEPTH:
                came = f"more than {MAX_JSON_DEPTH} levels"
                raise Refused(400, BadInput("body", came, "less nesting"))
    if _LONG_NUMBER.search(data) and _LONG_NUMBER.search(_STRING.sub(b"", data)):
        raise Refused(400, BadInput("body", "a very long number", f"at most {MAX_DIGITS} digits"))
    if _NUL.search(data):
        raise Refused(400, BadInput("body", "the character U+0000", "text without it"))


def answer(content: Contract, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` as JSON, absent optional fields left out."""
    return Response(
        content.model_dump_json(by_alias=True, exclude_none=True),
        status,
        headers,
        media_type=JSON,
    )


def problem(
    error: EsperError, status: int | None = None, headers: dict[str, str] | None = None
) -> Response:
    """`error` as problem details."""
    found = Problem.of(error, status)
    return Response(
        found.model_dump_json(by_alias=True, exclude_none=True),
        found.status,
        headers,
        media_type=MEDIA_TYPE,
    )


async def _whole(request: Request, limit: int) -> bytes:
    _refuse_type(request, JSON)
    _refuse_length(request, limit)
    return b"".join([chunk async for chunk in chunks(request, limit)])


def _refuse_type(request: Request, allowed: str) -> None:
    came = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
    if came != allowed:
        raise Refused(415, BadInput("Content-Type", came, allowed))
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Refused(415, BadInput("Content-Encoding", encoding, "none: bodies come as they are"))


def _refuse_length(request: Request, limit: int) -> None:
    """Refuse an announced length before any of it is read."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 20 or int(length) > limit):
        raise Refused(413, _too_long(length, limit))


def _too_long(came: object, limit: int) -> BadInput:
    return BadInput("body", f"{came} bytes or more", f"at most {limit} bytes")


def _replayed(data: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": data, "more_body": False}

    return receive
