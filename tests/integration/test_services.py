"""The same session in one process and over Redis, Postgres and S3: the same to the bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import ROOT, Ended, Server, until
from tests.integration.spirals import write_session
from tools.stack import Stack

LOGS = ("metrics.jsonl", "events.jsonl", "decisions.jsonl")

# One worker starts the services, once for all tests.
pytestmark = pytest.mark.xdist_group("services")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_session(tmp_path_factory.mktemp("session"))


@pytest.fixture(scope="module")
def embedded(server: Server, manifest: Path) -> Path:
    """What the session leaves when every service is in its process."""
    ended = esper(server, "run", manifest, "--output-dir", manifest.parent / "embedded", "--quiet")
    assert ended.status == 0, ended.err
    return manifest.parent / "embedded"


def esper(server: Server, *arguments: object) -> Ended:
    return server.run(*arguments, folder=ROOT)


def timeless(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """What a run has logged, without when."""
    return {
        name: [
            {
                key: value
                for key, value in json.loads(line).items()
                if key not in ("time", "seconds")
            }
            for line in (directory / name).read_text().splitlines()
        ]
        for name in LOGS
    }


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are records."""
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_a_session_over_the_services_is_the_embedded_one_to_the_bit(
    server: Server, stack: Stack, manifest: Path, embedded: Path, tmp_path: Path
) -> None:
    log = tmp_path / "tolaria.log"
    ended = esper(
        server,
        *("run", manifest, "--output-dir", tmp_path / "run", "--quiet"),
        *("--config", stack.client_settings, "--set", "component.log_level=info"),
        *("--set", f"component.log_file={log}"),
    )
    assert ended.status == 0, ended.err
    assert timeless(tmp_path / "run") == timeless(embedded)
    one, two = (folder / "model.safetensors" for folder in (embedded, tmp_path / "run"))
    assert one.read_bytes() == two.read_bytes()
    fossils = [
        event
        for event in timeless(tmp_path / "run")["events.jsonl"]
        if event.get("current") == "fossilized"
    ]
    assert fossils
    follow_a_trace(records(log), records(stack.tamiyo.log), records(stack.workers[0].log))


def follow_a_trace(
    tolaria: list[dict[str, Any]], tamiyo: list[dict[str, Any]], tezzeret: list[dict[str, Any]]
) -> None:
    """From the health signals to the fossil, by one trace id through the logs of three services."""
    fossilized = [line for line in tolaria if "→ fossilized" in line["message"]]
    trace = fossilized[0]["traceId"]

    def said(lines: list[dict[str, Any]]) -> str:
        return "\n".join(line["message"] for line in lines if line.get("traceId") == trace)

    story = said(tolaria)
    steps = ("health signals", "dormant → germinated", "→ training", "→ grafting", "→ fossilized")
    places = [story.index(step) for step in steps]
    assert places == sorted(places)
    assert "germinate" in said(tamiyo)
    compiled = [line for line in tezzeret if "is compiled" in line["message"]]
    assert compiled
    assert {line.get("traceId") for line in compiled} & {line.get("traceId") for line in tolaria}


def test_a_killed_session_goes_on_over_the_services(
    server: Server, stack: Stack, manifest: Path, embedded: Path, tmp_path: Path
) -> None:
    """`esper serve tolaria`, killed and started again until it is done."""
    command = ("serve", "tolaria", manifest, "--output-dir", tmp_path / "run")
    command = (*command, "--config", stack.client_settings)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for epochs in (2, 5):
        started = server.start(*command, folder=ROOT)
        until(lambda n=epochs: metrics.exists() and metrics.read_text().count("\n") >= n)
        started.signal(signal.SIGKILL)
        assert started.wait().status == -signal.SIGKILL
    ended = esper(server, *command)
    assert ended.status == 0, ended.err
    assert ended.err.startswith("tolaria: http://127.0.0.1:")
    assert timeless(tmp_path / "run") == timeless(embedded)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hub.token": "wrong"}, "hub.token"),
        ({"hub.url": "http://127.0.0.1:1", "hub.attempts": "1"}, "hub.url"),
        ({"redis.url": "redis://127.0.0.1:1/0", "redis.attempts": "1"}, "redis.url"),
        ({"redis.url": None}, "redis.url"),
        ({"hub.url": None}, "hub.url"),
    ],
)
def test_a_setting_that_leads_nowhere_is_named_and_nothing_is_written(
    server: Server,
    stack: Stack,
    manifest: Path,
    tmp_path: Path,
    settings: dict[str, str | None],
    said: str,
) -> None:
    sets = [part for k, v in settings.items() for part in ("--set", f"{k}={v or 'null'}")]
    ended = esper(
        server,
        *("run", manifest, "--output-dir", tmp_path / "run"),
        *("--config", stack.client_settings, *sets),
    )
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert ended.err.startswith(f"esper: error: {said}: got ")
    assert str(stack.redis.password) not in ended.err
    assert not (tmp_path / "run").exists()


def test_a_wrong_password_of_the_bus_is_not_shown(
    server: Server, stack: Stack, manifest: Path, tmp_path: Path
) -> None:
    url = stack.redis.url.replace(str(stack.redis.password), "not-the-password")
    ended = esper(
        server,
        *("run", manifest, "--output-dir", tmp_path / "run"),
        *("--config", stack.client_settings, "--bus", url),
    )
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith("esper: error: redis.url")
    assert "not-the-password" not in ended.err


def test_a_service_whose_bus_is_away_says_so_and_waits(stack: Stack, tmp_path: Path) -> None:
    from tools.stack import EsperProcess

    settings = {"redis": {"url": "redis://127.0.0.1:1/0"}}
    service = EsperProcess(
        tmp_path / "tamiyo-2",
        "tamiyo",
        lambda port: settings | {"component": {"health_port": port}},
    )
    with service:
        problem = service.ready()
        while problem == "tamiyo is starting":
            problem = service.ready()
        assert problem is not None
        assert problem.startswith("redis.url: ")
        assert service.running


def test_a_kernel_that_nobody_asked_for_is_not_compiled(server: Server, stack: Stack) -> None:
    ended = esper(server, "compile", "--kernel", "0" * 40, "--config", stack.client_settings)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == (
        f"esper: error: kernel: got {'0' * 40}; allowed: a kernel that was requested; the "
        "hub does not know it\n"
    )
