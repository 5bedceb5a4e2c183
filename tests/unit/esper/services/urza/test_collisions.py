"""What happens when several clients change the same rows and artifacts at the same moment."""

import asyncio
import random
from contextlib import suppress

import pytest
from sqlalchemy import select

from esper.contracts.enums import BlueprintState
from esper.errors import BlueprintNotFound, Conflict, HubUnavailable, KernelError, KernelNotFound
from esper.services.urza import models
from esper.services.urza.database import Database
from esper.services.urza.store import artifact_key
from esper.services.urza.store_rows import ATTEMPTS, retried
from tests.unit.esper.services.urza.hubs import (
    DATA,
    DIGEST,
    DOCUMENT,
    OTHER,
    described,
    opened,
    requested,
    target,
)
from tests.unit.esper.services.urza.serving import trained


def test_clients_that_get_in_each_others_way_are_answered(place):
    """Nothing but what the calls themselves refuse: no deadlock, no row that has gone."""
    refusals = (BlueprintNotFound, KernelNotFound, Conflict)

    async def life() -> None:
        async with opened(place) as here, opened(place) as there:
            session = await here.register_session(trained())

            async def client(number: int) -> None:
                chance, hub = random.Random(number), (here, there)[number % 2]
                for _ in range(40):
                    document = chance.choice((DOCUMENT, OTHER))
                    calls = (
                        lambda one=document: hub.put_blueprint(one),
                        lambda one=document: hub.put_blueprint(one, session="uid-1"),
                        lambda one=document: hub.request_kernel(one.digest, target()),
                        lambda one=document: hub.delete_blueprint(one.digest),
                        lambda one=document: hub.archive_blueprint(one.digest),
                        lambda: hub.claim_next_kernel(f"worker-{number}", 60),
                    )
                    with suppress(*refusals):
                        await chance.choice(calls)()
                    if chance.random() < 0.1:
                        await hub.update_session(trained(id=session.id))

            await asyncio.gather(*(client(number) for number in range(6)))

    asyncio.run(life())


def test_a_deadlock_that_postgres_breaks_is_no_fault_of_the_call(postgres_place):
    blueprints, kernels = models.Blueprint, models.CompiledKernel

    async def life() -> None:
        async with opened(postgres_place) as hub, Database(postgres_place.config()) as other:
            await requested(hub)
            async with other.transaction() as session:
                await session.execute(select(kernels.id).with_for_update())
                removal = asyncio.create_task(hub.delete_blueprint(DOCUMENT.digest))
                await asyncio.sleep(0.3)  # it has the blueprint now, and waits for the kernel
                await session.execute(select(blueprints.id).with_for_update())
            assert await removal

    asyncio.run(life())


def test_what_can_never_go_well_is_not_tried_for_ever():
    tries = []

    class Hub:
        @retried
        async def collides(self) -> None:
            tries.append(1)
            error = HubUnavailable("deadlock detected")
            error.__cause__ = RuntimeError()
            error.__cause__.sqlstate = "40P01"  # type: ignore[attr-defined]
            raise error

        @retried
        async def is_away(self) -> None:
            tries.append(1)
            raise HubUnavailable("no answer")

    for work, expected in ((Hub().collides, ATTEMPTS), (Hub().is_away, 1)):
        tries.clear()
        with pytest.raises(HubUnavailable):
            asyncio.run(work())
        assert len(tries) == expected


@pytest.mark.parametrize("uploaded", [False, True])
def test_an_artifact_is_not_removed_from_under_a_kernel_that_is_compiled_anew(place, uploaded):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            await hub.complete_kernel(described(kernel), DATA)
            deleting, go_on, delete = asyncio.Event(), asyncio.Event(), hub._store.delete

            async def delayed(key: str) -> bool:
                deleting.set()
                await go_on.wait()
                return await delete(key)

            hub._store.delete = delayed
            removal = asyncio.create_task(hub.delete_kernel(kernel))
            await deleting.wait()
            # The upload finds the bytes there, and so has nothing to write.
            assert not await hub._store.put(artifact_key(DIGEST), DATA)
            asyncio.get_running_loop().call_later(0.3, go_on.set)
            await requested(hub)
            if uploaded:
                with pytest.raises(KernelError, match="upload it first"):
                    await hub.complete_uploaded_kernel(described(kernel))
            else:
                done = await hub.complete_kernel(described(kernel), DATA)
                assert done.state is BlueprintState.CHARACTERIZED
                assert await hub.artifact(kernel) == DATA
            assert await removal

    asyncio.run(life())
