"""What the bus says: the newest of each session, over the bus of one process."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from esper.contracts.blueprints import KernelTarget, LayerGeometry
from esper.contracts.enums import ComponentType
from esper.contracts.messages import KernelRequested, OonaMessage, TopicNames
from esper_operator.hearing import MAX_REQUESTS, Reports, kernel_ready
from tests.unit.esper_operator.objects import kernel, snapshot

TARGET = KernelTarget(
    layer=LayerGeometry(kind="Linear", inputs=4, outputs=3), input_shape=(4,), output_shape=(3,)
)


def standing(uid: str = "u1", **fields: Any) -> OonaMessage:
    found = snapshot(**fields)
    return OonaMessage.carrying(TopicNames.STATUS, found, ComponentType.TOLARIA, scope=uid)


def asking(name: str, uid: str = "u1") -> OonaMessage:
    asked = KernelRequested(
        session="digits", kernel=name, blueprint="low-rank", blueprint_digest="d", target=TARGET
    )
    return OonaMessage.carrying(
        TopicNames.KERNEL_REQUESTED, asked, ComponentType.TOLARIA, scope=uid
    )


def taken(*messages: OonaMessage) -> tuple[Reports, list[str]]:
    concerned: list[str] = []
    reports = Reports(concerned.append)

    async def take() -> None:
        for message in messages:
            await reports.take(message)

    asyncio.run(take())
    return reports, concerned


def test_the_newest_snapshot_of_each_session_is_kept() -> None:
    reports, concerned = taken(
        standing(time=100.0, epoch=1),
        standing(time=102.0, epoch=3),
        standing(time=101.0, epoch=2),
        standing(uid="u2", time=100.0, epoch=7),
    )
    first, second = reports.snapshot("u1"), reports.snapshot("u2")
    assert first is not None
    assert second is not None
    assert (first.epoch, second.epoch) == (3, 7)
    assert concerned == ["u1", "u1", "u2"]


def test_when_a_snapshot_was_heard_is_by_this_processs_clock_and_the_newest_ones() -> None:
    began = time.time()
    reports, _ = taken(standing(time=100.0))
    first = reports.heard("u1")
    assert first is not None
    assert began <= first <= time.time()
    asyncio.run(reports.take(standing(time=99.0)))
    asyncio.run(reports.take(standing(time=100.0)))
    assert reports.heard("u1") == first  # neither is news
    asyncio.run(reports.take(standing(time=101.0)))
    second = reports.heard("u1")
    assert second is not None
    assert second > first
    reports.keep_only(())
    assert reports.heard("u1") is None


def test_a_later_attempt_is_newer_whatever_its_sequence() -> None:
    reports, _ = taken(standing(time=200.0, epoch=9), standing(attempt=2, time=100.0, epoch=1))
    found = reports.snapshot("u1")
    assert found is not None
    assert (found.attempt, found.epoch) == (2, 1)


def test_each_kernel_is_asked_for_once_and_no_session_asks_without_end() -> None:
    reports, concerned = taken(asking("a" * 40), asking("a" * 40), asking("b" * 40))
    assert [request.kernel[0] for request in reports.requests("u1")] == ["a", "b"]
    assert concerned == ["u1", "u1"]
    assert reports.asking("a" * 40) == ("u1",)
    many, _ = taken(*(asking(f"{number:040}") for number in range(MAX_REQUESTS + 5)))
    assert len(many.requests("u1")) == MAX_REQUESTS


def test_what_is_no_message_of_its_topic_says_nothing() -> None:
    broken = standing().model_copy(update={"payload": {"epoch": "three"}})
    reports, concerned = taken(broken)
    assert (reports.snapshot("u1"), concerned) == (None, [])


def test_what_was_heard_of_sessions_that_are_gone_is_forgotten() -> None:
    reports, _ = taken(standing(), asking("a" * 40), standing(uid="u2"))
    reports.keep_only({"u2"})
    assert reports.snapshot("u1") is None
    assert reports.requests("u1") == ()
    assert reports.snapshot("u2") is not None


def condition(status: str, **fields: Any) -> dict[str, Any]:
    return {"type": "Ready", "status": status, "reason": "Why", "message": "", **fields}


def test_a_session_is_told_of_a_kernel_once_it_is_settled() -> None:
    spec = {"blueprint": "low-rank", "target": {}}
    assert kernel_ready(kernel("a" * 40, spec)) is None
    waits = kernel("a" * 40, spec, status={"conditions": [condition("Unknown")]})
    assert kernel_ready(waits) is None
    done = {"conditions": [condition("True")], "digest": "f" * 64}
    ready = kernel_ready(kernel("a" * 40, spec, status=done))
    assert ready is not None
    assert (ready.artifact_digest, ready.error) == ("f" * 64, None)
    bad = {"conditions": [condition("False", message="it does not fit")]}
    failed = kernel_ready(kernel("a" * 40, spec, status=bad))
    assert failed is not None
    assert (failed.artifact_digest, failed.error) == (None, "it does not fit")
