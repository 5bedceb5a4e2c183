"""How sessions, services and compilations end over real servers, some of them frozen."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from pydantic import SecretStr

from esper.configs import EsperConfig, HubConfig
from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin
from esper.services.urza.auth import Role
from esper.services.urza.http_client import HttpUrza
from tests.integration.processes import ROOT, Ended, Server, Started, until
from tests.integration.spirals import SESSION, changed, write_session
from tools.servers.process import free_port
from tools.stack import DATABASE, EsperProcess, Stack, write_settings

ENDING_SECONDS = 25.0
"""What an end may take whatever is away, on a slow machine too: Kubernetes gives it 30 s."""


# One worker starts the services, once for all tests.
pytestmark = pytest.mark.xdist_group("services")


@pytest.fixture(autouse=True)
def thawed(stack: Stack) -> Iterator[None]:
    yield
    for part in stack.parts.values():
        part.start()


def ended(started: Started, seconds: float) -> Ended:
    """How a command ended, which took no longer than that."""
    begun = time.monotonic()
    found = started.wait()
    assert time.monotonic() - begun < seconds, found
    return found


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
    server: Server, stack: Stack, tmp_path: Path
) -> None:
    session = changed(SESSION, spec__growth__controller__patienceSeconds=1.0)
    manifest, run = write_session(tmp_path / "session", session), tmp_path / "run"
    common = ("--config", stack.client_settings)
    started = server.start("run", manifest, "--output-dir", run, "--quiet", *common, folder=ROOT)
    until(lambda: epochs(run) >= 6)
    stack.urza.kill()  # what reaches a frozen one is done once it thaws
    succeeded = started.wait()
    assert succeeded.status == 0, succeeded.err
    assert "could not tell that it succeeded" in succeeded.err
    assert json.loads((run / "result.json").read_text())["outcome"] == "Succeeded"
    stack.urza.start()
    assert outcome(stack, run) == "Running"
    resumed = server.run("run", "--resume", run, "--quiet", "--json", *common, folder=ROOT)
    assert (resumed.status, resumed.err) == (0, "")
    assert json.loads(resumed.out)["outcome"] == "Succeeded"
    assert outcome(stack, run) == "Succeeded"


def test_a_trainer_says_what_went_away_and_ends_in_time(
    server: Server, stack: Stack, tmp_path: Path
) -> None:
    manifest, run, port = write_session(tmp_path / "session"), tmp_path / "run", free_port()
    started = server.start(
        *("serve", "tolaria", manifest, "--output-dir", run, "--config", stack.client_settings),
        *("--set", f"component.health_port={port}"),
        folder=ROOT,
    )
    url = f"http://127.0.0.1:{port}"
    until(lambda: epochs(run) >= 2)
    assert asked(url) == (200, "ready\n")
    for part in (stack.redis, stack.urza):
        part.freeze()
    until(lambda: asked(url)[1].count("\n") == 2)
    assert [line.split(":")[0] for line in asked(url)[1].splitlines()] == ["redis.url", "hub.url"]
    started.signal(signal.SIGTERM)
    found = ended(started, ENDING_SECONDS)
    assert found.status == 130, found.err


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


def test_a_token_that_allows_too_little_is_refused_at_once(
    server: Server, stack: Stack, tmp_path: Path
) -> None:
    manifest = write_session(tmp_path / "session")
    weak = dict(stack.client()) | {
        "hub": {"url": stack.urza.url, "token": stack.token(Role.READER)}
    }
    write_settings(tmp_path / "weak.yaml", weak)
    settings = ("--config", tmp_path / "weak.yaml")
    refused = server.run("run", manifest, "--output-dir", tmp_path / "run", *settings, folder=ROOT)
    assert (refused.status, refused.err.count("\n")) == (2, 1), refused.err
    assert refused.err.startswith(
        "esper: error: hub.token: got token's role: reader; allowed: session, "
    )
    assert not (tmp_path / "run").exists()
    ending = server.run("serve", "tezzeret", *settings, folder=ROOT)
    assert ending.status == 2, ending.err
    assert ending.err.splitlines()[-1].startswith(
        "esper: error: hub.token: got token's role: reader"
    )


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


def test_a_kernel_that_can_never_be_compiled_is_told_apart(
    server: Server, stack: Stack, tmp_path: Path
) -> None:
    stack.workers[0].stop()
    asked_for, log = kernel(stack, 43), tmp_path / "log"

    async def failed() -> None:
        config = EsperConfig.load(file=stack.client_settings)
        async with HttpUrza(config.hub) as hub:
            assert await hub.claim_kernel(asked_for, "somebody")
            await hub.fail_kernel(asked_for, "its graph does not fit")

    asyncio.run(failed())
    command = ("compile", "--kernel", asked_for, "--config", stack.client_settings)
    ended = server.run(*command, "--termination-log", log, folder=ROOT)
    message = f"kernel {asked_for}: its graph does not fit"
    assert (ended.status, ended.err) == (78, f"esper: error: {message}\n")
    assert json.loads(log.read_text()) == {"reason": "KernelFailed", "message": message}


def test_a_namespaces_tamiyo_shows_its_health_on_the_address_of_its_pod(
    stack: Stack, tmp_path: Path
) -> None:
    """With the credentials of its namespace alone, and probed as a kubelet does."""

    async def issued() -> dict[str, str]:
        token = SecretStr(stack.token(Role.ADMIN))
        async with HttpUrza(HubConfig(url=stack.urza.url, token=token)) as hub:
            given = await hub.namespace_credentials("team-b")
        assert given.redis_username is not None
        user = quote(given.redis_username, safe="")
        where = f"127.0.0.1:{stack.redis.port}/0"
        url = f"redis://{user}:{given.redis_password}@{where}"
        return {"url": url, "namespace": "team-b"}

    redis = asyncio.run(issued())
    service = EsperProcess(
        tmp_path / "tamiyo-b",
        "tamiyo",
        lambda port: {
            "redis": redis,
            "component": {"health_host": "0.0.0.0", "health_port": port},
        },
    )
    with service:
        until(lambda: service.ready() is None)
        for address in ("127.0.0.1", "127.0.0.3"):
            url = f"http://{address}:{service.port}/healthz"
            headers = {"User-Agent": "kube-probe/1.36", "Connection": "close"}
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.urlopen(request, timeout=5) as answer:
                assert answer.status == 200
        since = time.monotonic()
        service.stop()
        assert time.monotonic() - since < ENDING_SECONDS


def test_one_kernel_is_compiled_by_its_id_and_given_back_at_a_signal(
    server: Server, stack: Stack
) -> None:
    stack.workers[0].stop()
    asked_for = kernel(stack, 41)
    command = ("compile", "--kernel", asked_for, "--json", "--config", stack.client_settings)
    started = server.start(*command, folder=ROOT)
    until(lambda: state(stack, asked_for) == "compiling")
    started.signal(signal.SIGTERM)
    stopped = ended(started, ENDING_SECONDS)
    assert stopped.status == 130
    assert stopped.err == "esper: interrupted; what was begun is given back\n"
    assert state(stack, asked_for) == "proposed"
    compiled = server.run(*command, folder=ROOT)
    assert (compiled.status, compiled.err) == (0, "")
    shown = json.loads(compiled.out.splitlines()[-1])
    assert (shown["kernel"], shown["state"]) == (asked_for, "characterized")
    assert state(stack, asked_for) == "characterized"
