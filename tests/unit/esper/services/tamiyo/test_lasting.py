"""Tamiyo over a wire: averages after a restart, packets that come again, a bus that goes."""

import asyncio

import pytest

from esper.contracts.enums import ComponentType
from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.operational import AdaptationDecision
from esper.errors import BusUnavailable
from esper.services import listening
from esper.services.oona_client import InProcessOona
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.main import TamiyoService

PACKETS = {TopicNames.PACKETS}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(listening, "RECONNECT_SECONDS", 0.01)


class Watched(ModelGraphAnalyzer):
    """An analyzer that remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.states = []

    def analyze(self, packet, scope=""):
        self.states.append((scope, packet.sequence, super().analyze(packet, scope)))
        return self.states[-1][2]


class Remembering(InProcessOona):
    """A bus that keeps what was published, as streams do, and refuses a while where told to."""

    def __init__(self):
        super().__init__()
        self.kept = []
        self.refusing = 0

    async def publish(self, *messages):
        self.kept += messages
        await super().publish(*messages)

    async def subscribe(self, topics, group, *, prefetch=None):
        if self.refusing:
            self.refusing -= 1
            raise BusUnavailable("the bus is away")
        return await super().subscribe(topics, group)

    async def history(self, topics, scope=None):
        for message in list(self.kept):
            if message.topic in topics and scope in (None, message.scope):
                yield message


def carrying(packet, scope="uid-1"):
    return OonaMessage.carrying(TopicNames.PACKETS, packet, ComponentType.TOLARIA, scope=scope)


async def conversation(bus, analyzer, messages):
    """A service that answers `messages`, one after the other, and is stopped."""
    decisions = await bus.subscribe({TopicNames.DECISIONS}, "test")
    service = TamiyoService(bus, analyzer=analyzer, lasting=True)
    await service.start()
    await asyncio.sleep(0.05)
    answers = []
    for message in messages:
        await bus.publish(message)
        answer = await asyncio.wait_for(decisions.receive(), timeout=120)
        await decisions.acknowledge(answer)
        answers.append(answer)
    await service.stop()
    await decisions.close()
    return answers, service


def packets(build, number=6):
    return [
        build.packet(epoch=epoch, sequence=epoch, train_loss=1 / epoch, validation_loss=1 / epoch)
        for epoch in range(1, number + 1)
    ]


def test_averages_are_the_same_to_the_bit_after_a_restart(build):
    async def life():
        whole, first, second = Watched(), Watched(), Watched()
        messages = [carrying(packet) for packet in packets(build)]
        undisturbed, _ = await conversation(Remembering(), whole, messages)
        bus = Remembering()
        early, _ = await conversation(bus, first, messages[:3])
        late, service = await conversation(bus, second, messages[3:])
        assert [a.payload for a in early + late] == [a.payload for a in undisturbed]
        assert service.counts == {"decisions_total": 3, "replayed_total": 3}
        assert second.states == whole.states  # the first three replayed, the others decided on
        assert {answer.scope for answer in late} == {"uid-1"}

    asyncio.run(life())


def test_a_packet_that_comes_again_gets_its_decision_and_moves_nothing(build):
    async def life():
        analyzer = Watched()
        one, two, three = (carrying(packet) for packet in packets(build, 3))
        answers, _ = await conversation(Remembering(), analyzer, [one, two, one, two, three])
        decided = [AdaptationDecision.model_validate(answer.payload).id for answer in answers]
        assert decided[:2] == decided[2:4]
        assert [sequence for _, sequence, _ in analyzer.states] == [1, 2, 3]

    asyncio.run(life())


def test_sessions_of_one_name_are_kept_apart(build):
    async def life():
        together, alone = Watched(), Watched()
        mixed = []
        for packet in packets(build, 3):
            other = packet.model_copy(update={"validation_loss": 99.0})
            mixed += [carrying(packet, "uid-1"), carrying(other, "uid-2")]
        await conversation(Remembering(), together, mixed)
        await conversation(Remembering(), alone, mixed[::2])
        assert [state for state in together.states if state[0] == "uid-1"] == alone.states

    asyncio.run(life())


def test_a_bus_that_is_away_is_come_back_to(build, caplog):
    async def life():
        bus = Remembering()
        decisions = await bus.subscribe({TopicNames.DECISIONS}, "test")
        bus.refusing = 3
        service = TamiyoService(bus, lasting=True)
        await service.start()
        await asyncio.sleep(0.3)
        assert service.running
        await bus.publish(carrying(packets(build, 1)[0]))
        assert await asyncio.wait_for(decisions.receive(), timeout=120)
        await service.stop()

    asyncio.run(life())
    assert "not heard at the moment: the bus is away" in caplog.text


def test_what_the_bus_keeps_and_can_not_be_read_is_passed_over(build):
    async def life():
        bus = Remembering()
        bus.kept.append(carrying(build.packet()).model_copy(update={"payload": {"no": "packet"}}))
        answers, service = await conversation(bus, Watched(), [carrying(packets(build, 1)[0])])
        assert len(answers) == 1
        assert service.counts["replayed_total"] == 0

    asyncio.run(life())


async def shared(bus, analyzers, messages, turns):
    """Services of one group that answer `messages` in turn, as `turns` says who gets which."""
    decisions = await bus.subscribe({TopicNames.DECISIONS}, "test")
    services = [TamiyoService(bus, analyzer=one, lasting=True) for one in analyzers]
    answers = []
    for message, turn in zip(messages, turns, strict=True):
        bus.kept.append(message)
        await services[turn]._handle(message)
        answers.append(await asyncio.wait_for(decisions.receive(), timeout=120))
    await decisions.close()
    return answers, services


@pytest.mark.parametrize("turns", [(0, 1, 0, 1, 0, 1), (0, 0, 1, 1, 0, 1), (1, 0, 0, 0, 0, 1)])
def test_services_of_one_group_decide_on_the_same_averages(build, turns):
    """As in a rolling update: each gets a part of the packets, and both know all of them."""

    async def life():
        alone, both = Watched(), (Watched(), Watched())
        messages = [carrying(packet) for packet in packets(build)]
        expected, _ = await shared(Remembering(), [alone], messages, [0] * 6)
        answers, services = await shared(Remembering(), both, messages, turns)
        assert [a.payload for a in answers] == [a.payload for a in expected]
        for analyzer, turn in zip(both, (0, 1), strict=True):
            last = max(number for number, who in enumerate(turns) if who == turn)
            assert analyzer.states == alone.states[: last + 1]
        assert sum(service.counts["replayed_total"] for service in services) == sum(
            len(analyzer.states) for analyzer in both
        ) - len(turns)

    asyncio.run(life())


def test_a_gap_is_closed_after_a_trainer_went_back_and_where_the_stream_was_trimmed(build):
    async def life():
        analyzer, bus = Watched(), Remembering()
        one, two, three, four, five, six = (carrying(packet) for packet in packets(build))
        again = one.model_copy(update={"id": "again", "payload": two.payload | {"trainLoss": 9.0}})
        service = TamiyoService(bus, analyzer=analyzer, lasting=True)
        for message, heard in ((one, True), (two, True), (three, True), (again, False)):
            bus.kept.append(message)
            if heard:
                await service._handle(message)
        bus.kept += [six.model_copy(update={"id": "late", "payload": three.payload}), four]
        await service._handle(four)  # follows three by number, though another lap lies between
        bus.kept = [five, six]
        await service._handle(six)
        assert [sequence for _, sequence, _ in analyzer.states] == [1, 2, 3, 4, 5, 6]
        bus.kept.append(again)
        await service._handle(again)
        assert analyzer.states[-1][1] == 2

    asyncio.run(life())
