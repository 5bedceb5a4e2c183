"""How sessions, services and compilations end over real servers, some of them frozen."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from esper.configs import EsperConfig
from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin
from esper.services.urza.auth import Role
from esper.services.urza.http_client import HttpUrza
from tests.integration.processes import environment
from tests.integration.spirals import SESSION, changed, write_session
from tests.integration.test_services import FAST
from tools.stack import DATABASE, EsperProcess, Stack, write_settings

ENDING_SECONDS = 10.0
"""What an end may take whatever is away, with the program's own default limits."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack"), workers=1, settings=FAST) as running:
        yield running


@pytest.fixture(autouse=True)
def thawed(stack: Stack) -> Iterator[None]:
    yield
    for part in stack.parts.values():
        part.start()


def began(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "esper", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], seconds: float = 120.0) -> tuple[int, str, str]:
    """Exit status and what was written; killed where it takes longer than that."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


def until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def epochs(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def outcome(stack: Stack, directory: Path) -> str:
    """What the hub says of the run's session."""
    manifest = yaml.safe_load((directory / "manifest.yaml").read_text().split("---\n")[0])
    uid = manifest["metadata"]["annotations"]["esper.dev/uid"]
    query = f"SELECT outcome FROM training_sessions WHERE uid = '{uid}'"
    return stack.postgres.execute(query, DATABASE).strip()


def test_a_session_that_succeeded_is_so_although_the_hub_was_away(
    stack: Stack, tmp_path: Path
) -> None:
    session = changed(SESSION, spec__growth__controller__patienceSeconds=1.0)
    manifest, run = write_session(tmp_path / "session", session), tmp_path / "run"
    common = ("--config", stack.client_settings)
    process = began("run", manifest, "--output-dir", run, "--quiet", *common)
    until(lambda: epochs(run) >= 6, process)
    stack.urza.freeze()
    status, _, err = ended(process)
    assert status == 0, err
    assert "could not tell that it succeeded" in err
    assert json.loads((run / "result.json").read_text())["outcome"] == "Succeeded"
    stack.urza.start()
    assert outcome(stack, run) == "Running"
    status, out, err = ended(began("run", "--resume", run, "--quiet", "--json", *common))
    assert (status, err) == (0, "")
    assert json.loads(out)["outcome"] == "Succeeded"
    assert outcome(stack, run) == "Succeeded"


def test_a_trainer_says_what_went_away_and_ends_in_time(stack: Stack, tmp_path: Path) -> None:
    manifest, run = write_session(tmp_path / "session"), tmp_path / "run"
    process = began(
        *("serve", "tolaria", manifest, "--output-dir", run, "--config", stack.client_settings)
    )
    assert process.stderr is not None
    url = process.stderr.readline().split()[1]
    until(lambda: epochs(run) >= 2, process)
    assert asked(url) == (200, "ready\n")
    for part in (stack.redis, stack.urza):
        part.freeze()
    until(lambda: asked(url)[1].count("\n") == 2, process)
    assert [line.split(":")[0] for line in asked(url)[1].splitlines()] == ["redis.url", "hub.url"]
    process.send_signal(signal.SIGTERM)
    status, _, err = ended(process, ENDING_SECONDS)
    assert status == 130, err


def test_a_worker_ends_in_time_when_all_is_frozen(stack: Stack) -> None:
    worker = stack.workers[0]
    worker.start()
    until(lambda: worker.ready() is None)
    for part in (stack.redis, stack.urza):
        part.freeze()
    time.sleep(1)  # its requests are on their way by now
    os.kill(worker.pid, signal.SIGTERM)
    began = time.monotonic()
    while worker.running:
        assert time.monotonic() - began < ENDING_SECONDS
        time.sleep(0.05)


def asked(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url + "/readyz", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


def test_a_token_that_allows_too_little_is_refused_at_once(stack: Stack, tmp_path: Path) -> None:
    manifest = write_session(tmp_path / "session")
    weak = dict(stack.client()) | {
        "hub": {"url": stack.urza.url, "token": stack.token(Role.READER)}
    }
    write_settings(tmp_path / "weak.yaml", weak)
    settings = ("--config", tmp_path / "weak.yaml")
    status, _, err = ended(began("run", manifest, "--output-dir", tmp_path / "run", *settings))
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith("esper: error: hub.token: got token's role: reader; allowed: session, ")
    assert not (tmp_path / "run").exists()
    status, _, err = ended(began("serve", "tezzeret", *settings))
    assert status == 2, err
    assert err.splitlines()[-1].startswith("esper: error: hub.token: got token's role: reader")


def test_a_worker_is_not_ready_before_it_has_asked(stack: Stack, tmp_path: Path) -> None:
    for part in (stack.redis, stack.urza):
        part.freeze()
    worker = EsperProcess(
        tmp_path / "worker",
        "tezzeret",
        lambda port: dict(stack.client()) | {"component": {"health_port": port}},
    )
    with worker:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            problem = worker.ready() or ""
            assert "redis.url" in problem or "starting" in problem
            time.sleep(0.1)
        until(lambda: "hub.url" in (worker.ready() or ""))


def kernel(stack: Stack, width: int) -> str:
    layer = LayerGeometry(kind="Linear", inputs=width, outputs=4)
    target = KernelTarget(layer=layer, input_shape=(width,), output_shape=(4,))

    async def ask() -> str:
        async with HttpUrza(EsperConfig.load(file=stack.client_settings).hub) as hub:
            document = builtin("bottleneck-mlp", {"units": 3})
            await hub.put_blueprint(document)
            return (await hub.request_kernel(document.digest, target)).kernel

    return asyncio.run(ask())


def state(stack: Stack, kernel: str) -> str:
    query = f"SELECT state FROM compiled_kernels WHERE kernel = '{kernel}'"
    return stack.postgres.execute(query, DATABASE).strip()


def test_one_kernel_is_compiled_by_its_id_and_given_back_at_a_signal(stack: Stack) -> None:
    stack.workers[0].stop()
    asked_for = kernel(stack, 41)
    command = ("compile", "--kernel", asked_for, "--json", "--config", stack.client_settings)
    process = began(*command)
    until(lambda: state(stack, asked_for) == "compiling", process)
    process.send_signal(signal.SIGTERM)
    status, _, err = ended(process, ENDING_SECONDS)
    assert (status, err) == (130, "esper: interrupted; what was begun is given back\n")
    assert state(stack, asked_for) == "proposed"
    status, out, err = ended(began(*command))
    assert (status, err) == (0, "")
    shown = json.loads(out.splitlines()[-1])
    assert (shown["kernel"], shown["state"]) == (asked_for, "characterized")
    assert state(stack, asked_for) == "characterized"
