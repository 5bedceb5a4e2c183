"""The OpenAPI description of the hub: FastAPI's own, with security, problems, examples."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from esper import __version__
from esper.services.urza.api.examples import EXAMPLES
from esper.services.urza.api.routes import JSON, PERMISSION, PUBLIC
from esper.services.urza.problems import MEDIA_TYPE

DESCRIPTION = """\
The hub keeps blueprints, compiled kernels and training sessions, and hands out work to workers.

Every endpoint but the three for operations takes a bearer token; `x-permission` says what the
token's role must allow. Lists come in pages: `nextCursor` of one page is `cursor` of the next. An
answer with an `ETag` can be asked for with `If-None-Match`, and what it shows can be changed under
`If-Match`. Creating what is there already changes nothing. Whatever goes wrong is a problem
(RFC 9457).
"""
_SCHEME = "token"
_PROBLEM = {"$ref": "#/components/schemas/Problem"}


def describe(app: FastAPI) -> dict[str, Any]:
    """The description, made once and kept in `app.openapi_schema`."""
    if app.openapi_schema is None:
        found = get_openapi(
            title="Urza", version=__version__, description=DESCRIPTION, routes=app.routes
        )
        components = found.setdefault("components", {})
        components["securitySchemes"] = {
            _SCHEME: {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
        }
        for path in found["paths"].values():
            for operation in path.values():
                _complete(operation)
        for name, example in EXAMPLES.items():
            components["schemas"][name]["examples"] = [example]
        app.openapi_schema = found
    return app.openapi_schema


def _complete(operation: dict[str, Any]) -> None:
    if operation[PERMISSION] != PUBLIC:
        operation["security"] = [{_SCHEME: []}]
    for status, response in operation["responses"].items():
        content = response.get("content", {})
        if len(content) > 1 and content.get(JSON) == {"schema": {}}:
            del content[JSON]  # FastAPI adds it beside what the route says
        if content.get(JSON, {}).get("schema") == _PROBLEM:
            response["content"] = {MEDIA_TYPE: {"schema": _PROBLEM}}
        if status in {"401", "403"}:
            response["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
        if status == "503":
            response["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
