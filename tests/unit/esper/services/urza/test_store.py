"""The hub over real databases and real folders."""

import asyncio

import pytest

from esper.contracts.assets import Seed, TrainingSession
from esper.contracts.blueprints import kernel_id
from esper.contracts.enums import BlueprintState, SeedState, SessionOutcome
from esper.errors import BadInput, BlueprintError, KernelError, NotFound, StoreUnavailable
from esper.services.urza.store import MAX_ERROR_CHARACTERS, artifact_key
from esper.utils.object_store import FolderStore
from tests.unit.esper.services.urza.hubs import (
    DATA,
    DIGEST,
    DOCUMENT,
    OTHER,
    UNKNOWN,
    described,
    opened,
    requested,
    target,
)


def test_a_blueprint_is_put_once(place):
    async def life() -> None:
        async with opened(place) as hub:
            first = await hub.put_blueprint(DOCUMENT)
            again = await hub.put_blueprint(DOCUMENT)
            renamed = await hub.put_blueprint(DOCUMENT.model_copy(update={"name": "another"}))
            assert first == again == renamed == await hub.blueprint(DOCUMENT.digest)
            assert first.document == DOCUMENT
            assert first.state is BlueprintState.PROPOSED
            other = await hub.put_blueprint(OTHER)
            assert await hub.blueprints() == (first, other)

    asyncio.run(life())


def test_blueprints_put_at_the_same_time_are_one(place):
    async def life() -> None:
        async with opened(place) as hub:
            came = await asyncio.gather(*(hub.put_blueprint(DOCUMENT) for _ in range(10)))
            assert len({blueprint.id for blueprint in came}) == 1
            assert len(await hub.blueprints()) == 1

    asyncio.run(life())


def test_a_kernel_is_requested_once(place):
    async def life() -> None:
        async with opened(place) as hub:
            await hub.put_blueprint(DOCUMENT)
            first = await hub.request_kernel(DOCUMENT.digest, target())
            assert await hub.request_kernel(DOCUMENT.digest, target()) == first
            assert first.kernel == kernel_id(DOCUMENT.digest, target())
            assert (first.blueprint, first.target) == (DOCUMENT.name, target())
            assert first.state is BlueprintState.PROPOSED
            second = await hub.request_kernel(DOCUMENT.digest, target(5))
            assert await hub.kernels() == (first, second)
            assert await hub.kernels([BlueprintState.FAILED]) == ()

    asyncio.run(life())


@pytest.mark.parametrize("workers", [2, 16])
def test_concurrent_claims_have_one_winner(place, workers):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            won = await asyncio.gather(
                *(hub.claim_kernel(kernel, f"worker-{n}") for n in range(workers))
            )
            assert won.count(True) == 1
            assert (await hub.kernel(kernel)).state is BlueprintState.COMPILING

    asyncio.run(life())


def test_claims_from_two_hubs_of_one_file_have_one_winner(place):
    async def life() -> None:
        async with opened(place) as here, opened(place) as there:
            for inputs in range(1, 11):
                kernel = await requested(here, inputs=inputs)
                won = await asyncio.gather(
                    here.claim_kernel(kernel, "here"), there.claim_kernel(kernel, "there")
                )
                assert won.count(True) == 1

    asyncio.run(life())


def test_a_worker_finds_its_own_claim_again(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            assert await hub.claim_kernel(kernel, "one")
        async with opened(place) as hub:
            assert not await hub.claim_kernel(kernel, "two")
            assert await hub.claim_kernel(kernel, "one")

    asyncio.run(life())


def test_a_claim_is_given_up_by_its_owner_only(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            assert await hub.claim_kernel(kernel, "one")
            await hub.release_kernel(kernel, "two")
            assert not await hub.claim_kernel(kernel, "two")
            await hub.release_kernel(kernel, "one")
            assert (await hub.kernel(kernel)).state is BlueprintState.PROPOSED
            assert await hub.claim_kernel(kernel, "two")
            await hub.complete_kernel(described(kernel), DATA)
            await hub.release_kernel(kernel, "two")
            assert (await hub.kernel(kernel)).state is BlueprintState.CHARACTERIZED

    asyncio.run(life())


def test_a_completed_kernel_is_there_for_good(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            await hub.claim_kernel(kernel, "one")
            done = await hub.complete_kernel(described(kernel), DATA)
            assert done.state is BlueprintState.CHARACTERIZED
            assert (done.artifact_digest, done.artifact_bytes) == (DIGEST, len(DATA))
            assert await hub.complete_kernel(described(kernel), DATA) == done
            assert await hub.fail_kernel(kernel, "too late") == done
            assert not await hub.claim_kernel(kernel, "one")
        async with opened(place) as hub:
            assert await hub.request_kernel(DOCUMENT.digest, target()) == done
            assert await hub.metadata(kernel) == described(kernel)
            assert await hub.artifact(kernel) == DATA

    asyncio.run(life())


def test_a_kernel_without_figures_is_complete(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            await hub.complete_kernel(described(kernel, figures=None), DATA)
            assert await hub.metadata(kernel) == described(kernel, figures=None)

    asyncio.run(life())


def test_a_failed_kernel_keeps_its_reason(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            await hub.claim_kernel(kernel, "one")
            failed = await hub.fail_kernel(kernel, "the shapes do not fit")
            assert (failed.state, failed.error) == (BlueprintState.FAILED, "the shapes do not fit")
            assert await hub.fail_kernel(kernel, "another") == failed
            assert await hub.complete_kernel(described(kernel), DATA) == failed
            assert await hub.request_kernel(DOCUMENT.digest, target()) == failed
            assert not await hub.claim_kernel(kernel, "one")
            for read in (hub.metadata, hub.artifact):
                with pytest.raises(KernelError, match="the shapes do not fit"):
                    await read(kernel)

    asyncio.run(life())


@pytest.mark.parametrize(("error", "kept"), [("", 1), ("x" * 5000, MAX_ERROR_CHARACTERS)])
def test_a_reason_is_never_empty_nor_endless(place, error, kept):
    async def life() -> None:
        async with opened(place) as hub:
            failed = await hub.fail_kernel(await requested(hub), error)
            assert failed.error is not None
            assert kept <= len(failed.error) <= MAX_ERROR_CHARACTERS

    asyncio.run(life())


@pytest.mark.parametrize(
    "wrong",
    [{"artifact_digest": "0" * 64}, {"artifact_bytes": 1}, {"blueprint_digest": OTHER.digest}],
)
def test_an_artifact_that_is_not_as_described_is_refused(place, wrong):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            with pytest.raises(KernelError, match=r"got .*; allowed: "):
                await hub.complete_kernel(described(kernel, **wrong), DATA)
            assert (await hub.kernel(kernel)).state is BlueprintState.PROPOSED
        assert not place.artifacts.exists()

    asyncio.run(life())


@pytest.mark.parametrize("data", [b"", DATA[:-1], DATA + b"!", DATA.swapcase()])
def test_a_changed_artifact_is_refused(place, data):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            await hub.complete_kernel(described(kernel), DATA)
            (place.artifacts / artifact_key(DIGEST)).write_bytes(data)
            with pytest.raises(KernelError, match=f"allowed: {DIGEST}"):
                await hub.artifact(kernel)

    asyncio.run(life())


def test_a_lost_artifact_is_named(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            await hub.complete_kernel(described(kernel), DATA)
            (place.artifacts / artifact_key(DIGEST)).unlink()
            with pytest.raises(KernelError, match=f"{DIGEST} is not in the store"):
                await hub.artifact(kernel)

    asyncio.run(life())


def test_bytes_stored_before_a_crash_are_taken_up_again(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            await FolderStore(place.artifacts).put(artifact_key(DIGEST), DATA)
            done = await hub.complete_kernel(described(kernel), DATA)
            assert done.state is BlueprintState.CHARACTERIZED
            assert await hub.artifact(kernel) == DATA

    asyncio.run(life())


def test_a_store_that_fails_leaves_the_kernel_open(place):
    place.artifacts.write_bytes(b"a file where a folder should be")

    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            with pytest.raises(StoreUnavailable):
                await hub.complete_kernel(described(kernel), DATA)
            assert (await hub.kernel(kernel)).state is BlueprintState.PROPOSED

    asyncio.run(life())


def test_a_deleted_blueprint_takes_its_kernels_and_artifacts_along(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel, other = await requested(hub), await requested(hub, OTHER)
            await requested(hub, inputs=5)
            await hub.complete_kernel(described(kernel), DATA)
            assert await hub.delete_blueprint(DOCUMENT.digest)
            assert not await hub.delete_blueprint(DOCUMENT.digest)
            assert [k.kernel for k in await hub.kernels()] == [other]
            with pytest.raises(KernelError):
                await hub.metadata(kernel)
        assert not (place.artifacts / artifact_key(DIGEST)).exists()

    asyncio.run(life())


@pytest.mark.parametrize(
    "call",
    [
        lambda hub: hub.kernel(UNKNOWN),
        lambda hub: hub.claim_kernel(UNKNOWN, "one"),
        lambda hub: hub.complete_kernel(described(UNKNOWN), DATA),
        lambda hub: hub.fail_kernel(UNKNOWN, "why"),
        lambda hub: hub.metadata(UNKNOWN),
        lambda hub: hub.artifact(UNKNOWN),
        lambda hub: hub.metadata("../../etc/passwd"),
        lambda hub: hub.kernel("x' OR '1'='1"),
    ],
)
def test_a_kernel_that_nobody_asked_for_is_an_error(place, call):
    async def life() -> None:
        async with opened(place) as hub:
            await requested(hub)
            with pytest.raises(KernelError, match="does not know it"):
                await call(hub)

    asyncio.run(life())


def test_a_blueprint_that_is_not_there_is_an_error(place):
    async def life() -> None:
        async with opened(place) as hub:
            for call in (hub.blueprint("0" * 64), hub.request_kernel("0" * 64, target())):
                with pytest.raises(BlueprintError, match="blueprint digest: got 000"):
                    await call

    asyncio.run(life())


def test_a_session_is_registered_once_and_updated(place):
    session = TrainingSession(name="s", epochs=10, num_layers=2, num_slots=1)
    seed = Seed(
        seed_id=(1, 0), layer="fc2", state=SeedState.TRAINING, blueprint="noop", kernel=UNKNOWN
    )

    async def life() -> None:
        async with opened(place) as hub:
            made = await hub.register_session(session)
            assert made.changed(updated_at=session.updated_at) == session.changed(
                created_at=made.created_at, updated_at=session.updated_at
            )
            later = made.changed(epoch=3, seeds=(seed,))
            later = later.changed(updated_at=(await hub.update_session(later)).updated_at)
            assert (await hub.read_session(later.uid)).item == later
        async with opened(place) as hub:
            again = TrainingSession(name="s", epochs=10, num_layers=2, num_slots=1)
            assert await hub.register_session(again) == later
            done = later.changed(outcome=SessionOutcome.SUCCEEDED, epoch=10)
            await hub.update_session(done)
            (stored,) = (await hub.list_sessions()).items
            ended = stored.item
            told = {"ended_at": ended.ended_at, "updated_at": ended.updated_at}
            assert ended == done.model_copy(update=told)
            with pytest.raises(BadInput, match=r"session\.id"):
                await hub.update_session(again)
            with pytest.raises(BadInput, match=r"session\.name: got t; allowed: s"):
                await hub.update_session(later.changed(name="t"))
            unknown = TrainingSession(name="t", epochs=10, num_layers=2, num_slots=1)
            with pytest.raises(NotFound, match=f"session uid: got {unknown.uid}"):
                await hub.update_session(unknown)

    asyncio.run(life())


def test_the_hub_says_whether_it_answers(place):
    async def life() -> bool:
        async with opened(place) as hub:
            return await hub.health()

    assert asyncio.run(life())
