"""Leases of kernels and blueprints: one worker each, whatever happens in which order."""

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from esper.contracts.enums import BlueprintState
from esper.errors import (
    BadInput,
    BlueprintNotFound,
    Conflict,
    ConflictReason,
    KernelError,
    KernelNotFound,
)
from esper.services.contracts import MAX_LEASE_SECONDS
from esper.services.urza.leases import MAX_ATTEMPTS
from esper.services.urza.store import MAX_ERROR_CHARACTERS, artifact_key
from esper.utils.object_store import FolderStore
from tests.unit.esper.services.urza.hubs import (
    DATA,
    DIGEST,
    DOCUMENT,
    OTHER,
    UNKNOWN,
    Clock,
    described,
    opened,
    requested,
    target,
)

TOKEN = "0" * 32


@asynccontextmanager
async def refused(reason=ConflictReason.LEASE_LOST):
    with pytest.raises(Conflict) as caught:
        yield
    assert caught.value.reason is reason


def test_kernels_are_leased_the_oldest_first(place):
    async def life() -> None:
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            assert await hub.claim_next_kernel("one", 60) is None
            first, second = await requested(hub), await requested(hub, OTHER, 5)
            one = await hub.claim_next_kernel("one", 60)
            two = await hub.claim_next_kernel("two", 60)
            assert one is not None
            assert two is not None
            assert (one.kernel, two.kernel) == (first, second)
            assert (one.blueprint, one.target) == (DOCUMENT, target())
            assert (two.blueprint, two.target) == (OTHER, target(5))
            assert one.lease != two.lease
            assert one.expires_at == clock.now + timedelta(seconds=60)
            assert await hub.claim_next_kernel("three", 60) is None
            assert (await hub.kernel(first)).state is BlueprintState.COMPILING
            assert (await hub.blueprint(DOCUMENT.digest)).state is BlueprintState.PROPOSED

    asyncio.run(life())


def test_one_kernel_can_be_leased_by_its_name(place):
    async def life() -> None:
        async with opened(place) as hub:
            await requested(hub)
            kernel = await requested(hub, inputs=5)
            claim = await hub.lease_kernel(kernel, "one", 60)
            assert claim is not None
            assert claim.kernel == kernel
            assert await hub.lease_kernel(kernel, "one", 60) is None
            await hub.complete_kernel(described(kernel), DATA, token=claim.lease)
            assert await hub.lease_kernel(kernel, "two", 60) is None
            with pytest.raises(KernelNotFound, match="does not know it"):
                await hub.lease_kernel(UNKNOWN, "one", 60)

    asyncio.run(life())


def test_a_lease_that_ran_out_goes_to_another_and_its_result_is_refused(place):
    async def life() -> None:
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            kernel = await requested(hub)
            late = await hub.claim_next_kernel("late", 60)
            assert late is not None
            clock.advance(60)
            assert await hub.claim_next_kernel("next", 60) is None
            clock.advance(0.001)
            claim = await hub.claim_next_kernel("next", 60)
            assert claim is not None
            assert claim.kernel == kernel
            async with refused():
                await hub.heartbeat_kernel(kernel, late.lease, 60)
            async with refused():
                await hub.check_lease(kernel, late.lease)
            async with refused():
                await hub.complete_kernel(described(kernel), DATA, token=late.lease)
            assert not place.artifacts.exists()
            async with refused():
                await hub.fail_kernel(kernel, "why", token=late.lease)
            await hub.release_kernel(kernel, "late", token=late.lease)
            assert (await hub.check_lease(kernel, claim.lease)).kernel == kernel
            done = await hub.complete_kernel(described(kernel), DATA, token=claim.lease)
            assert done.state is BlueprintState.CHARACTERIZED
            async with refused():
                await hub.complete_kernel(described(kernel), DATA, token=late.lease)
            async with refused():
                await hub.fail_kernel(kernel, "why", token=late.lease)
            assert await hub.kernel(kernel) == done

    asyncio.run(life())


def test_work_is_not_lost_to_a_lease_that_ran_out_and_that_nobody_took(place):
    async def life() -> None:
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            kernel = await requested(hub)
            claim = await hub.claim_next_kernel("one", 1)
            assert claim is not None
            clock.advance(3600)
            again = await hub.heartbeat_kernel(kernel, claim.lease, 10)
            assert again == clock.now + timedelta(seconds=10)
            assert await hub.claim_next_kernel("two", 60) is None
            clock.advance(3600)
            done = await hub.complete_kernel(described(kernel), DATA, token=claim.lease)
            assert done.state is BlueprintState.CHARACTERIZED

    asyncio.run(life())


def test_heartbeats_keep_a_lease_and_leave_the_version(place):
    async def life() -> None:
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            kernel = await requested(hub)
            claim = await hub.claim_next_kernel("one", 10)
            assert claim is not None
            before = await hub.read_kernel(kernel)
            for _ in range(5):
                clock.advance(9)
                await hub.heartbeat_kernel(kernel, claim.lease, 10)
                assert await hub.claim_next_kernel("two", 10) is None
            assert await hub.read_kernel(kernel) == before
            await hub.complete_kernel(described(kernel), DATA, token=claim.lease)
            async with refused():
                await hub.heartbeat_kernel(kernel, claim.lease, 10)

    asyncio.run(life())


@pytest.mark.parametrize("outcome", ["complete", "fail"])
def test_a_result_whose_answer_was_lost_can_be_sent_again(place, outcome):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            claim = await hub.claim_next_kernel("one", 60)
            assert claim is not None

            async def send():
                if outcome == "complete":
                    return await hub.complete_kernel(described(kernel), DATA, token=claim.lease)
                return await hub.fail_kernel(kernel, "why", token=claim.lease)

            first = await send()
            assert await send() == first
            assert await hub.check_lease(kernel, claim.lease) == first
            # A second, other result under the same lease changes nothing.
            assert await hub.fail_kernel(kernel, "other", token=claim.lease) == first
            assert await hub.complete_kernel(described(kernel), DATA, token=claim.lease) == first
            version = (await hub.read_kernel(kernel)).version
            await send()
            assert (await hub.read_kernel(kernel)).version == version

    asyncio.run(life())


def test_a_lease_is_given_up_by_its_owner_only(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            claim = await hub.claim_next_kernel("one", 60)
            assert claim is not None
            await hub.release_kernel(kernel, "one")
            await hub.release_kernel(kernel, "one", token=TOKEN)
            await hub.release_kernel(kernel, "two", token=claim.lease)
            assert await hub.claim_next_kernel("two", 60) is None
            await hub.release_kernel(kernel, "one", token=claim.lease)
            again = await hub.claim_next_kernel("two", 60)
            assert again is not None
            async with refused():
                await hub.fail_kernel(kernel, "why", token=claim.lease)

    asyncio.run(life())


def test_the_worker_in_the_hub_and_those_over_the_wire_keep_apart(place):
    async def life() -> None:
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            kernel = await requested(hub)
            assert await hub.claim_kernel(kernel, "inside")
            clock.advance(10 * MAX_LEASE_SECONDS)
            assert await hub.claim_next_kernel("outside", 60) is None
            await hub.release_kernel(kernel, "inside")
            claim = await hub.claim_next_kernel("inside", 60)
            assert claim is not None
            assert not await hub.claim_kernel(kernel, "inside")
            for result in (
                hub.complete_kernel(described(kernel), DATA),
                hub.fail_kernel(kernel, "why"),
            ):
                async with refused():
                    await result
            clock.advance(61)
            assert await hub.claim_kernel(kernel, "inside")
            async with refused():
                await hub.complete_kernel(described(kernel), DATA, token=claim.lease)
            done = await hub.complete_kernel(described(kernel), DATA)
            assert done.state is BlueprintState.CHARACTERIZED

    asyncio.run(life())


def test_an_uploaded_artifact_is_taken_up(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            claim = await hub.claim_next_kernel("one", 60)
            assert claim is not None
            with pytest.raises(KernelError, match="upload it first"):
                await hub.complete_uploaded_kernel(described(kernel), token=claim.lease)
            await FolderStore(place.artifacts).put(artifact_key(DIGEST), DATA)
            async with refused():
                await hub.complete_uploaded_kernel(described(kernel), token=TOKEN)
            with pytest.raises(KernelError, match="allowed: " + DOCUMENT.digest):
                await hub.complete_uploaded_kernel(
                    described(kernel, blueprint_digest=OTHER.digest), token=claim.lease
                )
            done = await hub.complete_uploaded_kernel(described(kernel), token=claim.lease)
            assert done.state is BlueprintState.CHARACTERIZED
            again = await hub.complete_uploaded_kernel(described(kernel), token=claim.lease)
            assert again == done
            assert await hub.artifact(kernel) == DATA

    asyncio.run(life())


@pytest.mark.parametrize("seconds", [0, -1, MAX_LEASE_SECONDS + 1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "call",
    [
        lambda hub, seconds: hub.claim_next_kernel("one", seconds),
        lambda hub, seconds: hub.lease_kernel(UNKNOWN, "one", seconds),
        lambda hub, seconds: hub.heartbeat_kernel(UNKNOWN, TOKEN, seconds),
        lambda hub, seconds: hub.claim_next_blueprint("one", seconds),
        lambda hub, seconds: hub.heartbeat_blueprint(DIGEST, TOKEN, seconds),
    ],
)
def test_a_lease_has_bounds(sqlite_place, seconds, call):
    async def life() -> None:
        async with opened(sqlite_place) as hub:
            with pytest.raises(BadInput, match=r"lease seconds: got .* allowed: more than 0"):
                await call(hub, seconds)

    asyncio.run(life())


@pytest.mark.parametrize("worker", ["", "x" * 254])
def test_a_worker_has_a_name(place, worker):
    async def life() -> None:
        async with opened(place) as hub:
            await requested(hub)
            for claim in (hub.claim_next_kernel(worker, 60), hub.claim_next_blueprint(worker, 60)):
                with pytest.raises(BadInput, match="worker: got"):
                    await claim

    asyncio.run(life())


def test_what_is_not_there_can_not_be_kept_on_lease(place):
    async def life() -> None:
        async with opened(place) as hub:
            for call in (
                hub.heartbeat_kernel(UNKNOWN, TOKEN, 1),
                hub.check_lease(UNKNOWN, TOKEN),
                hub.fail_kernel(UNKNOWN, "why", token=TOKEN),
                hub.complete_uploaded_kernel(described(UNKNOWN), token=TOKEN),
            ):
                with pytest.raises(KernelNotFound):
                    await call
            for call in (
                hub.heartbeat_blueprint(DIGEST, TOKEN, 1),
                hub.complete_blueprint(DIGEST, TOKEN),
                hub.fail_blueprint(DIGEST, TOKEN, "why"),
            ):
                with pytest.raises(BlueprintNotFound):
                    await call
            await hub.release_kernel(UNKNOWN, "one", token=TOKEN)
            await hub.release_blueprint(DIGEST, "one", token=TOKEN)

    asyncio.run(life())


@pytest.mark.parametrize("error", [None, "it changes its host at birth"])
def test_a_blueprint_is_validated_under_a_lease(place, error):
    async def life() -> None:
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            assert await hub.claim_next_blueprint("one", 60) is None
            await hub.put_blueprint(DOCUMENT)
            lost = await hub.claim_next_blueprint("one", 60)
            assert lost is not None
            assert (lost.digest, lost.document) == (DOCUMENT.digest, DOCUMENT)
            assert (await hub.blueprint(lost.digest)).state is BlueprintState.VALIDATING
            assert await hub.claim_next_blueprint("two", 60) is None
            clock.advance(30)
            await hub.heartbeat_blueprint(lost.digest, lost.lease, 60)
            clock.advance(59)
            assert await hub.claim_next_blueprint("two", 60) is None
            clock.advance(2)
            claim = await hub.claim_next_blueprint("two", 60)
            assert claim is not None
            for call in (
                hub.heartbeat_blueprint(lost.digest, lost.lease, 1),
                hub.complete_blueprint(lost.digest, lost.lease),
                hub.fail_blueprint(lost.digest, lost.lease, "why"),
            ):
                async with refused():
                    await call
            await hub.release_blueprint(lost.digest, "one", token=lost.lease)

            async def send():
                if error is None:
                    return await hub.complete_blueprint(claim.digest, claim.lease)
                return await hub.fail_blueprint(claim.digest, claim.lease, error)

            done = await send()
            state = BlueprintState.FAILED if error else BlueprintState.CHARACTERIZED
            assert (done.state, done.error) == (state, error)
            assert await send() == done
            assert await hub.claim_next_blueprint("three", 60) is None

    asyncio.run(life())


def test_a_blueprint_can_be_given_back(place):
    async def life() -> None:
        async with opened(place) as hub:
            await hub.put_blueprint(DOCUMENT)
            claim = await hub.claim_next_blueprint("one", 60)
            assert claim is not None
            await hub.release_blueprint(claim.digest, "one", token=TOKEN)
            assert await hub.claim_next_blueprint("two", 60) is None
            await hub.release_blueprint(claim.digest, "one", token=claim.lease)
            assert (await hub.blueprint(claim.digest)).state is BlueprintState.PROPOSED
            again = await hub.claim_next_blueprint("two", 60)
            assert again is not None
            failed = await hub.fail_blueprint(again.digest, again.lease, "x" * 5000)
            assert failed.error is not None
            assert len(failed.error) == MAX_ERROR_CHARACTERS

    asyncio.run(life())


def test_a_kernel_that_compiles_clears_its_blueprint_but_not_one_being_validated(place):
    async def life() -> None:
        async with opened(place) as hub:
            first, second = await requested(hub), await requested(hub, inputs=5)
            claim = await hub.claim_next_blueprint("one", 60)
            assert claim is not None
            await hub.claim_next_kernel("two", 60)
            await hub.fail_kernel(second, "not this target")
            assert (await hub.blueprint(claim.digest)).state is BlueprintState.VALIDATING
            await hub.fail_blueprint(claim.digest, claim.lease, "why")
            leased = await hub.read_kernel(first)
            assert leased.item.state is BlueprintState.COMPILING
            await hub.release_kernel(first, "two")
            async with refused():
                await hub.complete_kernel(described(first), DATA)

    asyncio.run(life())


def test_what_becomes_of_a_kernel_says_nothing_of_its_blueprint(place):
    async def life() -> None:
        async with opened(place) as hub:
            first, second, third = [await requested(hub, inputs=n) for n in (1, 2, 3)]
            await hub.fail_kernel(first, "this target is too small")
            await hub.complete_kernel(described(second), DATA)
            await hub.lease_kernel(third, "one", 60)
            await hub.delete_kernel(third)
            assert (await hub.blueprint(DOCUMENT.digest)).state is BlueprintState.PROPOSED
            claim = await hub.claim_next_blueprint("one", 60)
            assert claim is not None
            assert (await hub.fail_blueprint(claim.digest, claim.lease, "why")).error == "why"
            await hub.complete_kernel(described(await requested(hub, inputs=3)), DATA)
            now = await hub.blueprint(claim.digest)
            assert (now.state, now.error) == (BlueprintState.FAILED, "why")

    asyncio.run(life())


def test_kernels_of_an_archived_blueprint_are_no_work_until_it_is_wanted_again(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            await hub.archive_blueprint(DOCUMENT.digest)
            assert await hub.claim_next_kernel("one", 60) is None
            assert await hub.lease_kernel(kernel, "one", 60) is None
            await hub.request_kernel(DOCUMENT.digest, target())
            assert (await hub.blueprint(DOCUMENT.digest)).state is BlueprintState.PROPOSED
            assert await hub.claim_next_kernel("one", 60) is not None

    asyncio.run(life())


def test_a_claim_whose_answer_was_lost_is_found_again(place):
    async def life() -> None:
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            first, second = await requested(hub), await requested(hub, OTHER, 5)
            claim = await hub.claim_next_kernel("one", 60, token=TOKEN)
            assert claim is not None
            clock.advance(30)
            again = await hub.claim_next_kernel("one", 60, token=TOKEN)
            assert again is not None
            assert (again.kernel, again.lease, claim.lease) == (first, TOKEN, TOKEN)
            assert again.expires_at == claim.expires_at + timedelta(seconds=30)
            assert await hub.lease_kernel(first, "one", 60, token=TOKEN) == again
            assert await hub.lease_kernel(first, "two", 60, token=TOKEN) is None
            other = await hub.lease_kernel(second, "one", 60, token=TOKEN[::-1])
            assert other is not None
            one = await hub.claim_next_blueprint("one", 60, token=TOKEN)
            assert one == await hub.claim_next_blueprint("one", 60, token=TOKEN)

    asyncio.run(life())


def test_work_that_ends_every_worker_is_given_up_and_holds_up_nothing_else(place):
    async def life() -> None:
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            bad = await requested(hub)
            good = await requested(hub, inputs=5)
            assert (await leased(hub)).kernel == bad
            clock.advance(61)
            second = await leased(hub)
            assert second.kernel == good
            await hub.complete_kernel(described(good), DATA, token=second.lease)
            for _ in range(MAX_ATTEMPTS - 1):
                claim = await leased(hub)
                assert claim.kernel == bad
                clock.advance(61)
            assert await hub.claim_next_kernel("one", 60) is None
            given_up = await hub.kernel(bad)
            assert given_up.state is BlueprintState.FAILED
            assert given_up.error is not None
            assert given_up.error.startswith(f"given up: {MAX_ATTEMPTS} workers")
            async with refused():
                await hub.complete_kernel(described(bad), DATA, token=claim.lease)

    asyncio.run(life())


def test_what_is_given_back_counts_only_where_the_work_itself_is_to_blame(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            for _ in range(MAX_ATTEMPTS + 1):
                claim = await leased(hub)
                await hub.release_kernel(kernel, "one", token=claim.lease)
            for _ in range(MAX_ATTEMPTS):
                assert (await hub.kernel(kernel)).state is BlueprintState.PROPOSED
                claim = await leased(hub)
                await hub.release_kernel(kernel, "one", token=claim.lease, blamed=True)
            assert (await hub.kernel(kernel)).state is BlueprintState.FAILED

    asyncio.run(life())


def test_what_the_hubs_own_process_gives_back_takes_no_attempt_back(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            for _ in range(3):
                assert await hub.claim_kernel(kernel, "inside")
                await hub.release_kernel(kernel, "inside")
            for _ in range(MAX_ATTEMPTS):
                claim = await leased(hub)
                await hub.release_kernel(kernel, "one", token=claim.lease, blamed=True)
            assert (await hub.kernel(kernel)).state is BlueprintState.FAILED

    asyncio.run(life())


async def leased(hub, worker="one"):
    claim = await hub.claim_next_kernel(worker, 60)
    assert claim is not None
    return claim


@pytest.mark.parametrize("workers", [8])
def test_many_workers_over_two_hubs_never_share_a_kernel(place, workers):
    async def life() -> None:
        async with opened(place) as here, opened(place) as there:
            kernels = {await requested(here, inputs=n) for n in range(1, 25)}
            claimed: list[str] = []

            async def work(number: int) -> None:
                hub = (here, there)[number % 2]
                while (claim := await hub.claim_next_kernel(f"worker-{number}", 60)) is not None:
                    claimed.append(claim.kernel)
                    await asyncio.sleep(0)
                    metadata = described(claim.kernel)
                    await hub.complete_kernel(metadata, DATA, token=claim.lease)

            # On Postgres a worker may find all that is left locked by others and go home early.
            while len(claimed) < len(kernels):
                await asyncio.gather(*(work(number) for number in range(workers)))
            assert len(claimed) == len(set(claimed))
            assert set(claimed) == kernels

    asyncio.run(life())
