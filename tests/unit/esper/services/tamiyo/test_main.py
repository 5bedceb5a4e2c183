from __future__ import annotations

import asyncio
import logging

import pytest

from esper.contracts.enums import ComponentType, ControllerPolicy, DecisionAction
from esper.contracts.messages import OonaMessage, TopicNames
from esper.errors import BusUnavailable
from esper.services.oona_client import InProcessOona
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.heuristics import POLICIES, decide
from esper.services.tamiyo.main import CONSUMER_GROUP, TamiyoService


def carrying(packet, trace_id=None):
    return OonaMessage.carrying(
        TopicNames.PACKETS, packet, ComponentType.TOLARIA, trace_id=trace_id
    )


def breaking(packet, **fields):
    """A message whose payload breaks the packet's contract."""
    message = carrying(packet)
    return message.model_copy(update={"payload": {**message.payload, **fields}})


class Trainer:
    """The other end of the rendezvous, on a real bus."""

    def __init__(self, **options):
        self.bus = InProcessOona()
        self.service = TamiyoService(self.bus, **options)

    async def __aenter__(self):
        self.decisions = await self.bus.subscribe({TopicNames.DECISIONS}, group="tolaria")
        await self.service.start()
        return self

    async def __aexit__(self, *failure):
        await self.service.stop()
        await self.bus.close()

    async def ask(self, message):
        await self.bus.publish(message)
        answer = await asyncio.wait_for(self.decisions.receive(), timeout=120)
        await self.decisions.acknowledge(answer)
        return answer

    async def unanswered(self):
        """The packets that nobody has acknowledged, once the service has stopped."""
        await self.service.stop()
        left = await self.bus.subscribe({TopicNames.PACKETS}, group=CONSUMER_GROUP)
        await self.bus.publish(marker := carrying(self.last))
        found = []
        while (message := await left.receive()).id != marker.id:
            found.append(message.id)
        return found


def run(conversation, **options):
    async def whole():
        async with Trainer(**options) as trainer:
            return await conversation(trainer)

    return asyncio.run(whole())


@pytest.mark.parametrize("policy", list(ControllerPolicy))
def test_every_packet_is_answered_with_one_decision_of_its_trace(build, policy):
    packets = [build.packet({"policy": policy}, epoch=epoch) for epoch in (10, 11, 12)]

    async def conversation(trainer):
        return [await trainer.ask(carrying(p, trace_id=f"trace-{p.epoch}")) for p in packets]

    answers = run(conversation)
    direct = ModelGraphAnalyzer()
    assert [answer.open() for answer in answers] == [decide(p, direct.analyze(p)) for p in packets]
    assert [answer.trace_id for answer in answers] == ["trace-10", "trace-11", "trace-12"]
    assert {answer.sender for answer in answers} == {ComponentType.TAMIYO}


def test_packets_published_before_the_first_turn_of_the_loop_are_answered_in_order(build):
    async def conversation(trainer):
        for epoch in (1, 2, 3):
            await trainer.bus.publish(carrying(build.packet(epoch=epoch)))
        return [(await trainer.decisions.receive()).open().epoch for _ in range(3)]

    assert run(conversation) == [1, 2, 3]


def test_an_answered_packet_is_acknowledged(build):
    async def conversation(trainer):
        trainer.last = build.packet()
        await trainer.ask(carrying(trainer.last))
        await trainer.ask(carrying(trainer.last))
        return await trainer.unanswered()

    assert run(conversation) == []


def test_a_redelivered_packet_gets_the_same_id(build):
    async def conversation(trainer):
        message = carrying(build.packet())
        first = await trainer.ask(message)
        second = await trainer.ask(message)
        return first.open(), second.open()

    first, second = run(conversation)
    assert first == second


def failing(packet, state):
    raise ZeroDivisionError("no\nway")


def test_a_policy_that_fails_waits_with_the_reason_and_the_loop_lives_on(build, caplog):
    policies = {**POLICIES, ControllerPolicy.HEURISTIC: failing}
    del policies[ControllerPolicy.RANDOM]

    async def conversation(trainer):
        return [
            (await trainer.ask(carrying(build.packet({"policy": policy})))).open()
            for policy in ("heuristic", "random", "none")
        ]

    failed, missing, fine = run(conversation, policies=policies)
    assert {failed.action, missing.action, fine.action} == {DecisionAction.WAIT}
    assert failed.reason == (
        "The policy heuristic failed and nothing is changed: ZeroDivisionError: no way"
    )
    assert "KeyError" in missing.reason
    assert fine.reason.startswith("The policy is none")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert errors[0].exc_info is not None


def test_a_packet_that_breaks_its_contract_is_answered_when_its_sender_is_known(build, caplog):
    async def conversation(trainer):
        seed = {**build.seed().to_wire(), "alpha": 1.5}
        answer = await trainer.ask(breaking(build.packet(), seeds=[seed]))
        await trainer.bus.publish(breaking(build.packet(), epoch=-1))
        await trainer.bus.publish(breaking(build.packet(), session=None))
        after = await trainer.ask(carrying(build.packet(epoch=11)))
        return answer.open(), after.open()

    unreadable, after = run(conversation)
    assert (unreadable.session, unreadable.epoch) == ("small", 10)
    assert unreadable.action is DecisionAction.WAIT
    assert "seeds.0.alpha: got 1.5" in unreadable.reason
    assert after.epoch == 11
    assert caplog.text.count("is not of the contract") == 3


def test_replayed_packets_rebuild_the_averages(build):
    packets = [
        build.packet(epoch=epoch, signals=(build.signal(activation_rank=epoch / 20),))
        for epoch in range(1, 6)
    ]
    lasting, resumed = ModelGraphAnalyzer(), ModelGraphAnalyzer()
    TamiyoService(InProcessOona(), analyzer=lasting).replay(packets)
    service = TamiyoService(InProcessOona(), analyzer=resumed)
    service.replay(packets[:3])
    service.replay(packets[3:])
    following = build.packet(epoch=6)
    assert lasting.analyze(following) == resumed.analyze(following)
    assert lasting.analyze(following) != ModelGraphAnalyzer().analyze(following)


def test_starting_and_stopping_may_be_repeated(build):
    async def conversation():
        service = TamiyoService(bus := InProcessOona())
        decisions = await bus.subscribe({TopicNames.DECISIONS}, group="tolaria")
        await service.stop()
        assert not service.running
        await service.start()
        await service.start()
        assert service.running
        await service.stop()
        assert not service.running
        await bus.publish(carrying(build.packet()))
        await service.start()
        answer = await asyncio.wait_for(decisions.receive(), timeout=120)
        await service.stop()
        return answer.open().epoch

    assert asyncio.run(conversation()) == 10


def test_a_closed_bus_ends_the_loop_and_refuses_a_start(caplog):
    async def conversation():
        service = TamiyoService(bus := InProcessOona())
        await service.start()
        await asyncio.sleep(0)
        await bus.close()
        for _ in range(5):
            await asyncio.sleep(0)
        ended = not service.running
        await service.stop()
        with pytest.raises(BusUnavailable):
            await service.start()
        return ended

    assert asyncio.run(conversation())
    assert "the bus is gone" in caplog.text


class ClosingSubscription:
    """A subscription of a foreign bus that fails in a way no port allows."""

    async def receive(self):
        raise OSError("foreign")

    async def close(self):
        pass


class ForeignBus(InProcessOona):
    async def subscribe(self, topics, group, *, prefetch=None):
        return ClosingSubscription()


def test_a_failure_of_the_loop_itself_is_seen_when_stopping():
    async def conversation():
        service = TamiyoService(ForeignBus())
        await service.start()
        for _ in range(3):
            await asyncio.sleep(0)
        with pytest.raises(OSError, match="foreign"):
            await service.stop()

    asyncio.run(conversation())
