"""The one writer, against a real HTTP server: what is sent, and what the fence keeps back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration
from prometheus_client import generate_latest

from esper_operator.api import ClusterApi
from esper_operator.errors import ApiNotFound, ApiRefused, ApiUnavailable, LeaseLost
from esper_operator.kinds import JOB
from esper_operator.metrics import OperatorMetrics
from esper_operator.writing import Pace, Writer

JOB_MANIFEST = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "first", "namespace": "team"},
    "spec": {"parallelism": 2},
}
ABOUT = {
    "apiVersion": "esper.dev/v1alpha1",
    "kind": "TrainingSession",
    "namespace": "team",
    "name": "first",
    "uid": "u1",
}
SECONDS = 0.5


@dataclass
class Server:
    """Notes what it is asked and answers what the test says."""

    asked: list[tuple[str, str, dict[str, str], Any, str]] = field(default_factory=list)
    status: int = 200
    answer: Any = field(default_factory=lambda: {"kind": "Status"})
    text: str = ""
    wait: float = 0.0

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        kind = request.headers.get("Content-Type", "")
        body = json.loads(text) if text else None
        self.asked.append((request.method, request.path, dict(request.query), body, kind))
        await asyncio.sleep(self.wait)
        return web.Response(text=self.text or json.dumps(self.answer), status=self.status)


@dataclass
class Scene:
    server: Server
    writer: Writer
    metrics: OperatorMetrics
    lease: list[float]

    def count(self, outcome: str) -> float:
        return sum(
            sample.value
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "esper_operator_api_writes_total"
            and sample.labels["outcome"] == outcome
        )


def run(body: Callable[[Scene], Awaitable[None]]) -> None:
    async def life() -> None:
        server, metrics, lease = Server(), OperatorMetrics(), [8.0]
        application = web.Application()
        application.router.add_route("*", "/{tail:.*}", server.handle)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with ClusterApi(Configuration(host=url)) as api:
                writer = Writer(
                    api, lambda: lease[0], metrics, seconds=SECONDS, background_rate=20.0
                )
                await body(Scene(server, writer, metrics, lease))
        finally:
            await runner.cleanup()

    asyncio.run(life())


def test_a_child_is_applied_by_the_operators_own_field_manager() -> None:
    async def body(scene: Scene) -> None:
        scene.server.answer = {"metadata": {"uid": "j1"}}
        assert await scene.writer.apply(JOB_MANIFEST) == {"metadata": {"uid": "j1"}}
        [(method, path, query, sent, kind)] = scene.server.asked
        assert (method, path) == ("PATCH", "/apis/batch/v1/namespaces/team/jobs/first")
        assert query == {"fieldManager": "esper-operator", "force": "true"}
        assert kind == "application/apply-patch+yaml"
        # Which no object has: one that is there conflicts.
        assert sent["metadata"].pop("resourceVersion") == "1"
        assert sent == JOB_MANIFEST
        assert scene.count("done") == 1

    run(body)


def test_a_child_that_is_there_is_changed_if_it_is_the_one_that_was_seen() -> None:
    async def body(scene: Scene) -> None:
        await scene.writer.apply(JOB_MANIFEST, "j1")
        sent = scene.server.asked[0][3]["metadata"]
        assert sent == {"name": "first", "namespace": "team", "uid": "j1"}

    run(body)


def test_what_stands_under_a_name_is_looked_up_by_its_metadata_alone() -> None:
    async def body(scene: Scene) -> None:
        found = {"metadata": {"name": "first", "uid": "j1"}}
        scene.server.answer = {"metadata": {"resourceVersion": "5"}, "items": [found]}
        assert await scene.writer.there(JOB_MANIFEST) == found["metadata"]
        [(method, path, query, _, _)] = scene.server.asked
        assert (method, path) == ("GET", "/apis/batch/v1/namespaces/team/jobs")
        assert query["fieldSelector"] == "metadata.name=first"
        scene.server.answer = {"metadata": {"resourceVersion": "5"}, "items": []}
        assert await scene.writer.there(JOB_MANIFEST) is None

    run(body)


def test_a_status_goes_to_the_status_subresource() -> None:
    async def body(scene: Scene) -> None:
        await scene.writer.apply_status(JOB_MANIFEST)
        assert scene.server.asked[0][1] == "/apis/batch/v1/namespaces/team/jobs/first/status"

    run(body)


def test_a_deletion_is_of_the_object_that_was_seen_and_takes_along_what_it_owns() -> None:
    async def body(scene: Scene) -> None:
        await scene.writer.delete(JOB, "team", "first", "j1")
        method, _, _, sent, _ = scene.server.asked[0]
        assert method == "DELETE"
        assert sent["preconditions"] == {"uid": "j1"}
        assert sent["propagationPolicy"] == "Background"

    run(body)


@pytest.mark.parametrize("status", [404, 409])
def test_what_is_gone_or_another_one_needs_no_deletion(status: int) -> None:
    async def body(scene: Scene) -> None:
        scene.server.status = status
        await scene.writer.delete(JOB, "team", "first", "j1")

    run(body)


def test_the_same_event_has_the_same_name_and_is_told_once() -> None:
    async def body(scene: Scene) -> None:
        await scene.writer.tell(ABOUT, "Normal", "Started", "it began")
        scene.server.status = 409
        await scene.writer.tell(ABOUT, "Normal", "Started", "it began")
        await scene.writer.tell(ABOUT, "Normal", "Started", "it began again")
        names = [sent["metadata"]["name"] for _, _, _, sent, _ in scene.server.asked]
        assert names[0] == names[1] != names[2]
        assert scene.server.asked[0][3]["involvedObject"] == ABOUT

    run(body)


def test_a_refusal_has_the_api_servers_reason_and_words() -> None:
    async def body(scene: Scene) -> None:
        scene.server.status = 422
        scene.server.answer = {"reason": "Invalid", "message": "spec.template: no\nsuch field"}
        with pytest.raises(ApiRefused) as caught:
            await scene.writer.apply(JOB_MANIFEST)
        assert (caught.value.status, caught.value.reason) == (422, "Invalid")
        assert caught.value.said == "spec.template: no such field"
        assert scene.count("failed") == 1
        scene.server.status = 404
        with pytest.raises(ApiNotFound):
            await scene.writer.apply(JOB_MANIFEST)

    run(body)


def test_a_field_that_the_api_server_does_not_know_is_a_refusal_though_it_says_500() -> None:
    async def body(scene: Scene) -> None:
        scene.server.status = 500
        said = "failed to create typed patch object (…): .spec.colour: field not declared in schema"
        scene.server.answer = {"message": said}
        with pytest.raises(ApiRefused, match="colour") as caught:
            await scene.writer.apply(JOB_MANIFEST)
        assert caught.value.reason == "Invalid"

    run(body)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_told_from_what_stays(status: int) -> None:
    async def body(scene: Scene) -> None:
        scene.server.status = status
        with pytest.raises(ApiUnavailable):
            await scene.writer.apply(JOB_MANIFEST)

    run(body)


def test_an_answer_that_was_cut_short_is_none() -> None:
    async def body(scene: Scene) -> None:
        scene.server.text = '{"kind": "Sta'
        with pytest.raises(ApiUnavailable, match="no JSON"):
            await scene.writer.apply(JOB_MANIFEST)

    run(body)


def test_a_write_that_is_not_answered_in_time_is_given_up() -> None:
    async def body(scene: Scene) -> None:
        scene.server.wait = 5.0
        began = asyncio.get_running_loop().time()
        with pytest.raises(ApiUnavailable):
            await scene.writer.apply(JOB_MANIFEST)
        assert asyncio.get_running_loop().time() - began < 4 * SECONDS

    run(body)


@pytest.mark.parametrize("left", [0.0, SECONDS])
def test_a_write_that_could_outlast_the_lease_is_not_sent(left: float) -> None:
    async def body(scene: Scene) -> None:
        scene.lease[0] = left
        for write in (
            scene.writer.apply(JOB_MANIFEST),
            scene.writer.apply_status(JOB_MANIFEST),
            scene.writer.delete(JOB, "team", "first", "j1"),
            scene.writer.tell(ABOUT, "Normal", "Started", "it began"),
        ):
            with pytest.raises(LeaseLost, match=r"operator\.write_seconds"):
                await write
        assert scene.server.asked == []

    run(body)


@pytest.mark.parametrize("good_looks", [1, 2], ids=["for a connection", "for its turn to go out"])
@pytest.mark.parametrize("warm", [False, True], ids=["new connection", "kept connection"])
def test_a_lease_that_is_lost_while_a_write_waits_keeps_it_back(
    warm: bool, good_looks: int
) -> None:
    """Between the first look at the lease and the sending, the process may have been stopped."""

    async def body(scene: Scene) -> None:
        if warm:
            await scene.writer.apply(JOB_MANIFEST)
        sent = len(scene.server.asked)
        looks = iter([8.0] * good_looks)
        scene.writer._remaining = lambda: next(looks, 0.0)
        with pytest.raises((LeaseLost, ApiUnavailable)):
            await scene.writer.apply(JOB_MANIFEST)
        await asyncio.sleep(0.05)
        assert len(scene.server.asked) == sent
        assert next(looks, None) is None
        scene.writer._remaining = lambda: 8.0
        await scene.writer.apply(JOB_MANIFEST)
        assert len(scene.server.asked) == sent + 1

    run(body)


def test_the_pace_gives_a_seconds_turns_at_once_and_then_one_by_one() -> None:
    now = [0.0]
    pace = Pace(20.0, clock=lambda: now[0])
    assert [pace.wait() for _ in range(20)] == [0.0] * 20
    assert pace.wait() == pytest.approx(0.05)
    now[0] = 0.05
    assert [pace.wait(), pace.wait()] == [0.0, pytest.approx(0.05)]
    now[0] = 3600.0
    assert [pace.wait() for _ in range(21)].count(0.0) == 20


def test_metrics_have_their_names() -> None:
    metrics = OperatorMetrics()
    metrics.reconciled("TrainingSession", 1.0, 0.5)
    metrics.wrote("apply", "Job", "done", 0.1)
    metrics.broke_off("TrainingSession", ValueError())
    metrics.show_sessions({"Running": 2})
    metrics.show_watches({"Job": 4.0})
    metrics.show_queue(1, 2, 3)
    metrics.show_lease(True)
    text = generate_latest(metrics.registry).decode()
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {name for name in names if not name.endswith("_created")} == {
        "esper_operator_reconcile_seconds",
        "esper_operator_queue_wait_seconds",
        "esper_operator_reconcile_with_wait_seconds",
        "esper_operator_reconcile_errors_total",
        "esper_operator_api_writes_total",
        "esper_operator_api_write_seconds",
        "esper_operator_sessions",
        "esper_operator_watch_age_seconds",
        "esper_operator_queue_depth",
        "esper_operator_queue_delayed",
        "esper_operator_workers_busy",
        "esper_operator_leading",
    }
