"""What an `UrzaClient` does, in this process and over HTTP: the same, errors and words included."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import cache

import httpx
import pytest

from esper.contracts.assets import Seed, TrainingSession
from esper.contracts.blueprints import kernel_id
from esper.contracts.enums import BlueprintState, SeedState, SessionOutcome
from esper.contracts.kernels import KernelMetadata
from esper.errors import (
    BadInput,
    BlueprintNotFound,
    Conflict,
    ConflictReason,
    EsperError,
    KernelError,
    KernelNotFound,
    NotFound,
)
from esper.services.tezzeret.compiler import compile_kernel
from esper.services.urza.client import UrzaClient
from tests.unit.esper.services.urza.hubs import DOCUMENT, OTHER, UNKNOWN, Place, opened, target
from tests.unit.esper.services.urza.serving import over_http, settings, trained

LONG = 600.0
Life = Callable[[UrzaClient], Awaitable[None]]


@pytest.fixture(params=["in process", "over http"])
def live(request, place) -> Callable[[Life], None]:
    """Runs a test's life with a client of a new hub."""

    @asynccontextmanager
    async def client(place: Place) -> AsyncIterator[UrzaClient]:
        if request.param == "in process":
            async with opened(place) as hub:
                yield hub
        else:
            async with over_http(settings(place)) as http:
                yield http

    def run(life: Life) -> None:
        async def whole() -> None:
            async with client(place) as hub:
                await life(hub)

        asyncio.run(whole())

    return run


@cache
def compiled(inputs: int = 4) -> tuple[KernelMetadata, bytes]:
    made = compile_kernel(DOCUMENT, target(inputs))
    return made.metadata, made.data


async def refused(work: Awaitable[object], kind: type[EsperError]) -> str:
    with pytest.raises(kind) as caught:
        await work
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def lost(work: Awaitable[object]) -> None:
    with pytest.raises(Conflict) as caught:
        await work
    assert caught.value.reason is ConflictReason.LEASE_LOST


def test_blueprints(live):
    async def life(hub: UrzaClient) -> None:
        assert await hub.health()
        assert await hub.blueprints() == ()
        first = await hub.put_blueprint(DOCUMENT)
        assert first.document == DOCUMENT
        assert await hub.put_blueprint(DOCUMENT) == first
        renamed = DOCUMENT.model_copy(update={"name": "another"})
        assert await hub.put_blueprint(renamed) == first
        other = await hub.put_blueprint(OTHER)
        assert await hub.blueprints() == (first, other)
        assert await hub.blueprint(OTHER.digest) == other
        message = await refused(hub.blueprint("f" * 64), BlueprintNotFound)
        assert message == (
            f"blueprint digest: got {'f' * 64}; allowed: a blueprint that was put into the hub"
        )
        await refused(hub.blueprint("../../x"), BlueprintNotFound)

    live(life)


def test_kernels_are_requested_once(live):
    async def life(hub: UrzaClient) -> None:
        await refused(hub.request_kernel(DOCUMENT.digest, target()), BlueprintNotFound)
        await hub.put_blueprint(DOCUMENT)
        first = await hub.request_kernel(DOCUMENT.digest, target())
        assert first.kernel == kernel_id(DOCUMENT.digest, target())
        assert await hub.request_kernel(DOCUMENT.digest, target()) == first
        assert await hub.kernel(first.kernel) == first
        second = await hub.request_kernel(DOCUMENT.digest, target(5))
        assert await hub.kernels() == (first, second)
        assert await hub.kernels([BlueprintState.FAILED]) == ()
        assert await hub.kernels([]) == ()
        await refused(hub.kernel(UNKNOWN), KernelNotFound)
        await refused(hub.kernel("../" * 13 + "x"), KernelNotFound)

    live(life)


def test_a_kernel_is_compiled_under_a_lease(live):
    metadata, data = compiled()

    async def life(hub: UrzaClient) -> None:
        assert await hub.claim_next_kernel("forge", LONG) is None
        await hub.put_blueprint(DOCUMENT)
        kernel = (await hub.request_kernel(DOCUMENT.digest, target())).kernel
        await refused(hub.metadata(kernel), KernelError)
        await refused(hub.artifact(kernel), KernelError)
        claim = await hub.claim_next_kernel("forge", LONG)
        assert claim is not None
        assert (claim.kernel, claim.blueprint, claim.target) == (kernel, DOCUMENT, target())
        assert await hub.claim_next_kernel("other", LONG) is None
        assert await hub.lease_kernel(kernel, "other", LONG) is None
        until = await hub.heartbeat_kernel(kernel, claim.lease, LONG * 2)
        assert until > claim.expires_at
        done = await hub.complete_kernel(metadata, data, token=claim.lease)
        assert done.state is BlueprintState.CHARACTERIZED
        assert done.artifact_digest == metadata.artifact_digest
        # The answer was lost: the same again changes nothing.
        assert await hub.complete_kernel(metadata, data, token=claim.lease) == done
        assert await hub.metadata(kernel) == metadata
        assert await hub.artifact(kernel) == data
        await lost(hub.heartbeat_kernel(kernel, claim.lease, LONG))

    live(life)


def test_a_lost_lease_brings_no_result(live):
    metadata, data = compiled()
    foreign = "0" * 32

    async def life(hub: UrzaClient) -> None:
        await hub.put_blueprint(DOCUMENT)
        kernel = (await hub.request_kernel(DOCUMENT.digest, target())).kernel
        claim = await hub.lease_kernel(kernel, "forge", LONG)
        assert claim is not None
        for token in (foreign, "no lease at all"):
            await lost(hub.heartbeat_kernel(kernel, token, LONG))
            await lost(hub.complete_kernel(metadata, data, token=token))
            await lost(hub.fail_kernel(kernel, "a reason", token=token))
        await hub.release_kernel(kernel, "forge", token=claim.lease)
        again = await hub.lease_kernel(kernel, "other", LONG)
        assert again is not None
        await lost(hub.complete_kernel(metadata, data, token=claim.lease))
        failed = await hub.fail_kernel(kernel, "it does not fit", token=again.lease)
        assert (failed.state, failed.error) == (BlueprintState.FAILED, "it does not fit")
        message = await refused(hub.metadata(kernel), KernelError)
        assert "it does not fit" in message

    live(life)


def test_what_is_handed_in_must_be_what_it_says(live):
    metadata, data = compiled()

    async def life(hub: UrzaClient) -> None:
        await hub.put_blueprint(DOCUMENT)
        kernel = (await hub.request_kernel(DOCUMENT.digest, target())).kernel
        claim = await hub.lease_kernel(kernel, "forge", LONG)
        assert claim is not None
        wrong = hub.complete_kernel(metadata, data + b"x", token=claim.lease)
        await refused(wrong, KernelError)
        other = metadata.model_copy(update={"blueprint_digest": OTHER.digest})
        await refused(hub.complete_kernel(other, data, token=claim.lease), KernelError)
        gone = metadata.model_copy(update={"kernel": UNKNOWN})
        await refused(hub.complete_kernel(gone, data, token=claim.lease), KernelNotFound)
        done = await hub.complete_kernel(metadata, data, token=claim.lease)
        assert done.state is BlueprintState.CHARACTERIZED

    live(life)


def test_a_kernel_is_claimed_by_a_worker_without_a_lease_of_its_own(live):
    metadata, data = compiled()

    async def life(hub: UrzaClient) -> None:
        await hub.put_blueprint(DOCUMENT)
        kernel = (await hub.request_kernel(DOCUMENT.digest, target())).kernel
        assert await hub.claim_kernel(kernel, "forge")
        assert await hub.claim_kernel(kernel, "forge")
        assert await hub.lease_kernel(kernel, "other", LONG) is None
        await hub.release_kernel(kernel, "forge")
        await hub.release_kernel(kernel, "forge")
        assert await hub.claim_kernel(kernel, "forge")
        done = await hub.complete_kernel(metadata, data)
        assert done.state is BlueprintState.CHARACTERIZED
        assert not await hub.claim_kernel(kernel, "forge")
        second = (await hub.request_kernel(DOCUMENT.digest, target(5))).kernel
        assert await hub.claim_kernel(second, "forge")
        assert (await hub.fail_kernel(second, "")).error == "no reason was given"
        await refused(hub.claim_kernel(UNKNOWN, "forge"), KernelNotFound)

    live(life)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e9])
def test_a_lease_has_bounds(live, seconds):
    async def life(hub: UrzaClient) -> None:
        await hub.put_blueprint(DOCUMENT)
        await refused(hub.claim_next_kernel("forge", seconds), BadInput)
        await refused(hub.claim_next_blueprint("forge", seconds), BadInput)
        await refused(hub.claim_next_kernel("", LONG), BadInput)

    live(life)


def test_blueprints_are_validated_under_a_lease(live):
    async def life(hub: UrzaClient) -> None:
        assert await hub.claim_next_blueprint("forge", LONG) is None
        await hub.put_blueprint(DOCUMENT)
        await hub.put_blueprint(OTHER)
        first = await hub.claim_next_blueprint("forge", LONG)
        second = await hub.claim_next_blueprint("forge", LONG)
        assert first is not None
        assert second is not None
        assert (first.document, second.document) == (DOCUMENT, OTHER)
        assert await hub.heartbeat_blueprint(first.digest, first.lease, LONG * 2) > first.expires_at
        await lost(hub.heartbeat_blueprint(first.digest, second.lease, LONG))
        sound = await hub.complete_blueprint(first.digest, first.lease)
        assert sound.state is BlueprintState.CHARACTERIZED
        await hub.release_blueprint(second.digest, "forge", token=second.lease)
        await lost(hub.fail_blueprint(second.digest, second.lease, "late"))
        again = await hub.claim_next_blueprint("forge", LONG)
        assert again is not None
        failed = await hub.fail_blueprint(again.digest, again.lease, "no host compiles")
        assert (failed.state, failed.error) == (BlueprintState.FAILED, "no host compiles")

    live(life)


def untimed(session: TrainingSession) -> TrainingSession:
    never = datetime.fromtimestamp(0, UTC)
    return session.model_copy(update={"created_at": never, "updated_at": never})


def test_sessions(live):
    async def life(hub: UrzaClient) -> None:
        yesterday = datetime.now(UTC) - timedelta(days=1)
        session = trained(created_at=yesterday, updated_at=yesterday)
        await refused(hub.update_session(session), NotFound)
        stored = await hub.register_session(session)
        assert untimed(stored) == untimed(session)
        assert stored.created_at == stored.updated_at > yesterday + timedelta(hours=23)
        assert await hub.register_session(trained(epochs=9)) == stored
        await hub.put_blueprint(DOCUMENT, session=session.uid)
        kernel = (await hub.request_kernel(DOCUMENT.digest, target(), session=session.uid)).kernel
        seed = Seed(
            seed_id=(1, 0),
            layer="0",
            state=SeedState.TRAINING,
            alpha=0.25,
            blueprint=DOCUMENT.name,
            kernel=kernel,
        )
        changed = session.changed(epoch=3, seeds=(seed,))
        now = await hub.update_session(changed)
        assert untimed(now) == untimed(changed)
        assert now.created_at == stored.created_at < now.updated_at
        ended = await hub.update_session(changed.changed(outcome=SessionOutcome.SUCCEEDED))
        assert ended.ended_at is not None
        await refused(hub.update_session(session.changed(name="another")), BadInput)
        await refused(hub.put_blueprint(OTHER, session="nobody"), NotFound)

    live(life)


def test_lists_are_whole_however_many_pages_they_come_in(live):
    async def life(hub: UrzaClient) -> None:
        await hub.put_blueprint(DOCUMENT)
        asked = [
            (await hub.request_kernel(DOCUMENT.digest, target(inputs))).kernel
            for inputs in range(1, 14)
        ]
        assert [kernel.kernel for kernel in await hub.kernels()] == asked

    live(life)


class LosingTheFirstAnswer(httpx.AsyncHTTPTransport):
    """Each request is served; the first answer of each path does not arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: set[bytes] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        path = request.url.raw_path
        if path not in self.lost:
            self.lost.add(path)
            await response.aclose()
            raise httpx.ReadError("cut", request=request)
        return response


def test_work_is_claimed_once_though_the_answer_is_lost(place):
    async def life() -> None:
        transport = LosingTheFirstAnswer()
        async with opened(place) as hub, over_http(settings(place), transport=transport) as http:
            await hub.put_blueprint(DOCUMENT)
            first, second = [
                (await hub.request_kernel(DOCUMENT.digest, target(n))).kernel for n in (1, 2)
            ]
            claim = await http.claim_next_kernel("forge", LONG)
            assert claim is not None
            other = await http.lease_kernel(second, "forge", LONG)
            assert other is not None
            assert (claim.kernel, other.kernel) == (first, second)
            validated = await http.claim_next_blueprint("forge", LONG)
            assert validated is not None
            assert len(transport.lost) == 3

    asyncio.run(life())
