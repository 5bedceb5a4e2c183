"""Who is let in, and with what: every endpoint, every kind of bad token, every kind of bad body."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import pickle
import zipfile
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import jwt
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import text
from starlette.routing import Route

from esper.services.urza.api.routes import (
    MAX_DIGITS,
    MAX_JSON_DEPTH,
    PERMISSION,
    PUBLIC,
    GuardedRoute,
    Refused,
    refuse_unsafe,
    router,
)
from esper.services.urza.auth import PERMISSIONS, Permission, Role
from esper.services.urza.main import create_app
from tests.unit.esper.services.urza.hubs import DOCUMENT, Place
from tests.unit.esper.services.urza.issuing import BLUEPRINT
from tests.unit.esper.services.urza.serving import (
    JSON,
    KEY,
    Client,
    bearer,
    expired,
    serving,
    settings,
    stored_files,
    token,
    trained,
)

OPEN_TO_ALL = {"/healthz", "/readyz", "/metrics", "/openapi.json"}
FILLED = {"digest": "0" * 64, "kernel": "0" * 40, "uid": "uid-1", "namespace": "team-a"}


APP = create_app(settings(Place("sqlite+aiosqlite:///unopened.sqlite", Path("unopened"))))
"""Not running: who may ask is known before there is a database."""


def filled(path: str) -> str:
    """The path of an endpoint with something in every place."""
    return path.replace("{name:path}", "a/b").format(**FILLED)


def routes() -> list[tuple[str, str, Permission]]:
    """Every endpoint of the application, whoever adds one: method, path, permission."""
    found = []
    for route in APP.routes:
        assert isinstance(route, Route | APIRoute), route
        if route.path in OPEN_TO_ALL:
            continue
        assert isinstance(route, GuardedRoute), route.path
        permission = Permission((route.openapi_extra or {})[PERMISSION])
        found += [(method, route.path, permission) for method in sorted(route.methods)]
    return found


ROUTES = routes()
EACH = pytest.mark.parametrize(("method", "path", "permission"), ROUTES)


@pytest.fixture
def place(sqlite_place):
    """Guards stand before any database."""
    return sqlite_place


def forged() -> str:
    claims = jwt.decode(token(), options={"verify_signature": False})
    return jwt.encode(claims, "another key of more than thirty-two characters", "HS256")


BAD_TOKENS = {
    "missing": None,
    "malformed": "Bearer not-a-token",
    "of another scheme": "Basic dGVzdGVyOnRlc3Rlcg==",
    "wrongly signed": f"Bearer {forged()}",
    "expired": f"Bearer {expired()}",
}


def test_the_endpoints_are_frozen() -> None:
    assert len(ROUTES) == len(set(ROUTES)) == 42
    assert {permission for _, _, permission in ROUTES} == set(Permission)


@EACH
def test_every_endpoint_refuses_tokens_that_are_not_good(method, path, permission):
    async def life() -> None:
        async with Client(APP) as client:
            for header in BAD_TOKENS.values():
                headers = {} if header is None else {"Authorization": header}
                answer = await client.request(method, filled(path), headers=headers)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="urza"')
                assert answer.headers["Content-Type"] == "application/problem+json"
                assert answer.json()["type"] == "urn:esper:problem:unauthorized"
                assert header is None or header.split(" ")[1] not in answer.text

    asyncio.run(life())


@EACH
def test_every_endpoint_refuses_a_role_that_is_too_weak(method, path, permission):
    async def life() -> None:
        async with Client(APP) as client:
            for role in Role:
                answer = await client.request(method, filled(path), headers=bearer(role, "uid-1"))
                if permission in PERMISSIONS[role]:
                    assert answer.status_code == 503, answer.text  # it is not running
                else:
                    assert answer.status_code == 403
                    assert "insufficient_scope" in answer.headers["WWW-Authenticate"]
                    assert answer.json()["status"] == 403

    asyncio.run(life())


@pytest.mark.parametrize("path", sorted(OPEN_TO_ALL))
def test_what_is_open_to_all_says_nothing_secret(place, path):
    async def life() -> None:
        async with serving(settings(place), role=None) as client:
            answer = await client.get(path)
            assert answer.status_code == 200
            assert KEY not in answer.text
            assert str(place.folder) not in answer.text

    asyncio.run(life())


def test_a_route_without_a_permission_can_not_be_made():
    careless = router("/careless", "careless")
    with pytest.raises(TypeError, match="names no permission"):
        careless.get("/")(lambda: None)
    assert PUBLIC not in set(Permission)


def test_nobody_without_a_token_has_a_body_read():
    read = []

    async def life() -> None:
        async with Client(APP) as client:
            sent: list[dict[str, Any]] = []

            async def receive() -> dict[str, Any]:
                read.append(1)
                return {"type": "http.request", "body": b"", "more_body": True}

            async def send(message: dict[str, Any]) -> None:
                sent.append(message)

            scope = {
                "type": "http",
                "asgi": {"version": "3.0"},
                "http_version": "1.1",
                "method": "POST",
                "scheme": "http",
                "path": "/api/v1/blueprints/",
                "raw_path": b"/api/v1/blueprints/",
                "query_string": b"",
                "root_path": "",
                "headers": [(b"content-type", b"application/json")],
                "client": ("127.0.0.1", 1),
                "server": ("127.0.0.1", 80),
                "state": {},
            }
            await client.app(scope, receive, send)
            assert sent[0]["status"] == 401

    asyncio.run(life())
    assert read == []


async def pieces(data: bytes, size: int = 700) -> AsyncIterator[bytes]:
    """Without a length known beforehand, so that the body comes in chunks."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


LONG = json.dumps({**DOCUMENT.to_wire(), "description": "x" * 3000}).encode()
ZIP = BytesIO()
with zipfile.ZipFile(ZIP, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("data.json", b"0" * 2**20)
WIRE = json.dumps(DOCUMENT.to_wire()).encode()
NUL = json.dumps({**BLUEPRINT, "description": "a\0b"})

BODIES: dict[str, tuple[int, dict[str, Any]]] = {
    "over the cap": (413, {"content": LONG, "headers": JSON}),
    "over the cap, in chunks": (413, {"content": pieces, "headers": JSON}),
    "deep": (400, {"content": b"[" * 500 + b"]" * 500, "headers": JSON}),
    "deep, without an end": (400, {"content": b'{"a":' * 200, "headers": JSON}),
    "deep objects": (400, {"content": b'{"a":' * 99 + b"1" + b"}" * 99, "headers": JSON}),
    "a huge number": (400, {"content": b'{"name":' + b"9" * 900 + b"}", "headers": JSON}),
    "a huge exponent": (422, {"content": b'{"name":1e999999}', "headers": JSON}),
    "not a number": (422, {"content": b'{"name":NaN}', "headers": JSON}),
    "a NUL": (400, {"content": WIRE.replace(b"low-rank", b"a\\u0000b"), "headers": JSON}),
    "a NUL in UTF-16": (400, {"content": NUL.encode("utf-16"), "headers": JSON}),
    "a NUL in UTF-32": (400, {"content": NUL.encode("utf-32-le"), "headers": JSON}),
    "half a surrogate": (422, {"content": b'{"name":"\\ud800"}', "headers": JSON}),
    "broken": (400, {"content": b'{"name":', "headers": JSON}),
    "no UTF-8": (400, {"content": b'{"name":"\xff\xfe"}', "headers": JSON}),
    "empty": (422, {"content": b"", "headers": JSON}),
    "a list": (422, {"content": b"[]", "headers": JSON}),
    "gzip": (
        415,
        {"content": gzip.compress(WIRE), "headers": {**JSON, "Content-Encoding": "gzip"}},
    ),
    "a zip": (415, {"content": ZIP.getvalue(), "headers": {"Content-Type": "application/zip"}}),
    "a zip named JSON": (400, {"content": ZIP.getvalue()[:900], "headers": JSON}),
    "a pickle": (400, {"content": pickle.dumps(DOCUMENT.to_wire())[:900], "headers": JSON}),
    "a form": (415, {"data": {"name": "x"}}),
    "of no type": (415, {"content": WIRE}),
    "of another type": (415, {"content": WIRE, "headers": {"Content-Type": "text/plain"}}),
}


@pytest.mark.parametrize("body", BODIES)
def test_bodies_that_are_not_allowed_are_refused_and_nothing_is_stored(place, body):
    status, sent = BODIES[body]
    if callable(sent.get("content")):
        sent = {**sent, "content": sent["content"](LONG)}

    async def life() -> None:
        async with serving(settings(place, max_body_bytes=2048)) as client:
            answer = await client.post("/api/v1/blueprints/", **sent)
            assert answer.status_code == status, answer.text
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert len(answer.content) < 5000
            assert await client.hub.blueprints() == ()

    asyncio.run(life())
    assert stored_files(place) == []


def test_a_body_at_the_cap_is_taken(place):
    async def life() -> None:
        async with serving(settings(place, max_body_bytes=2048)) as client:
            padded = WIRE + b" " * (2048 - len(WIRE))
            answer = await client.post("/api/v1/blueprints/", content=padded, headers=JSON)
            assert answer.status_code == 201
            chunked = {"Content-Type": "Application/JSON; charset=utf-8"}
            again = await client.post(
                "/api/v1/blueprints/", content=pieces(padded), headers=chunked
            )
            assert again.status_code == 200

    asyncio.run(life())


@pytest.mark.parametrize(
    "data",
    [
        b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH,
        b'"' + b"[" * 1000 + b'"',
        b'["' + b"{[" * 1000 + b'\\"]", []]',
        b"[" + b"[]," * 5000 + b"[]]",
        b'"' + b"1" * 900 + b'"',
        b"1" * MAX_DIGITS,
        b'"\\\\u0000"',
        b'"' + b'\\"' * 100_000,
    ],
)
def test_what_only_looks_dangerous_is_let_through(data):
    refuse_unsafe(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * (MAX_JSON_DEPTH + 1),
        b'{"a":' * (MAX_JSON_DEPTH + 1),
        b'["]",' * (MAX_JSON_DEPTH + 1),
        b'[1,"\\"",' * (MAX_JSON_DEPTH + 1),
        b"[" + b"1" * (MAX_DIGITS + 1) + b"]",
        b'["x", -0.' + b"1" * (MAX_DIGITS + 1) + b"]",
        b'"\\u0000"',
        b'"\\\\\\u0000"',
    ],
)
def test_what_is_dangerous_is_not(data):
    with pytest.raises(Refused):
        refuse_unsafe(data)


PATHS = [
    "/api/v1/blueprints/../../etc/passwd",
    "/api/v1/blueprints/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/api/v1/kernels/..%2f..%2furza.sqlite/artifact",
    "/api/v1/kernels/" + "A" * 40,
    "/api/v1/kernels/" + "0" * 40 + "%00",
    "/api/v1/kernels/" + "0" * 40 + "%0a",
    "/api/v1/kernels/" + "0" * 40 + "/artifact/../../x",
    "/api/v1/sessions/%2e%2e",
    "/api/v1/sessions/a*",
    "/api/v1/sessions/a:b",
    "/api/v1/blueprints//",
    "//api/v1/blueprints/",
    "/api/v1/blueprints/?name=a%00b",
    "/api/v1/blueprints/?cursor=%00",
    "/api/v1/blueprints/?cursor=Li4vLi4v",
    "/api/v1/blueprints/?limit=0",
    "/api/v1/blueprints/?limit=1e400",
    "/api/v1/kernels/?states=unknown",
    "/api/v1/sessions/?live=perhaps",
]


@pytest.mark.parametrize("path", PATHS)
def test_tricks_with_paths_lead_nowhere(place, path):
    async def life() -> None:
        async with serving(settings(place)) as client:
            answer = await client.get(path)
            assert answer.status_code in {404, 422}, answer.text
            assert answer.headers["Content-Type"] == "application/problem+json"

    asyncio.run(life())


def test_what_nobody_foresaw_is_a_problem_without_a_trace(place, caplog):
    async def life() -> None:
        async with serving(settings(place)) as client:

            async def broken(*_: object, **__: object) -> None:
                raise RuntimeError(f"a secret: {KEY}")

            client.hub.list_blueprints = broken  # type: ignore[method-assign, assignment]
            answer = await client.get("/api/v1/blueprints/")
            assert answer.status_code == 500
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert "RuntimeError" not in answer.text
            assert KEY not in answer.text

    with caplog.at_level(logging.ERROR):
        asyncio.run(life())
    assert "GET /api/v1/blueprints/" in caplog.text


def test_a_token_stands_in_no_log(place, caplog):
    secret = token()

    async def life() -> None:
        async with serving(settings(place), role=None) as client:
            for header in (f"Bearer {secret}", f"Bearer {secret}x", f"Bearer {forged()}"):
                for path in ("/api/v1/blueprints/", "/nowhere", "/api/v1/kernels/x"):
                    await client.get(path, headers={"Authorization": header})

    with caplog.at_level(logging.DEBUG):
        asyncio.run(life())
    assert secret not in caplog.text
    assert KEY not in caplog.text


def test_a_method_that_nobody_knows_is_counted_with_all_such(place):
    async def life() -> None:
        async with serving(settings(place), role=None) as client:
            for number in range(20):
                await client.request(f"FORGED{number}", "/healthz")
            told = (await client.get("/metrics")).text
            assert "FORGED" not in told
            counted = 'method="other",route="/healthz",status="405"'
            assert f"esper_urza_requests_total{{{counted}}} 20.0" in told

    asyncio.run(life())


def test_a_word_that_the_tables_refuse_is_a_problem(postgres_place):
    change = "ALTER TABLE training_sessions {} CONSTRAINT sessionoutcome"

    async def life() -> None:
        async with serving(settings(postgres_place)) as client:
            # The tables of a version that did not know the word yet.
            async with client.app.state.urza.database.transaction() as session:
                await session.execute(text(change.format("DROP")))
                await session.execute(text(change.format("ADD") + " CHECK (outcome IN ('Lost'))"))
            answer = await client.post("/api/v1/sessions/", json=trained().to_wire())
            assert answer.status_code == 422, answer.text
            assert answer.json()["type"] == "urn:esper:problem:bad-input"
            assert "sessionoutcome" not in answer.text

    asyncio.run(life())


def test_requests_are_counted_by_route_and_status(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            await client.get("/api/v1/blueprints/" + "0" * 64)
            await client.get("/api/v1/blueprints/" + "1" * 64)
            await client.get("/nowhere")
            told = (await client.get("/metrics")).text
            route = 'method="GET",route="/api/v1/blueprints/{digest}"'
            assert f'esper_urza_requests_total{{{route},status="404"}} 2.0' in told
            unknown = 'method="GET",route="unknown",status="404"'
            assert f"esper_urza_requests_total{{{unknown}}} 1.0" in told
            assert f"esper_urza_request_seconds_count{{{route}}} 2.0" in told
            assert "esper_urza_requests_running 1.0" in told
            assert 'esper_urza_database_connections{which="limit"} 5.0' in told

    asyncio.run(life())
