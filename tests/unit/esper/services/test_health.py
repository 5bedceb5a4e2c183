"""Health endpoints, asked over real sockets."""

import asyncio
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from esper.errors import BusUnavailable, ConfigError
from esper.services import health as module
from esper.services.health import SILENCE_SECONDS, HealthServer, ServiceHealth, watch


def ask(server: HealthServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(server.url + path, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


def test_a_service_is_ready_once_it_has_started():
    health = ServiceHealth("tamiyo")
    with HealthServer(health) as server:
        assert ask(server, "/healthz") == (200, "ok\n")
        assert ask(server, "/readyz") == (503, "tamiyo is starting\n")
        health.started()
        assert ask(server, "/readyz") == (200, "ready\n")


def test_what_fails_is_told_in_a_line_each_and_goes_when_it_is_mended():
    health = ServiceHealth("tamiyo")
    health.started()
    with HealthServer(health) as server:
        health.report("redis.url", "redis.url: got\nno answer; allowed: a Redis that answers")
        health.report("hub.token", "hub.token: refused")
        assert ask(server, "/readyz") == (
            503,
            "redis.url: got no answer; allowed: a Redis that answers\nhub.token: refused\n",
        )
        health.report("redis.url", None)
        health.report("hub.token", None)
        health.report("never.reported", None)
        assert ask(server, "/readyz") == (200, "ready\n")


def test_a_loop_that_went_silent_is_no_longer_alive():
    now = [0.0]
    health = ServiceHealth("tezzeret", clock=lambda: now[0])
    with HealthServer(health) as server:
        now[0] = SILENCE_SECONDS * 2
        assert ask(server, "/healthz")[0] == 200  # never beat: Tolaria trains for minutes
        health.beat()
        now[0] += SILENCE_SECONDS
        assert ask(server, "/healthz")[0] == 200
        now[0] += 1
        assert ask(server, "/healthz") == (503, "the service's loop hangs\n")
        health.beat()
        assert ask(server, "/healthz")[0] == 200


def test_it_answers_while_the_event_loop_stands_still():
    health = ServiceHealth("tolaria")
    health.started()
    answers = []

    async def blocked(server: HealthServer) -> None:
        asking = threading.Thread(target=lambda: answers.append(ask(server, "/readyz")))
        asking.start()
        time.sleep(0.3)  # noqa: ASYNC251 - that is the case
        answers.append("unblocked")
        asking.join()

    with HealthServer(health) as server:
        asyncio.run(blocked(server))
    assert answers == [(200, "ready\n"), "unblocked"]


def test_metrics_are_prometheus_text():
    now = [10.0]
    health = ServiceHealth("tezzeret", clock=lambda: now[0])
    health.count({"kernels_total": 3, "memory_bytes": 1.5e9})
    now[0] = 12.5
    with HealthServer(health) as server:
        status, text = ask(server, "/metrics")
    assert status == 200
    assert text.splitlines() == [
        "# TYPE esper_tezzeret_kernels_total counter",
        "esper_tezzeret_kernels_total 3",
        "# TYPE esper_tezzeret_memory_bytes gauge",
        "esper_tezzeret_memory_bytes 1500000000",
        "# TYPE esper_tezzeret_ready gauge",
        "esper_tezzeret_ready 0",
        "# TYPE esper_tezzeret_uptime_seconds gauge",
        "esper_tezzeret_uptime_seconds 2.5",
    ]
    with pytest.raises(ValueError, match="got a b; allowed"):
        health.count({"a b": 1})


@pytest.mark.parametrize("path", ["/", "/readyz/", "/../etc/passwd", "/healthz?x=1"])
def test_other_paths_are_refused(path):
    with HealthServer(ServiceHealth("tamiyo")) as server:
        status, text = ask(server, path)
    assert status == 404
    assert "/healthz, /readyz, /metrics" in text


def test_other_methods_are_refused_and_nothing_is_said_of_versions():
    with HealthServer(ServiceHealth("tamiyo")) as server:
        asking = urllib.request.Request(server.url + "/healthz", data=b"x")
        with pytest.raises(urllib.error.HTTPError, match="501") as refusal:
            urllib.request.urlopen(asking, timeout=5)
        assert refusal.value.headers["Server"] == "esper"


def test_a_client_that_says_nothing_keeps_nobody_waiting():
    with HealthServer(ServiceHealth("tamiyo")) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):
            started = time.monotonic()
            assert ask(server, "/healthz")[0] == 200
            assert time.monotonic() - started < 4  # after 5 s it is hung up on


def test_a_port_that_is_taken_names_the_setting():
    with HealthServer(ServiceHealth("tamiyo")) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"component.health_port: got '?127.0.0.1:{port}"):
            HealthServer(ServiceHealth("tamiyo"), port=port)


def test_the_port_is_free_again_when_it_has_stopped():
    with HealthServer(ServiceHealth("tamiyo")) as server:
        port = int(server.url.rpartition(":")[2])
    with HealthServer(ServiceHealth("tamiyo"), port=port) as server:
        assert ask(server, "/healthz")[0] == 200


def test_watching_reports_each_check_by_its_setting(monkeypatch):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(module, "CHECK_TIMEOUT_SECONDS", 0.05)
    health = ServiceHealth("tamiyo")
    health.started()
    well = [False]

    async def answering() -> bool:
        return well[0]

    async def away() -> bool:
        if well[0]:
            return True
        raise BusUnavailable("127.0.0.1:1: connection refused")

    async def hanging() -> bool:
        if not well[0]:
            await asyncio.sleep(60)
        return True

    async def life() -> None:
        checks = {"hub.url": answering, "redis.url": away, "storage.uri": hanging}
        watching = asyncio.create_task(watch(health, checks))
        assert set(health.problems()) == set(checks)  # nothing is known yet
        await until(lambda: "no answer in" in health.problems()["storage.uri"])
        assert health.problems() == {
            "hub.url": "hub.url: what it names does not answer",
            "redis.url": "redis.url: 127.0.0.1:1: connection refused",
            "storage.uri": "storage.uri: what it names gives no answer in 0.05 s",
        }
        well[0] = True
        await until(lambda: not health.problems())
        watching.cancel()

    asyncio.run(life())
    assert not health.hangs()


def test_nothing_is_ready_before_everything_was_asked_once(monkeypatch):
    monkeypatch.setattr(module, "CHECK_TIMEOUT_SECONDS", 0.3)
    health = ServiceHealth("tezzeret")

    async def answering() -> bool:
        return True

    begun = []

    async def hanging() -> bool:
        begun.append(" ".join(health.problems().values()))
        await asyncio.sleep(60)
        return True

    async def life() -> None:
        names = ("hub.url", "redis.url", "storage.uri")
        checks = {"urza.url": answering} | dict.fromkeys(names, hanging)
        watching = asyncio.create_task(watch(health, checks))
        health.started()
        assert len(health.problems()) == 4
        await until(lambda: "urza.url" not in health.problems())
        assert set(health.problems()) == set(names)
        assert all("was not asked yet" in line for line in health.problems().values())
        await until(lambda: all("no answer" in line for line in health.problems().values()))
        # One limit, not three of them: all were asked before any was given up.
        assert len(begun) >= 3
        assert "no answer" not in " ".join(begun[:3])
        watching.cancel()

    asyncio.run(life())


def test_a_check_that_breaks_off_is_a_problem_and_the_watch_goes_on(monkeypatch):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.01)
    health = ServiceHealth("tamiyo")
    health.started()
    calls = []

    async def breaking() -> bool:
        calls.append(True)
        if len(calls) < 3:
            raise LookupError("it may hold a password")
        return True

    async def life() -> None:
        watching = asyncio.create_task(watch(health, {"redis.url": breaking}))
        await until(lambda: "LookupError" in health.problems().get("redis.url", ""))
        assert "password" not in health.problems()["redis.url"]
        await until(lambda: not health.problems())
        watching.cancel()

    asyncio.run(life())


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError("what was waited for did not happen")
