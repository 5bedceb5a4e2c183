"""The hub against its own description: whatever fits it, or nearly, gets a documented answer.

ESPER_SCHEMA_EXAMPLES=200 draws so many examples for each operation instead of a few.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks

from esper.configs import EsperConfig, HubConfig
from esper.services.tezzeret.compiler import compile_kernel
from esper.services.urza.http_client import HttpUrza
from esper.services.urza.main import create_app
from tests.unit.esper.services.urza.hubs import DOCUMENT, OTHER, Place, target
from tests.unit.esper.services.urza.serving import listening, token, trained
from tests.unit.esper.services.urza.serving import settings as hub_settings

EXAMPLES = int(os.environ.get("ESPER_SCHEMA_EXAMPLES", "4"))

load_all_checks()
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(
    create_app(
        hub_settings(Place("sqlite+aiosqlite:///unopened.sqlite", Path("unopened")))
    ).openapi()
)
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}


@dataclass(frozen=True)
class Served:
    """A hub on the loopback, and what is in it."""

    url: str
    known: dict[str, str]


async def fill(url: str) -> dict[str, str]:
    """Put a little of everything into the hub, so that some examples find something."""
    hub = HubConfig.model_validate({"url": url, "token": token()})
    async with HttpUrza(hub) as client:
        await client.register_session(trained())
        await client.put_blueprint(OTHER)
        await client.put_blueprint(DOCUMENT, session="uid-1")
        kernel = await client.request_kernel(DOCUMENT.digest, target(), session="uid-1")
        await client.claim_kernel(kernel.kernel, "forge")
        made = compile_kernel(DOCUMENT, target())
        await client.complete_kernel(made.metadata, made.data)
        await client.request_kernel(DOCUMENT.digest, target(7))
        return {"digest": DOCUMENT.digest, "kernel": kernel.kernel, "uid": "uid-1"}


def serve_in_thread(config: EsperConfig) -> tuple[Future[Served], Callable[[], None]]:
    """The hub on an event loop of its own, and what stops it."""
    served: Future[Served] = Future()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def life() -> None:
        async with listening(config) as url:
            served.set_result(Served(url, await fill(url)))
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(life())
        except BaseException as error:
            if served.done():
                raise
            served.set_exception(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()

    def ending() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)
        thread.join()

    return served, ending


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hub")
    url = f"sqlite+aiosqlite:///{folder}/urza.sqlite"
    server = None
    if request.param == "postgres":
        server = request.getfixturevalue("postgres_server")
        url = server.create_database("schema")
    serving, stop = serve_in_thread(hub_settings(Place(url, folder)))
    try:
        yield serving.result(60)
    finally:
        stop()
        if server is not None:
            server.drop_database("schema")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_every_answer_is_documented(served: Served, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]
    has_input = operation.body or operation.query or operation.path_parameters or operation.headers
    if mode is GenerationMode.NEGATIVE and not has_input:
        return  # whatever is sent fits
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {token()}"
    count = 0

    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def answered(case: Case) -> None:
        nonlocal count
        count += 1
        if count % 2:
            # Drawn names are hardly ever there.
            for name in (case.path_parameters or {}).keys() & served.known.keys():
                case.path_parameters[name] = served.known[name]
        response = case.call(base_url=served.url, session=session)
        case.validate_response(response, checks=CHECKS)

    with session:
        answered()
    assert count > 0


def test_the_hub_still_lives(served: Served) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        assert requests.get(served.url + path, timeout=60).status_code == 200


def test_every_operation_says_whom_it_lets_in_and_shows_an_example() -> None:
    described = SCHEMA.raw_schema
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            opened = operation["x-permission"] == "none"
            assert opened == ("security" not in operation), (method, path)
            assert operation["description"], (method, path)
            for content in operation.get("requestBody", {}).get("content", {}).values():
                name = content["schema"].get("$ref", "").rpartition("/")[2]
                assert not name or described["components"]["schemas"][name]["examples"], name
