"""Tolaria's end of the bus and of the hub, while either is away."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from esper.configs import DatabaseConfig, StorageConfig
from esper.contracts.assets import TrainingSession
from esper.contracts.enums import ComponentType, DecisionAction, SeedState
from esper.contracts.messages import KernelReady, OonaMessage, TopicNames
from esper.contracts.operational import AdaptationDecision, SeedTransition, SystemStatePacket
from esper.errors import BusUnavailable, HubUnavailable, Interrupted, KernelError
from esper.execution.kernel_cache import KernelCache
from esper.services.oona_client import InProcessOona
from esper.services.tezzeret.main import TezzeretService
from esper.services.tolaria import patience as module
from esper.services.tolaria.boundary import BusController, HubKernels
from esper.services.tolaria.news import News
from esper.services.tolaria.patience import IN_PROCESS, Patience
from esper.services.urza.client import in_process_urza
from esper.utils.logging import tracing
from tests.unit.esper.services.tezzeret.test_worker import LOUD, LOW_RANK, target

UID = "uid-1"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)


def lasting(**rules):
    return Patience(lasting=True, ask_again_seconds=0.1, look_seconds=0.05, **rules)


class Flaky(InProcessOona):
    """A bus that takes nothing for so many times."""

    def __init__(self, away=0):
        super().__init__()
        self.away = away
        self.published = []

    async def publish(self, *messages):
        if self.away:
            self.away -= 1
            raise BusUnavailable("the bus is away")
        self.published += messages
        await super().publish(*messages)


def packet(sequence=1):
    return SystemStatePacket.model_validate(
        {
            "session": "small", "sequence": sequence, "epoch": 1, "epochs": 4,
            "train_loss": 1.0, "validation_loss": 1.0, "parameters_base": 10, "parameters": 10,
            "remaining_parameters": 10, "remaining_epochs": 3, "layers": [], "health": "healthy",
            "settings": {
                "policy": "none", "seed": 0, "interval_epochs": 1, "minimum_confidence": 0.5,
                "active_seeds": 1, "passes": 1, "dwell_epochs": 1, "age_epochs": 2,
                "ramp_epochs": 0, "hold_epochs": 0,
            },
        }
    )  # fmt: skip


async def answering(bus, after=1):
    """Answer a packet once it came for the n-th time."""
    packets = await bus.subscribe({TopicNames.PACKETS}, "tamiyo")
    came = []
    while True:
        message = await packets.receive()
        await packets.acknowledge(message)
        came.append(message)
        if len(came) >= after:
            asked = SystemStatePacket.model_validate(message.payload)
            decision = AdaptationDecision.make(asked, DecisionAction.WAIT, "answered")
            await bus.publish(
                OonaMessage.carrying(
                    TopicNames.DECISIONS, decision, ComponentType.TAMIYO, message.trace_id
                )
            )
            return came


def transition(epoch):
    return SeedTransition(
        session="small", epoch=epoch, layer="head", slot=0, cycle=0, previous=SeedState.DORMANT,
        current=SeedState.GERMINATED, reason="because",
    )  # fmt: skip


def test_a_packet_is_published_under_its_trace_and_scope():
    async def life():
        bus = Flaky()
        controller = await BusController.over(bus, scope=UID)
        tamiyo = asyncio.create_task(answering(bus))
        await asyncio.sleep(0)
        with tracing("trace-1"):
            assert (await controller.decide(packet())).reason == "answered"
        (asked,) = await tamiyo
        assert (asked.trace_id, asked.scope) == ("trace-1", UID)
        await controller.finish()

    asyncio.run(life())


def test_a_packet_is_sent_again_under_one_id_until_its_decision_comes():
    async def life():
        bus = Flaky(away=3)
        controller = await BusController.over(bus, scope=UID, patience=lasting())
        tamiyo = asyncio.create_task(answering(bus, after=3))
        await asyncio.sleep(0)
        decision = await asyncio.wait_for(controller.decide(packet()), timeout=60)
        assert decision.reason == "answered"
        assert len({message.id for message in await tamiyo}) == 1
        await controller.finish()

    asyncio.run(life())


def test_a_waited_out_decision_is_to_wait_and_says_so():
    async def life():
        controller = await BusController.over(Flaky(), patience=lasting(seconds=0.2))
        first = await controller.decide(packet())
        assert first.action is DecisionAction.WAIT
        assert first.reason.startswith("waited for a decision and got none: got nothing for 0.2 s")
        assert (await controller.decide(packet())).id == first.id  # as deterministic as any
        await controller.close()

    asyncio.run(life())


def test_a_decision_outside_the_contract_is_passed_over(caplog):
    async def life():
        bus = Flaky()
        controller = await BusController.over(bus, patience=lasting())
        tamiyo = asyncio.create_task(answering(bus, after=2))
        await asyncio.sleep(0)
        asked = asyncio.create_task(controller.decide(packet()))
        await asyncio.sleep(0.05)
        broken = OonaMessage.carrying(
            TopicNames.DECISIONS,
            AdaptationDecision.make(packet(), DecisionAction.WAIT, "x"),
            ComponentType.TAMIYO,
            bus.published[0].trace_id,
        ).model_copy(update={"payload": {"no": "decision"}})
        await bus.publish(broken)
        assert (await asyncio.wait_for(asked, timeout=60)).reason == "answered"
        await tamiyo
        await controller.close()

    asyncio.run(life())
    assert "is not of the contract" in caplog.text


def test_a_stop_is_heard_while_a_decision_is_waited_for():
    async def life():
        asked = []
        patience = lasting(stopping=lambda: bool(asked))
        controller = await BusController.over(Flaky(), patience=patience)
        deciding = asyncio.create_task(controller.decide(packet()))
        await asyncio.sleep(0.05)
        asked.append(True)
        with pytest.raises(Interrupted):
            await asyncio.wait_for(deciding, timeout=60)
        await controller.close()

    asyncio.run(life())


def test_a_closed_bus_in_this_process_ends_the_waiting():
    async def life():
        bus = InProcessOona()
        controller = await BusController.over(bus)
        deciding = asyncio.create_task(controller.decide(packet()))
        await asyncio.sleep(0.01)
        await bus.close()
        with pytest.raises(BusUnavailable):
            await asyncio.wait_for(deciding, timeout=60)
        with pytest.raises(BusUnavailable):
            await BusController.over(bus)

    asyncio.run(life())


@pytest.mark.parametrize("seconds", [None, 0.1])
def test_news_that_the_bus_does_not_take_come_later_and_in_order(seconds):
    async def life():
        bus = Flaky(away=40)
        controller = await BusController.over(bus, scope=UID, patience=lasting(seconds=seconds))
        news = [News(item=transition(n), number=n, trace_id=f"trace-{n}") for n in range(4)]
        await controller.tell(news[:2])
        if seconds is not None:
            assert bus.published == []  # patience ended; they are kept
            bus.away = 0
        await controller.tell(news[2:])
        await controller.finish()
        assert [m.id for m in bus.published] == [one.message_id(UID) for one in news]
        assert [m.open() for m in bus.published] == [one.item for one in news]
        assert {m.topic for m in bus.published} == {TopicNames.TRANSITIONS}
        assert [m.trace_id for m in bus.published] == [one.trace_id for one in news]

    asyncio.run(life())


@asynccontextmanager
async def hub_in(folder):
    settings = DatabaseConfig(url=f"sqlite+aiosqlite:///{folder}/urza.sqlite")
    async with in_process_urza(settings, StorageConfig(folder=str(folder / "artifacts"))) as hub:
        for document in (LOW_RANK, LOUD):
            await hub.put_blueprint(document)
        await hub.register_session(
            TrainingSession(name="small", uid=UID, epochs=4, num_layers=1, num_slots=1)
        )
        yield hub


class AwayHub:
    """A hub whose every method fails the first times."""

    def __init__(self, hub, times):
        self._hub, self.left = hub, times

    def __getattr__(self, name):
        method = getattr(self._hub, name)

        async def flaky(*arguments, **named):
            if self.left:
                self.left -= 1
                raise HubUnavailable("the hub is away")
            return await method(*arguments, **named)

        return flaky


async def kernels_over(bus, hub, patience):
    cache = KernelCache(hub, max_bytes=2**24)
    return await HubKernels.over("small", 7, bus, hub, cache, scope=UID, patience=patience)


def test_a_kernel_comes_through_faults_as_without_them(tmp_path):
    async def life():
        bus = InProcessOona()
        async with hub_in(tmp_path) as hub:
            service = TezzeretService(bus, hub)
            await service.start()
            calm = await kernels_over(bus, hub, IN_PROCESS)
            expected = await calm.build(LOW_RANK, target(), "layer", 0)
            shaken = await kernels_over(bus, AwayHub(hub, 5), lasting())
            found = await asyncio.wait_for(shaken.build(LOW_RANK, target(), "layer", 0), 30)
            assert found.kernel == expected.kernel
            one, two = expected.module.state_dict(), found.module.state_dict()
            assert all((one[name] == two[name]).all() for name in one)
            for kernels in (calm, shaken):
                await kernels.close()
            await service.stop()

    asyncio.run(life())


def test_a_kernel_whose_answer_is_lost_is_found_in_the_hub(tmp_path):
    """Another worker compiles it, and nobody says a word on the bus."""

    async def life():
        bus = InProcessOona()
        async with hub_in(tmp_path) as hub:
            kernels = await kernels_over(bus, hub, lasting())
            building = asyncio.create_task(kernels.build(LOW_RANK, target(), "layer", 0))
            await asyncio.sleep(0.05)
            silent = InProcessOona()
            service = TezzeretService(silent, hub)
            await service.start()
            await silent.publish(await request_on(bus))
            assert (await asyncio.wait_for(building, 30)).kernel
            await service.stop()
            await kernels.close()

    async def request_on(bus):
        asked = await bus.subscribe({TopicNames.KERNEL_REQUESTED}, "late")
        return await asyncio.wait_for(asked.receive(), 10)

    asyncio.run(life())


def test_a_kernel_that_can_not_be_compiled_is_refused_with_its_reason(tmp_path):
    async def life():
        bus = InProcessOona()
        async with hub_in(tmp_path) as hub:
            service = TezzeretService(bus, hub)
            await service.start()
            for patience in (IN_PROCESS, lasting()):
                kernels = await kernels_over(bus, hub, patience)
                with pytest.raises(KernelError, match="at birth"):
                    await asyncio.wait_for(kernels.build(LOUD, target(), "layer", 0), 30)
                await kernels.close()
            await service.stop()

    asyncio.run(life())


def test_without_patience_left_a_kernel_is_put_off(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            kernels = await kernels_over(InProcessOona(), hub, lasting(seconds=0.3))
            with pytest.raises(module.PatienceEnded) as end:
                await kernels.build(LOW_RANK, target(), "layer", 0)
            assert not end.value.permanent
            await kernels.close()

    asyncio.run(life())


def test_an_answer_outside_the_contract_is_passed_over(tmp_path, caplog):
    async def life():
        bus = InProcessOona()
        async with hub_in(tmp_path) as hub:
            kernels = await kernels_over(bus, hub, lasting())
            broken = OonaMessage.carrying(
                TopicNames.KERNEL_READY,
                KernelReady(kernel="k", blueprint="b"),
                ComponentType.TEZZERET,
            ).model_copy(update={"payload": {"kernel": 1}})
            await asyncio.sleep(0.05)  # until it listens
            await bus.publish(broken)
            service = TezzeretService(bus, hub)
            await service.start()
            assert (await asyncio.wait_for(kernels.build(LOW_RANK, target(), "l", 0), 30)).kernel
            await service.stop()
            await kernels.close()

    asyncio.run(life())
    assert "is not of the contract" in caplog.text
