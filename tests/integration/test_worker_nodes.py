"""Two nodes of an Indexed Job as processes, over the services: as pods of a cluster run them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
import yaml
from pydantic import SecretStr

from esper.configs import HubConfig, RedisConfig
from esper.contracts.enums import SeedState, SessionOutcome
from esper.contracts.messages import TopicNames
from esper.contracts.operational import SessionSnapshot
from esper.services.oona_client import OonaClient
from esper.services.tolaria.checkpoint_manifest import attempt_of, newest_first
from esper.services.urza.auth import Role
from esper.services.urza.http_client import HttpUrza
from esper.services.urza.http_objects import HubObjects
from tests.integration.processes import ROOT
from tests.integration.spirals import SESSION, SPIRALS, changed
from tests.integration.test_services import timeless
from tools.stack import DATABASE, Stack

pytestmark = pytest.mark.xdist_group("services")

NAMESPACE = "default"
SECONDS = 600


class Session:
    """A session as the operator has it: its manifest, and what opens the hub and the bus to it."""

    def __init__(self, folder: Path, stack: Stack, *, nodes: int = 2, epochs: int = 8) -> None:
        self.uid = str(uuid4())
        self.folder = folder
        self.stack = stack
        manifest = changed(
            SESSION,
            metadata={"name": "spirals", "namespace": NAMESPACE, "uid": self.uid},
            spec__workers={"replicas": nodes},
            spec__training__epochs=epochs,
        )
        (folder / "spirals.py").write_text(SPIRALS)
        self.manifest = folder / "session.yaml"
        self.manifest.write_text(yaml.safe_dump(manifest))
        self.manifest.chmod(0o444)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.hub = asyncio.run(self._opened())

    async def _opened(self) -> HubConfig:
        """The hub under the session's own token."""
        async with HttpUrza(self._hub(self.stack.token(Role.ADMIN))) as hub:
            self.issued = await hub.session_credentials(self.uid, NAMESPACE)
            self.operator = await hub.operator_credentials()
        return self._hub(self.issued.hub_token)

    def _hub(self, token: str) -> HubConfig:
        return HubConfig(url=self.stack.urza.url, token=SecretStr(token))

    def bus(self, username: str | None, password: str | None) -> str:
        """The bus' address for a user of its own."""
        assert username is not None
        assert password is not None
        return f"redis://{quote(username, safe='')}:{password}@127.0.0.1:{self.stack.redis.port}/0"

    def variables(self, attempt: int) -> dict[str, str]:
        """What the operator sets in the environment of a pod."""
        return {
            "ESPER_HUB__URL": self.stack.urza.url,
            "ESPER_HUB__TOKEN": self.issued.hub_token,
            "ESPER_REDIS__URL": self.bus(self.issued.redis_username, self.issued.redis_password),
            "ESPER_REDIS__NAMESPACE": NAMESPACE,
            "ESPER_TOLARIA__ATTEMPT": str(attempt),
            "ESPER_TOLARIA__STORAGE": "hub",
            "ESPER_TOLARIA__REPUBLISH_SECONDS": "1",
            "ESPER_TOLARIA__KERNEL_POLL_SECONDS": "0.2",
        }

    def reaches(self, name: str, pods: list[subprocess.Popen[str]]) -> None:
        """Wait until the hub has a whole checkpoint whose name begins so."""
        end = time.monotonic() + SECONDS
        whole = re.compile(rf"checkpoints/{name}.*/checkpoint\.json")
        while not any(map(whole.fullmatch, self.objects("checkpoints"))):
            assert time.monotonic() < end
            assert [pod.poll() for pod in pods] == [None] * len(pods)
            time.sleep(0.1)

    def pod(self, index: int, attempt: int) -> subprocess.Popen[str]:
        """`esper worker` as the pod of that index runs it."""
        folder = self.folder / f"pod-{attempt}-{index}"
        folder.mkdir()
        indexed = {
            "JOB_COMPLETION_INDEX": str(index),
            "PET_RDZV_ENDPOINT": f"127.0.0.1:{self.port}",
            "PET_RDZV_ID": f"{self.uid}-{attempt}",
            "PET_LOCAL_ADDR": f"127.0.0.{index + 1}",
        }
        return worker(
            *(self.manifest, "--output-dir", folder / "run", "--termination-log", folder / "log"),
            **self.variables(attempt) | indexed,
        )

    def objects(self, place: str) -> dict[str, int]:
        """What the session keeps at the hub."""
        return asyncio.run(HubObjects(self.hub, self.uid).listed(place))

    def snapshots(self) -> list[SessionSnapshot]:
        """What the bus still has of how the session stands, as the operator hears it."""
        url = self.bus(self.operator.redis_username, self.operator.redis_password)

        async def heard() -> list[SessionSnapshot]:
            bus = OonaClient(RedisConfig(url=url), scope=None, everywhere=True)
            try:
                found = [m.open() async for m in bus.history({TopicNames.STATUS}, self.uid)]
            finally:
                await bus.close()
            return [one for one in found if isinstance(one, SessionSnapshot)]

        return asyncio.run(heard())


def worker(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "ESPER_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", "esper", "worker", *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=SECONDS)
    return process.returncode, err


def left(folder: Path) -> Mapping[str, Any]:
    """The termination log of a pod."""
    found: dict[str, Any] = json.loads((folder / "log").read_text())
    return found


def test_two_pods_that_are_lost_and_come_again_train_as_one_node_does(
    stack: Stack, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    (tmp_path / "spirals.py").write_text(SPIRALS)
    alone = worker(
        *(write(tmp_path / "alone.yaml"), "--output-dir", one, "--nodes", "1", "--processes", "2")
    )
    session = Session(tmp_path, stack)
    first = [session.pod(index, attempt=1) for index in (0, 1)]
    session.reaches("epoch-000003", first)
    for pod in first:
        pod.send_signal(signal.SIGKILL)
        assert ended(pod)[0] == -signal.SIGKILL
    second = [session.pod(index, attempt=2) for index in (0, 1)]
    for index, pod in enumerate(second):
        status, err = ended(pod)
        assert status == 0, err
        assert left(tmp_path / f"pod-2-{index}")["reason"] == "Succeeded"

    # The same to the bit, although no machine had anything of the other's.
    status, err = ended(alone)
    assert status == 0, err
    run = tmp_path / "pod-2-0" / "run"
    assert timeless(run) == timeless(one)
    assert (run / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    assert not (tmp_path / "pod-2-1" / "run").exists(), "rank 0 is on index 0"

    # What is to be kept is at the hub, under the session's own token.
    results = session.objects("results")
    assert {"results/model.safetensors", "results/grown.py", "results/result.json"} <= set(results)
    kept = asyncio.run(HubObjects(session.hub, session.uid).get("results/model.safetensors"))
    assert kept == (run / "model.safetensors").read_bytes()
    assert all("-a00000" in name for name in session.objects("checkpoints") if "epoch" in name)

    heard = session.snapshots()
    assert {snapshot.session for snapshot in heard} == {"spirals"}
    order = [(snapshot.attempt, snapshot.sequence) for snapshot in heard]
    assert order == sorted(set(order))
    again = next(snapshot for snapshot in heard if snapshot.attempt == 2)
    assert again.epoch >= 3, "it begins where the checkpoint stands"
    last = heard[-1]
    assert (last.attempt, last.outcome) == (2, SessionOutcome.SUCCEEDED)
    assert (last.epoch, last.epochs, last.processes) == (8, 8, 2)
    assert last.checkpoint is not None
    assert last.checkpoint.name.startswith("checkpoints/epoch-000008-a000002")
    shown = yaml.safe_load((run / "status.yaml").read_text())["status"]
    wire = last.to_wire()
    for name in ("metrics", "parameters", "parametersBase", "flops", "layers", "epoch"):
        assert shown[name] == wire[name], name
    fossils = [seed for seed in last.seeds if seed.state is SeedState.FOSSILIZED]
    assert fossils
    # Their history is whole, also that of before the loss.
    for fossil in fossils:
        states = [step.current.value for step in fossil.transitions]
        assert states[-4:] == ["germinated", "training", "grafting", "fossilized"]
        times = [step.time for step in fossil.transitions]
        assert times == sorted(times)


def test_a_pod_that_was_cut_off_and_comes_back_changes_nothing(
    stack: Stack, tmp_path: Path
) -> None:
    session = Session(tmp_path, stack, nodes=1, epochs=16)
    older = session.pod(0, attempt=1)
    session.reaches("epoch-000003", [older])
    frozen = tree(older.pid)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        newer = session.pod(0, attempt=2)
        status, err = ended(newer)
        assert status == 0, err
        checkpoints, results = session.objects("checkpoints"), session.objects("results")
    finally:
        for pid in reversed(frozen):
            os.kill(pid, signal.SIGCONT)
    status, err = ended(older)
    assert status == 1, err
    assert left(tmp_path / "pod-1-0")["reason"] == "Superseded"
    assert session.objects("results") == results
    # One that it was writing may be whole now; it is its own, and counts less than the newer ones.
    after = session.objects("checkpoints")
    assert checkpoints.items() <= after.items()
    late = {name.split("/")[1] for name in after.keys() - checkpoints.keys()}
    assert len(late) <= 1
    names = {name.split("/")[1] for name in after if "epoch" in name}
    assert attempt_of(newest_first(names)[0]) == 2
    query = f"SELECT outcome FROM training_sessions WHERE uid = '{session.uid}'"
    assert stack.postgres.execute(query, DATABASE).strip() == "Succeeded"
    newest = max(session.snapshots(), key=lambda one: (one.attempt, one.sequence))
    assert (newest.attempt, newest.outcome) == (2, SessionOutcome.SUCCEEDED)


def tree(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in tree(int(child)))]


def write(path: Path) -> Path:
    """The same session without a cluster."""
    path.write_text(yaml.safe_dump(changed(SESSION, spec__workers={"replicas": 2})))
    return path
