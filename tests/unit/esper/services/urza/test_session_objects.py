"""What a session keeps at the hub: its own alone, checked on its way, gone when it should be."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from esper.configs import HubConfig
from esper.errors import BadInput, KernelNotFound, StorageFull, StoreUnavailable, Unauthorized
from esper.services.contracts import IssuedCredentials
from esper.services.urza.auth import Role
from esper.services.urza.http_client import HttpUrza
from esper.services.urza.http_objects import PATIENCE_SECONDS, HubObjects
from tests.unit.esper.services.urza.serving import (
    Client,
    bearer,
    listening,
    serving,
    settings,
    stored_files,
    token,
)

BINARY = {"Content-Type": "application/octet-stream"}
DATA = b"the bytes of a checkpoint"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def put(client: Client, path: str, data: bytes = DATA, **changes: Any) -> httpx.Response:
    params = {"digest": hashlib.sha256(data).hexdigest(), "bytes": str(len(data))}
    headers = BINARY | changes.pop("headers", {})
    url = f"/api/v1/sessions/{path}"
    return await client.put(url, params=params | changes, content=data, headers=headers)


def test_an_object_comes_out_as_it_went_in(place: Any) -> None:
    path = "uid-1/objects/checkpoints/epoch-000001/state.json"

    async def life() -> None:
        async with serving(settings(place)) as client:
            kept = await put(client, path)
            assert (kept.status_code, kept.json()["bytes"]) == (200, len(DATA))
            assert (await put(client, path)).status_code == 200, "sent again"
            found = await client.get(f"/api/v1/sessions/{path}")
            assert (found.status_code, found.content) == (200, DATA)
            assert found.headers["Content-Length"] == str(len(DATA))
            listed = (await client.get("/api/v1/sessions/uid-1/objects")).json()["objects"]
            name = "checkpoints/epoch-000001/state.json"
            assert listed == [{"name": name, "bytes": len(DATA)}]
            assert stored_files(place) == [f"sessions/uid-1/{name}"]
            for _ in range(2):
                assert (await client.delete(f"/api/v1/sessions/{path}")).status_code == 204
            assert (await client.get(f"/api/v1/sessions/{path}")).status_code == 404
            assert stored_files(place) == []

    run(life())


def test_a_session_reaches_its_own_alone_and_workers_and_readers_none(place: Any) -> None:
    async def life() -> None:
        async with serving(settings(place)) as client:
            path = "uid-1/objects/a"
            assert (await put(client, path)).status_code == 200
            for role, subject, status in (
                (Role.SESSION, "uid-1", 200),
                (Role.SESSION, "uid-2", 403),
                (Role.WORKER, "uid-1", 403),
                (Role.READER, "uid-1", 403),
                (Role.ADMIN, "somebody", 200),
            ):
                headers = bearer(role, subject)
                answers = [
                    await client.get("/api/v1/sessions/uid-1/objects", headers=headers),
                    await client.get(f"/api/v1/sessions/{path}", headers=headers),
                    await put(client, path, headers=headers),
                ]
                assert [answer.status_code for answer in answers] == [status] * 3, role
            gone = await client.delete(
                f"/api/v1/sessions/{path}", headers=bearer(Role.SESSION, "uid-2")
            )
            assert gone.status_code == 403
            assert stored_files(place) == ["sessions/uid-1/a"]

    run(life())


@pytest.mark.parametrize(
    ("path", "changes", "status"),
    [
        ("uid-1/objects/a", {"digest": "0" * 64}, 422),
        ("uid-1/objects/a", {"bytes": str(len(DATA) - 1)}, 413),
        ("uid-1/objects/a", {"headers": {"Content-Type": "text/plain"}}, 415),
        ("uid-1/objects/..%2F..%2Furza.sqlite", {}, 422),
        ("uid-1/objects/../uid-2/objects/a", {}, 404),
        ("uid-1/objects/.hidden", {}, 422),
        ("uid-1/objects/a//b", {}, 422),
        ("uid-1/objects/" + "x" * 600, {}, 422),
    ],
)
def test_what_is_not_what_it_says_or_leads_elsewhere_is_refused(
    place: Any, path: str, changes: dict[str, Any], status: int
) -> None:
    async def life() -> None:
        async with serving(settings(place)) as client:
            assert (await put(client, path, **changes)).status_code == status
            found = stored_files(place)
            assert found == []

    run(life())


def test_one_object_and_all_of_a_session_have_a_bound(place: Any) -> None:
    limits = {"max_object_bytes": 2000, "max_session_bytes": 3000}

    async def life() -> None:
        async with serving(settings(place, **limits)) as client:
            large = await put(client, "uid-1/objects/a", b"x" * 2001)
            assert large.status_code in (413, 422)
            for name in ("a", "a", "b"):  # what is sent again counts once
                data = b"x" * 1500
                assert (await put(client, f"uid-1/objects/{name}", data)).status_code == 200
            full = await put(client, "uid-1/objects/c", b"x")
            assert full.status_code == 507
            assert "urza.max_session_bytes" in full.json()["detail"]
            assert (await put(client, "uid-2/objects/c", b"x")).status_code == 200

    run(life())


def test_a_sweep_removes_what_is_to_go_with_its_session(place: Any) -> None:
    async def life() -> None:
        async with listening(settings(place)) as url:
            config = HubConfig(url=url, token=SecretStr(token()))
            async with HttpUrza(config) as hub:
                policies = {"gone": "Delete", "kept": "Retain", "live": "Delete", "late": "Retain"}
                for uid, policy in policies.items():
                    issued = await hub.session_credentials(uid, "team", deletion_policy=policy)  # type: ignore[arg-type]
                    own = HubConfig(url=url, token=SecretStr(issued.hub_token))
                    await HubObjects(own, uid).put("checkpoints/a", DATA)
                await hub.session_credentials("late", "team", deletion_policy="Delete")
                soon = datetime.now(UTC) + timedelta(seconds=5)
                await hub.sweep("team", ["live"], soon)
                for _ in range(2):  # whoever sweeps again finds nothing to do
                    assert stored_files(place) == [
                        "sessions/kept/checkpoints/a",
                        "sessions/live/checkpoints/a",
                    ]
                    await hub.sweep("team", ["live"], soon)
                await hub.revoke_credentials("live")
                assert stored_files(place) == ["sessions/kept/checkpoints/a"]
                with pytest.raises(Unauthorized):
                    await HubObjects(own, "late").put("checkpoints/b", DATA)

    run(life())


# The client


def test_the_client_is_a_sessions_store(place: Any) -> None:
    async def life() -> None:
        async with listening(settings(place)) as url:
            own = HubConfig(url=url, token=SecretStr(token(Role.SESSION, "uid-1")))
            store = HubObjects(own, "uid-1")
            await store.check()
            large = bytes(range(256)) * 20_000

            async def chunks() -> Any:
                for start in range(0, len(large), 1_000_000):
                    yield large[start : start + 1_000_000]

            digest = hashlib.sha256(large).hexdigest()
            await store.put_stream("a/large", chunks(), sha256=digest, max_bytes=len(large))
            await store.put("b/small", DATA)
            assert await store.listed("a") == {"a/large": len(large)}
            assert await store.get("a/large") == large
            assert await HubObjects(own, "uid-1").get("b/small") == DATA
            assert await store.get("a/none") is None
            with pytest.raises(BadInput, match="SHA-256"):
                await store.put_stream("c", chunks(), sha256="0" * 64, max_bytes=len(large))
            with pytest.raises(BadInput, match="object key"):
                await store.put("../c", DATA)
            await store.delete("a/large")
            assert await store.listed("a") == {}
            with pytest.raises(Unauthorized):
                await HubObjects(own, "uid-2").check()

    run(life())


def test_a_hub_that_is_away_is_waited_for_and_then_given_up(place: Any) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def life() -> None:
        config = HubConfig(url="http://127.0.0.1:9", attempts=1)
        store = HubObjects(config, "uid-1", sleep=sleep, clock=lambda: sum(waited))
        with pytest.raises(StoreUnavailable, match=r"hub\.url"):
            await store.put("a", DATA)

    run(life())
    assert PATIENCE_SECONDS - 20 < sum(waited) <= PATIENCE_SECONDS
    assert waited == sorted(waited)
    assert max(waited) == 10.0


def test_a_full_hub_says_so(place: Any) -> None:
    async def life() -> None:
        async with listening(settings(place, max_session_bytes=1024)) as url:
            own = HubConfig(url=url, token=SecretStr(token(Role.SESSION, "uid-1")))
            with pytest.raises(StorageFull, match="max_session_bytes"):
                await HubObjects(own, "uid-1").put("a", b"x" * 1025)

    run(life())


def test_what_the_operator_asks_the_hub(place: Any) -> None:
    """Typed, over HTTP: blueprints and kernels in outline, credentials, revocation."""
    from tests.unit.esper.services.urza.hubs import DOCUMENT, OTHER, UNKNOWN, target

    async def life() -> None:
        async with (
            listening(settings(place)) as url,
            HttpUrza(HubConfig(url=url, token=SecretStr(token()))) as hub,
        ):
            for document in (DOCUMENT, OTHER):
                await hub.put_blueprint(document)
            asked = await hub.request_kernel(DOCUMENT.digest, target())
            await hub.request_kernel(OTHER.digest, target())
            outlines = await hub.blueprint_outlines()
            assert [one.digest for one in outlines] == [DOCUMENT.digest, OTHER.digest]
            (kernel,) = await hub.kernel_outlines(DOCUMENT.digest)
            assert (kernel.kernel, kernel.state) == (asked.kernel, "proposed")
            assert len(await hub.kernel_outlines()) == 2
            issued = await hub.session_credentials("uid-1", "team")
            assert isinstance(issued, IssuedCredentials)
            assert await hub.session_credentials("uid-1", "team") == issued
            operator = await hub.operator_credentials()
            assert operator.redis_username is None, "there is no Redis behind this hub"
            compiling = await hub.kernel_credentials(asked.kernel)
            assert await hub.kernel_credentials(asked.kernel) == compiling
            with pytest.raises(KernelNotFound):
                await hub.kernel_credentials(UNKNOWN)
            own = HubConfig(url=url, token=SecretStr(compiling.hub_token))
            async with HttpUrza(own) as compiler:
                assert await compiler.lease_kernel(asked.kernel, "forge", 60.0) is not None
                with pytest.raises(Unauthorized):
                    await compiler.require_work()
                with pytest.raises(Unauthorized):
                    await compiler.operator_credentials()
            await hub.revoke_credentials("uid-1")
            own = HubConfig(url=url, token=SecretStr(issued.hub_token))
            async with HttpUrza(own) as session:
                with pytest.raises(Unauthorized):
                    await session.blueprints()

    run(life())
