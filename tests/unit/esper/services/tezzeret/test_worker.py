"""The forge's worker: a real bus, a real hub on disk, the real compiler."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from esper.configs import DatabaseConfig, StorageConfig
from esper.contracts.blueprints import (
    BlueprintDocument,
    KernelTarget,
    LayerGeometry,
    builtin,
    kernel_id,
)
from esper.contracts.enums import BlueprintState, ComponentType
from esper.contracts.messages import KernelReady, KernelRequested, OonaMessage, TopicNames
from esper.errors import BusUnavailable
from esper.execution.artifact import unpack
from esper.services.oona_client import InProcessOona, Subscription
from esper.services.tezzeret.main import TezzeretService
from esper.services.tezzeret.worker import CONSUMER_GROUP, TezzeretWorker
from esper.services.urza.client import UrzaClient, in_process_urza

LOW_RANK = builtin("low-rank", {"rank": 2})
# It answers every input with something other than 0, so it would change its host at birth.
LOUD = BlueprintDocument.model_validate(
    {
        "name": "loud",
        "hosts": ["Linear"],
        "graph": {
            "nodes": [
                {"op": "input", "id": "x"},
                {"op": "linear", "id": "y", "input": "x", "features": "out"},
            ],
            "output": "y",
        },
    }
)


def target(inputs: int = 6) -> KernelTarget:
    layer = LayerGeometry(kind="Linear", inputs=inputs, outputs=4)
    return KernelTarget(layer=layer, input_shape=(inputs,), output_shape=(4,))


def request(
    document: BlueprintDocument = LOW_RANK, inputs: int = 6, **fields: object
) -> KernelRequested:
    return KernelRequested.model_validate(
        {
            "session": "s",
            "kernel": kernel_id(document.digest, target(inputs)),
            "blueprint": document.name,
            "blueprint_digest": document.digest,
            "target": target(inputs),
            **fields,
        }
    )


def carrying(payload: KernelRequested) -> OonaMessage:
    return OonaMessage.carrying(TopicNames.KERNEL_REQUESTED, payload, ComponentType.TOLARIA)


@asynccontextmanager
async def hub_in(folder: Path) -> AsyncIterator[UrzaClient]:
    settings = DatabaseConfig(url=f"sqlite+aiosqlite:///{folder}/urza.sqlite")
    async with in_process_urza(settings, StorageConfig(folder=str(folder / "artifacts"))) as hub:
        for document in (LOW_RANK, LOUD):
            await hub.put_blueprint(document)
        yield hub


@asynccontextmanager
async def forge_in(folder: Path) -> AsyncIterator[tuple[InProcessOona, UrzaClient, Subscription]]:
    """A bus and a hub with a service between them, and a trainer's place for its answers."""
    bus = InProcessOona()
    answers = await bus.subscribe({TopicNames.KERNEL_READY}, "tolaria")
    async with hub_in(folder) as hub:
        service = TezzeretService(bus, hub)
        await service.start()
        try:
            yield bus, hub, answers
        finally:
            await service.stop()


async def answer(answers: Subscription) -> KernelReady:
    message = await asyncio.wait_for(answers.receive(), timeout=120)
    await answers.acknowledge(message)
    return KernelReady.model_validate(message.payload)


def test_a_request_is_compiled_stored_and_answered(tmp_path):
    async def life() -> None:
        async with forge_in(tmp_path) as (bus, hub, answers):
            asked = carrying(request())
            await bus.publish(asked)
            came = await asyncio.wait_for(answers.receive(), timeout=120)
            assert (came.trace_id, came.sender) == (asked.trace_id, ComponentType.TEZZERET)
            ready = KernelReady.model_validate(came.payload)
            assert (ready.kernel, ready.blueprint) == (request().kernel, "low-rank")
            assert ready.error is None
            kernel = await hub.kernel(ready.kernel)
            assert kernel.state is BlueprintState.CHARACTERIZED
            data = await hub.artifact(ready.kernel)
            assert ready.artifact_digest == hashlib.sha256(data).hexdigest()
            assert unpack(data, ready.artifact_digest).manifest.kernel == ready.kernel
            assert (await hub.metadata(ready.kernel)).figures is not None

    asyncio.run(life())


def test_a_kernel_compiled_in_an_earlier_run_is_answered_at_once(tmp_path):
    async def life() -> None:
        async with forge_in(tmp_path) as (bus, hub, answers):
            await bus.publish(carrying(request()))
            first = await answer(answers)
            before = await hub.kernel(first.kernel)
        async with forge_in(tmp_path) as (bus, hub, answers):
            await bus.publish(carrying(request()))
            await bus.publish(carrying(request()))
            assert [await answer(answers), await answer(answers)] == [first, first]
            assert await hub.kernel(first.kernel) == before

    asyncio.run(life())


def test_two_forges_make_the_same_bytes(tmp_path):
    async def compiled(folder: Path) -> bytes:
        async with forge_in(folder) as (bus, hub, answers):
            await bus.publish(carrying(request()))
            return await hub.artifact((await answer(answers)).kernel)

    first = asyncio.run(compiled(tmp_path / "one"))
    assert first == asyncio.run(compiled(tmp_path / "two"))


@pytest.mark.parametrize("times", [1, 2])
def test_a_blueprint_that_fails_is_answered_with_the_reason(tmp_path, times):
    async def life() -> None:
        async with forge_in(tmp_path) as (bus, hub, answers):
            for _ in range(times):
                await bus.publish(carrying(request(LOUD)))
                ready = await answer(answers)
                assert ready.artifact_digest is None
                assert "at birth; allowed: exactly 0" in str(ready.error)
            kernel = await hub.kernel(request(LOUD).kernel)
            assert (kernel.state, kernel.error) == (BlueprintState.FAILED, ready.error)

    asyncio.run(life())


def test_a_failure_does_not_stop_the_next_request(tmp_path):
    async def life() -> None:
        async with forge_in(tmp_path) as (bus, _, answers):
            for document in (LOUD, LOW_RANK):
                await bus.publish(carrying(request(document)))
            assert (await answer(answers)).error is not None
            assert (await answer(answers)).error is None

    asyncio.run(life())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"blueprint_digest": "0" * 64}, "a blueprint that was put into the hub"),
        ({"kernel": "0" * 40}, "the identity of that blueprint for that target"),
    ],
)
def test_a_request_that_contradicts_itself_is_answered(tmp_path, wrong, reason):
    async def life() -> None:
        async with forge_in(tmp_path) as (bus, _, answers):
            await bus.publish(carrying(request(**wrong)))
            ready = await answer(answers)
            assert ready.kernel == request(**wrong).kernel
            assert reason in str(ready.error)

    asyncio.run(life())


def test_a_message_outside_the_contract_is_passed_over(tmp_path, caplog):
    async def life() -> None:
        async with forge_in(tmp_path) as (bus, _, answers):
            await bus.publish(carrying(request()).model_copy(update={"payload": {"kernel": 1}}))
            await bus.publish(carrying(request()))
            assert (await answer(answers)).error is None

    asyncio.run(life())
    assert "is not of the contract" in caplog.text


def test_a_claim_of_a_killed_worker_is_taken_up_again(tmp_path):
    async def life() -> None:
        async with hub_in(tmp_path) as hub:
            kernel = await hub.request_kernel(LOW_RANK.digest, target())
            assert await hub.claim_kernel(kernel.kernel, "tezzeret")
        async with forge_in(tmp_path) as (bus, _, answers):
            await bus.publish(carrying(request()))
            assert (await answer(answers)).error is None

    asyncio.run(life())


def test_a_kernel_that_another_worker_compiles_is_left_to_it(tmp_path):
    async def life() -> None:
        async with hub_in(tmp_path) as hub:
            worker = TezzeretWorker(InProcessOona(), hub, name="one")
            await hub.request_kernel(LOW_RANK.digest, target())
            assert await hub.claim_kernel(request().kernel, "another")
            assert await worker.answer(request()) is None
            await hub.release_kernel(request().kernel, "another")
            ready = await worker.answer(request())
            assert ready is not None
            assert ready.error is None

    asyncio.run(life())


def test_two_workers_share_the_requests_and_answer_each_once(tmp_path):
    async def life() -> None:
        bus = InProcessOona()
        answers = await bus.subscribe({TopicNames.KERNEL_READY}, "tolaria")
        async with hub_in(tmp_path) as hub:
            services = [TezzeretService(bus, hub, name=f"forge-{n}") for n in range(2)]
            for service in services:
                await service.start()
            requests = [request(inputs=inputs) for inputs in (5, 6, 7, 8)]
            for asked in requests:
                await bus.publish(carrying(asked))
            ready = [await answer(answers) for _ in requests]
            assert {r.kernel for r in ready} == {r.kernel for r in requests}
            assert {r.error for r in ready} == {None}
            for service in services:
                await service.stop()

    asyncio.run(life())


def test_a_store_without_an_answer_fails_the_request_and_not_the_kernel(tmp_path):
    (tmp_path / "artifacts").write_bytes(b"a file where a folder should be")

    async def life() -> None:
        async with forge_in(tmp_path) as (bus, hub, answers):
            await bus.publish(carrying(request()))
            assert "the store's folder can't be used" in str((await answer(answers)).error)
            assert (await hub.kernel(request().kernel)).state is BlueprintState.PROPOSED
            (tmp_path / "artifacts").unlink()
            await bus.publish(carrying(request()))
            assert (await answer(answers)).error is None

    asyncio.run(life())


def test_a_fault_that_nobody_foresaw_is_answered(tmp_path, caplog):
    async def life() -> KernelReady | None:
        async with hub_in(tmp_path) as hub:
            worker = TezzeretWorker(InProcessOona(), hub)
            broken = request().model_copy(update={"target": None})
            return await worker.answer(broken)

    ready = asyncio.run(life())
    assert ready is not None
    assert "AttributeError" in str(ready.error)
    assert request().kernel in caplog.text


def test_a_request_that_was_not_answered_goes_back_to_the_bus(tmp_path):
    async def life() -> None:
        bus = InProcessOona()
        answers = await bus.subscribe({TopicNames.KERNEL_READY}, "tolaria")
        async with hub_in(tmp_path) as hub:
            service = TezzeretService(bus, hub)
            await service.start()
            await bus.publish(carrying(request()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await service.stop()
            left = await bus.subscribe({TopicNames.KERNEL_REQUESTED}, CONSUMER_GROUP)
            assert (await left.receive()).payload["kernel"] == request().kernel
            await left.close()
            await service.start()
            assert (await answer(answers)).error is None
            await service.stop()

    asyncio.run(life())


def test_the_service_starts_and_stops_any_number_of_times(tmp_path):
    async def life() -> None:
        bus = InProcessOona()
        answers = await bus.subscribe({TopicNames.KERNEL_READY}, "tolaria")
        async with hub_in(tmp_path) as hub:
            service = TezzeretService(bus, hub)
            await service.stop()
            assert not service.running
            await service.start()
            await service.start()
            assert service.running
            await service.stop()
            await service.stop()
            assert not service.running
            await service.start()
            await bus.publish(carrying(request()))
            assert (await answer(answers)).error is None
            await service.stop()

    asyncio.run(life())


def test_the_service_ends_with_the_bus(tmp_path):
    async def life() -> None:
        bus = InProcessOona()
        async with hub_in(tmp_path) as hub:
            service = TezzeretService(bus, hub)
            await service.start()
            await asyncio.sleep(0)
            await bus.close()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not service.running
            await service.stop()
            with pytest.raises(BusUnavailable):
                await service.start()

    asyncio.run(life())
