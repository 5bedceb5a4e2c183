"""Every failure of a request as problem details, and the counting of all of them."""

from __future__ import annotations

import asyncio
import logging
import re
import time

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.errors import (
    BadInput,
    ConfigError,
    Conflict,
    ConflictReason,
    EsperError,
    HubUnavailable,
    NotFound,
    Unauthorized,
    Unavailable,
    WorkFailed,
    one_line,
)
from esper.services.urza.api.routes import Refused, problem
from esper.services.urza.api.state import Urza
from esper.services.urza.auth import TooWeak
from esper.services.urza.http_requests import TRACE_HEADER
from esper.services.urza.metrics import UNKNOWN_ROUTE
from esper.utils.logging import tracing

RETRY_AFTER_SECONDS = 1
_TRACE_ID = re.compile(rb"[A-Za-z0-9-]{1,64}")
_CHALLENGE = 'Bearer realm="urza", error="{}"'

_log = logging.getLogger(__name__)


def install_handlers(app: FastAPI) -> None:
    """Answer every refusal and failure with a problem."""
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(EsperError, _failed)
    app.add_exception_handler(IntegrityError, _unfit)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unrouted)


class Observed:
    """Times and counts requests, gives them their trace id, and answers what nobody foresaw."""

    def __init__(self, app: ASGIApp, urza: Urza) -> None:
        self._app = app
        self._urza = urza

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.perf_counter()
        self._urza.metrics.running += 1
        try:
            trace_id = _trace_id(scope)
            if trace_id is None:
                await self._app(scope, receive, watched)
            else:
                with tracing(trace_id):
                    await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            # The server stops and waits no longer. It would log a trace of what is raised here.
            _log.warning("%s %s: broken off", scope["method"], one_line(scope["path"]))
            if not status:
                await _unavailable(HubUnavailable("Urza stops; ask again"))(scope, receive, watched)
        except Exception:
            _log.exception("%s %s", scope["method"], one_line(scope["path"]))
            if status:
                raise  # half of an answer is out: the connection has to break
            await problem(WorkFailed("the hub failed; its log says how"), 500)(
                scope, receive, watched
            )
        finally:
            self._urza.metrics.running -= 1
            route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            seconds = time.perf_counter() - began
            self._urza.metrics.answered(scope["method"], route, status, seconds)


def _trace_id(scope: Scope) -> str | None:
    name = TRACE_HEADER.lower().encode()
    value: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return value.decode() if _TRACE_ID.fullmatch(value) else None


def _unavailable(error: Unavailable) -> Response:
    return problem(error, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return problem(error.error, error.status)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, EsperError)
    if isinstance(error, TooWeak):
        headers = {"WWW-Authenticate": _CHALLENGE.format("insufficient_scope")}
        return problem(error, 403, headers)
    if isinstance(error, Unauthorized):
        return problem(error, 401, {"WWW-Authenticate": _CHALLENGE.format("invalid_token")})
    if isinstance(error, ConfigError):
        # The caller can't mend the hub's settings, and needs not know them.
        _log.error("%s %s: %s", request.method, request.url.path, error)
        error = HubUnavailable("the hub's settings have to be mended; its /readyz says which")
    if isinstance(error, Unavailable):
        return _unavailable(error)
    if isinstance(error, Conflict) and error.reason is ConflictReason.STALE_VERSION:
        return problem(error, 412)
    return problem(error)


async def _unfit(request: Request, error: Exception) -> Response:
    """What the tables refuse and no endpoint foresaw: a word, or a row that is not there."""
    assert isinstance(error, IntegrityError)
    _log.error("%s %s: %s", request.method, request.url.path, one_line(str(error.orig), 500))
    return problem(BadInput("value", "one that the hub's tables refuse", "what they can hold"))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "request"
    came = "nothing" if first["type"] == "missing" else one_line(first.get("input"))
    refusal = BadInput(one_line(place, 200), came, one_line(str(first["msg"]), 1000))
    return problem(refusal, 400 if first["type"] == "json_invalid" else 422)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return problem(NotFound("path", request.url.path, "see /openapi.json"), headers=headers)
    refusal = BadInput("request", error.detail, "see /openapi.json")
    return problem(refusal, error.status_code, headers)
