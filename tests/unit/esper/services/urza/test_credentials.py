"""Credentials of sessions: the same when asked for again, good for one session, gone with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisAway

from esper.contracts.assets import MAX_SEEDS, Seed
from esper.contracts.blueprints import builtin
from esper.services.urza.api.lists import MAX_PAGE_SESSIONS
from esper.services.urza.auth import Role
from esper.services.urza.wire import LEASE_HEADER
from tests.unit.esper.services.urza.hubs import (
    DATA,
    DOCUMENT,
    UNKNOWN,
    described,
    requested,
    target,
)
from tests.unit.esper.services.urza.issuing import BLUEPRINT, made, redis_of, until
from tests.unit.esper.services.urza.serving import bearer, serving, settings, trained


@pytest.fixture
def place(sqlite_place):
    """The database's kind makes no difference here."""
    return sqlite_place


def test_credentials_are_the_same_when_asked_for_again(place, redis_server, redis_namespace):
    config = settings(place, redis_server.url)

    async def life() -> None:
        async with serving(config) as one, serving(config) as two:
            first = await made(one, "uid-1", redis_namespace)
            assert await made(one, "uid-1", redis_namespace) == first
            # Another process of the same hub; and one that was started anew.
            assert await made(two, "uid-1", redis_namespace) == first
            other = await made(two, "uid-2", redis_namespace)
            assert other["redisPassword"] != first["redisPassword"]
            refused = await one.post(
                "/internal/sessions/uid-1/credentials", json={"namespace": "elsewhere"}
            )
            assert refused.status_code == 422
        async with serving(config) as later:
            assert await made(later, "uid-1", redis_namespace) == first

    asyncio.run(life())


def test_a_sessions_token_opens_its_own_rows_alone(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            issued = await made(client, "uid-1", "team-a")
            assert "redisUsername" not in issued  # there is no Redis
            token = {"Authorization": f"Bearer {issued['hubToken']}"}
            mine, yours = (trained(uid, namespace="team-a").to_wire() for uid in ("uid-1", "uid-2"))
            elsewhere = trained("uid-1", namespace="team-b").to_wire()
            refused = await client.post("/api/v1/sessions/", json=elsewhere, headers=token)
            assert refused.status_code == 403
            assert (
                await client.post("/api/v1/sessions/", json=mine, headers=token)
            ).status_code == 201
            assert (await client.post("/api/v1/sessions/", json=yours)).status_code == 201
            for method, path, body in (
                ("POST", "/api/v1/sessions/", yours),
                ("PUT", "/api/v1/sessions/uid-2", yours),
                ("GET", "/api/v1/sessions/uid-2", None),
                ("POST", "/api/v1/blueprints/?session=uid-2", BLUEPRINT),
                ("GET", "/api/v1/blueprints/?session=uid-2", None),
                ("GET", "/api/v1/kernels/?session=uid-2", None),
                ("POST", "/api/v1/sessions/", elsewhere),
                ("GET", "/api/v1/sessions/?namespace=team-b", None),
            ):
                answer = await client.request(method, path, json=body, headers=token)
                assert answer.status_code == 403, path
            listed = (await client.get("/api/v1/sessions/", headers=token)).json()
            assert [session["uid"] for session in listed["items"]] == ["uid-1"]
            for query, count in (("live=true", 1), ("live=false", 0), ("name=digits", 1)):
                path = f"/api/v1/sessions/?{query}"
                assert len((await client.get(path, headers=token)).json()["items"]) == count
            for query in ("outcome=Failed", "name=other", "archived=true"):
                path = f"/api/v1/sessions/?{query}"
                assert (await client.get(path, headers=token)).json()["items"] == []
            assert (await client.get("/api/v1/sessions/uid-1", headers=token)).status_code == 200
            used = await client.post(
                "/api/v1/blueprints/?session=uid-1", json=BLUEPRINT, headers=token
            )
            assert used.status_code == 201
            everyone = (await client.get("/api/v1/sessions/", headers=bearer(Role.READER))).json()
            assert len(everyone["items"]) == 2

    asyncio.run(life())


def test_a_namespaces_token_reads_its_own_sessions_alone(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            issued = (await client.post("/internal/namespaces/team-a/credentials")).json()
            token = {"Authorization": f"Bearer {issued['hubToken']}"}
            for uid, namespace in (("uid-1", "team-a"), ("uid-2", "team-b")):
                session = trained(uid, namespace=namespace).to_wire()
                assert (await client.post("/api/v1/sessions/", json=session)).status_code == 201
                path = f"/api/v1/blueprints/?session={uid}"
                assert (await client.post(path, json=BLUEPRINT)).status_code in {200, 201}

            async def seen(path: str) -> Any:
                answer = await client.get(path, headers=token)
                return (
                    len(answer.json()["items"]) if answer.status_code == 200 else answer.status_code
                )

            assert await seen("/api/v1/sessions/") == 1
            assert await seen("/api/v1/sessions/?namespace=team-a") == 1
            assert await seen("/api/v1/sessions/?namespace=team-b") == 403
            assert await seen("/api/v1/blueprints/?session=uid-1") == 1
            assert await seen("/api/v1/blueprints/?session=uid-2") == 0
            assert await seen("/api/v1/kernels/?session=uid-2") == 0
            mine = await client.get("/api/v1/sessions/uid-1", headers=token)
            assert mine.status_code == 200
            foreign = await client.get("/api/v1/sessions/uid-2", headers=token)
            unknown = await client.get("/api/v1/sessions/uid-3", headers=token)
            assert foreign.status_code == unknown.status_code == 404
            assert foreign.text.replace("uid-2", "") == unknown.text.replace("uid-3", "")

    asyncio.run(life())


def test_nobody_lists_the_kernels_and_blueprints_that_others_work_on(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            wanted = {}
            for uid, namespace, inputs in (("u-1", "a", 4), ("u-2", "a", 5), ("u-3", "b", 6)):
                session = trained(uid, namespace=namespace).to_wire()
                assert (await client.post("/api/v1/sessions/", json=session)).status_code == 201
                document = builtin("low-rank", {"rank": inputs})
                await client.hub.put_blueprint(document, session=uid)
                asked = await client.hub.request_kernel(
                    document.digest, target(inputs), session=uid
                )
                wanted[uid] = {document.digest, asked.kernel}

            async def seen(headers: dict[str, str], query: str = "") -> set[str]:
                found = set()
                for path, key in (("kernels", "kernel"), ("blueprints", "digest")):
                    for view in ("outline", "full"):
                        address = f"/api/v1/{path}/?view={view}&{query}"
                        answer = await client.get(address, headers=headers)
                        found |= {item[key] for item in answer.json()["items"]}
                return found

            everything = set().union(*wanted.values())
            assert await seen(bearer(Role.ADMIN)) == await seen(bearer(Role.READER)) == everything
            for uid, namespace in (("u-1", "a"), ("u-3", "b")):
                own = bearer(Role.SESSION, uid, namespace)
                assert await seen(own) == await seen(own, f"session={uid}") == wanted[uid]
                assert await seen(own, "states=proposed&states=compiling") == wanted[uid]
            assert await seen(bearer(Role.SESSION, "u-4", "a")) == set()
            assert await seen(bearer(Role.READER, namespace="a")) == wanted["u-1"] | wanted["u-2"]
            assert await seen(bearer(Role.READER, namespace="a"), "session=u-3") == set()

    asyncio.run(life())


def test_a_kernel_that_is_not_compiled_is_there_for_its_users_alone(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            for uid, namespace in (("u-1", "a"), ("u-2", "a"), ("u-3", "b")):
                session = trained(uid, namespace=namespace).to_wire()
                assert (await client.post("/api/v1/sessions/", json=session)).status_code == 201
            other = await requested(client.hub, inputs=5)
            kernel = await requested(client.hub)

            async def asks(uid: str, namespace: str) -> None:
                body = {"blueprintDigest": DOCUMENT.digest, "target": target().to_wire()}
                path = f"/api/v1/kernels/?session={uid}"
                own = bearer(Role.SESSION, uid, namespace)
                assert (await client.post(path, json=body, headers=own)).status_code == 200

            await asks("u-1", "a")
            let_in = [
                bearer(Role.SESSION, "u-1", "a"),
                bearer(Role.READER, namespace="a"),
                bearer(Role.READER),
                bearer(Role.COMPILER, kernel),
                bearer(Role.WORKER),
                bearer(Role.WORKER, namespace="b"),
                bearer(Role.ADMIN),
            ]
            shut_out = [
                bearer(Role.SESSION, "u-2", "a"),
                bearer(Role.SESSION, "u-3", "b"),
                bearer(Role.SESSION, "u-4", "a"),
                bearer(Role.READER, namespace="b"),
                bearer(Role.COMPILER, other),
            ]
            parts = ("", "/metadata", "/artifact")

            async def statuses(headers: dict[str, str]) -> tuple[int, ...]:
                path = f"/api/v1/kernels/{kernel}"
                return tuple(
                    [(await client.get(path + part, headers=headers)).status_code for part in parts]
                )

            async def nothing_is_there(headers: dict[str, str]) -> None:
                for part in parts:
                    for more in ({}, {"If-None-Match": "*"}):
                        said = [
                            await client.get(f"/api/v1/kernels/{key}{part}", headers=headers | more)
                            for key in (kernel, UNKNOWN)
                        ]
                        assert [answer.status_code for answer in said] == [404, 404]
                        assert said[0].text.replace(kernel, UNKNOWN) == said[1].text

            for headers in let_in:
                assert await statuses(headers) == (200, 404, 404)
            for headers in shut_out:
                await nothing_is_there(headers)
            # Whoever asks for it as well uses it as well.
            await asks("u-3", "b")
            for headers in (shut_out.pop(3), shut_out.pop(1)):
                assert await statuses(headers) == (200, 404, 404)
            await client.hub.fail_kernel(kernel, "no such operator")
            for headers in let_in:
                assert await statuses(headers) == (200, 404, 404)
            for headers in shut_out:
                await nothing_is_there(headers)
            kernel = other
            await client.hub.archive_kernel(kernel)
            await nothing_is_there(bearer(Role.SESSION, "u-1", "a"))
            await client.hub.request_kernel(DOCUMENT.digest, target(5))
            assert await client.hub.claim_kernel(kernel, "forge")
            await nothing_is_there(bearer(Role.SESSION, "u-1", "a"))
            # A compiled one is everybody's, out of the archive too.
            await client.hub.complete_kernel(described(kernel), DATA)
            for headers in (*let_in, *shut_out):
                assert await statuses(headers) == (200, 200, 200)
            await client.hub.archive_kernel(kernel)
            assert await statuses(shut_out[0]) == (200, 200, 200)

    asyncio.run(life())


def test_a_compilers_token_opens_the_work_on_its_own_kernel_alone(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            session = trained("uid-1", namespace="team-b").to_wire()
            assert (await client.post("/api/v1/sessions/", json=session)).status_code == 201
            assert (await client.post("/api/v1/blueprints/", json=BLUEPRINT)).status_code == 201
            await client.hub.put_blueprint(DOCUMENT)
            digest = DOCUMENT.digest
            mine, another = [await requested(client.hub, inputs=inputs) for inputs in (4, 5)]
            work = "/internal/requested-kernels"
            issued = (await client.post(f"{work}/{mine}/credentials")).json()
            assert issued["kernel"] == mine
            token = {"Authorization": f"Bearer {issued['hubToken']}"}
            lease = {"lease": "0" * 32}
            release = {"worker": "forge", **lease}
            named: tuple[tuple[str, str, Any], ...] = (
                ("claim", "POST", {"worker": "forge"}),
                ("heartbeat", "POST", lease),
                ("release", "POST", release),
                ("result", "POST", {**lease, "error": "no"}),
            )
            for place_, method, body in named:
                path = f"{work}/{another}/{place_}"
                answer = await client.request(method, path, json=body, headers=token)
                assert answer.status_code == 403, path
            binary = {**token, "Content-Type": "application/octet-stream", LEASE_HEADER: "0" * 32}
            upload = f"{work}/{another}/artifact?digest={'0' * 64}&bytes=64"
            answer = await client.put(upload, content=b"0" * 64, headers=binary)
            assert answer.status_code == 403
            for method, path, body in (
                ("GET", "/api/v1/sessions/", None),
                ("GET", "/api/v1/sessions/uid-1", None),
                ("PUT", "/api/v1/sessions/uid-1", session),
                ("POST", "/api/v1/sessions/", session),
                ("GET", "/api/v1/sessions/uid-1/objects", None),
                ("GET", "/api/v1/kernels/?session=uid-1", None),
                ("GET", "/api/v1/kernels/", None),
                ("GET", "/api/v1/blueprints/", None),
                ("POST", "/api/v1/blueprints/", BLUEPRINT),
                ("GET", work, None),
                ("POST", f"{work}/claim", {"worker": "forge"}),
                ("POST", "/internal/unvalidated-blueprints/claim", {"worker": "forge"}),
                ("POST", f"{work}/{mine}/credentials", None),
            ):
                answer = await client.request(method, path, json=body, headers=token)
                assert answer.status_code == 403, path
            for path in (f"/api/v1/kernels/{mine}", f"/api/v1/blueprints/{digest}"):
                assert (await client.get(path, headers=token)).status_code == 200
            claimed = await client.post(
                f"{work}/{mine}/claim", json={"worker": "forge"}, headers=token
            )
            assert claimed.status_code == 200
            lease = {"lease": claimed.json()["lease"]}
            beat = await client.post(f"{work}/{mine}/heartbeat", json=lease, headers=token)
            assert beat.status_code == 200

    asyncio.run(life())


def test_a_workers_token_of_a_namespace_keeps_its_sessions_alone(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            token = bearer(Role.WORKER, namespace="team-a")
            mine, yours = (
                trained(uid, namespace=namespace).to_wire()
                for uid, namespace in (("uid-1", "team-a"), ("uid-2", "team-b"))
            )
            for session in (mine, yours):
                assert (await client.post("/api/v1/sessions/", json=session)).status_code == 201
            path = "/api/v1/sessions"
            kept = await client.put(f"{path}/uid-1", json=mine, headers=token)
            assert kept.status_code == 200
            refused = await client.put(f"{path}/uid-2", json=yours, headers=token)
            assert refused.status_code == 403
            listed = (await client.get(f"{path}/", headers=token)).json()
            assert [session["uid"] for session in listed["items"]] == ["uid-1"]

    asyncio.run(life())


def test_a_page_of_sessions_has_a_bound_in_bytes(place):
    layer, blueprint = "é" * 512, "é" * 253

    async def life() -> None:
        async with serving(settings(place)) as client:
            seeds = tuple(
                Seed(seed_id=(0, slot), layer=layer, blueprint=blueprint, kernel=UNKNOWN)
                for slot in range(MAX_SEEDS)
            )
            large = trained("uid-1", num_slots=MAX_SEEDS, seeds=seeds)
            answer = await client.post("/api/v1/sessions/", json=large.to_wire())
            assert answer.status_code == 201, answer.text
            page = await client.get("/api/v1/sessions/")
            assert MAX_PAGE_SESSIONS * len(page.content) < 20 * 2**20
            too_many = await client.get(f"/api/v1/sessions/?limit={MAX_PAGE_SESSIONS + 1}")
            assert too_many.status_code == 422

    asyncio.run(life())


def test_a_session_whose_credentials_were_revoked_is_not_kept_on(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            mine, late = (trained(u, namespace="team-a").to_wire() for u in ("uid-1", "uid-2"))
            await client.post("/api/v1/sessions/", json=mine)
            for uid in ("uid-1", "uid-2"):
                await made(client, uid, "team-a")
                assert (
                    await client.delete(f"/internal/sessions/{uid}/credentials")
                ).status_code == 204
            for answer in (
                await client.put("/api/v1/sessions/uid-1", json=mine),
                await client.post("/api/v1/sessions/", json=late),
            ):
                assert (answer.status_code, answer.json()["reason"]) == (409, "Revoked")

    asyncio.run(life())


def sweeping(gathered: str) -> dict[str, Any]:
    return {"namespace": "team-a", "liveUids": [], "gatheredAt": gathered}


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_times_that_utc_does_not_have_are_refused(place, moment):
    async def life() -> None:
        async with serving(settings(place)) as client:
            session = trained("uid-1").to_wire()
            for path, body in (
                ("/internal/sessions/sweep", sweeping(moment)),
                ("/api/v1/sessions/", {**session, "createdAt": moment}),
                ("/api/v1/sessions/", {**session, "updatedAt": moment}),
                ("/api/v1/sessions/", {**session, "endedAt": moment}),
            ):
                answer = await client.post(path, json=body)
                assert answer.status_code == 422, answer.text

    asyncio.run(life())


async def swept_namespaces(client: Any) -> Any:
    return (await client.get("/internal/namespaces")).json()["namespaces"]


def test_a_namespace_whose_sessions_are_all_swept_is_looked_at_no_more(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            await made(client, "uid-1", "team-a")
            await made(client, "uid-2", "team-b")
            assert await swept_namespaces(client) == ["team-a", "team-b"]
            swept = {"namespace": "team-a", "liveUids": []}
            assert (await client.post("/internal/sessions/sweep", json=swept)).status_code == 200
            assert await swept_namespaces(client) == ["team-b"]

    asyncio.run(life())


def test_a_sweep_ends_what_is_gone_and_spares_what_lives(place, redis_server, redis_namespace):
    async def life() -> None:
        async with serving(settings(place, redis_server.url)) as client:
            issued = {uid: await made(client, uid, redis_namespace) for uid in ("uid-1", "uid-2")}
            for uid in issued:
                session = trained(uid, namespace=redis_namespace).to_wire()
                assert (await client.post("/api/v1/sessions/", json=session)).status_code == 201
                async with redis_of(redis_server, issued[uid]) as redis:
                    await redis.xadd(f"esper:{redis_namespace}:{uid}:packets", {"a": "b"})
            assert await swept_namespaces(client) == [redis_namespace]
            swept = {"namespace": redis_namespace, "liveUids": ["uid-2"]}
            answer = await client.post("/internal/sessions/sweep", json=swept)
            assert answer.json() == {"ended": ["uid-1"], "revoked": ["uid-1"]}
            again = await client.post("/internal/sessions/sweep", json=swept)
            assert again.json() == {"ended": [], "revoked": ["uid-1"]}
            statuses = [
                (
                    await client.get(
                        f"/api/v1/sessions/{uid}",
                        headers={"Authorization": f"Bearer {issued[uid]['hubToken']}"},
                    )
                ).status_code
                for uid in issued
            ]
            assert statuses == [401, 200]
            async with redis_of(redis_server, issued["uid-1"]) as redis:
                with pytest.raises(AuthenticationError):
                    await redis.ping()
            async with Redis.from_url(redis_server.url, decode_responses=True) as admin:
                left = await admin.keys(f"esper:{redis_namespace}:*")
                assert left == [f"esper:{redis_namespace}:uid-2:packets"]
            refused = await client.post(
                "/internal/sessions/uid-1/credentials", json={"namespace": redis_namespace}
            )
            assert refused.status_code == 409
            assert refused.json()["reason"] == "Revoked"

    asyncio.run(life())


def test_another_process_learns_of_a_revocation(place):
    config = settings(place, upkeep_seconds=0.05)

    async def life() -> None:
        async with serving(config) as one, serving(config) as two:
            issued = await made(one, "uid-1", "team-a")
            token = {"Authorization": f"Bearer {issued['hubToken']}"}
            assert (await two.get("/api/v1/sessions/", headers=token)).status_code == 200
            gone = await one.delete("/internal/sessions/uid-1/credentials")
            assert gone.status_code == 204
            assert (await one.get("/api/v1/sessions/", headers=token)).status_code == 401

            async def known() -> bool:
                return (await two.get("/api/v1/sessions/", headers=token)).status_code == 401

            await until(known)
            unknown = await one.delete("/internal/sessions/uid-9/credentials")
            assert unknown.status_code == 404

    asyncio.run(life())


def test_users_are_set_again_when_redis_returns(place, private_redis):
    config = settings(place, private_redis.url, upkeep_seconds=0.05)

    async def life() -> None:
        async with serving(config) as client:
            issued = await made(client, "uid-1", "team-a")
            namespaces = (await client.post("/internal/namespaces/team-a/credentials")).json()
            private_redis.kill()
            refused = await client.post(
                "/internal/sessions/uid-2/credentials", json={"namespace": "team-a"}
            )
            assert refused.status_code == 503
            ready = await client.get("/readyz")
            assert ready.status_code == 503
            assert "redis.url" in ready.json()["detail"]
            assert "letmein" not in ready.text + refused.text
            private_redis.start()

            async def back() -> bool:
                try:
                    for found in (issued, namespaces):
                        async with redis_of(private_redis, found) as redis:
                            await redis.ping()
                except (AuthenticationError, RedisAway):
                    return False
                return True

            await until(back)
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(life())
