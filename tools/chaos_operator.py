"""Kill the operator at every single change that it makes in a session's life; nothing is lost.

python -m tools.chaos_operator [--points N…] [--sample N]

A real control plane, hub and bus; between operator and API server an HTTP proxy counts changes, and
kills the operator (SIGKILL) when the API server has done the N-th and before it can hear of it.
Another operator starts, waits for the lease, and has to bring the session on. A session's life has
everything in it: two workers made, run, a report with a seed, a kernel asked for, suspended,
resumed, one of the workers lost, the end, and the end of its time to live. Each life has a
namespace, a lease and an account of its own, so that several go on at once.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from esper.contracts.blueprints import KernelTarget
from esper_operator.decisions.attempts import EVIDENCE_SECONDS, FIRST_PAUSE
from tools.cluster.control_plane import ControlPlane
from tools.cluster.credentials import write_kubeconfig
from tools.operator_bus import Trainer
from tools.operator_process import OperatorProcess
from tools.operator_workers import (
    BLUEPRINTS,
    DEPLOYMENTS,
    JOBS,
    SECRETS,
    SERVICES,
    SESSIONS,
    Workers,
    catalogued,
)
from tools.operator_world import GROUP, Objects, OperatorWorld, allow
from tools.servers.http_proxy import HttpProxy
from tools.servers.process import ServerError

CONVERGE_SECONDS = 10.0
"""From the lease acquired to everything being as it is to be."""
LEASE = {
    "lease_seconds": 4,
    "renew_seconds": 3.0,
    "retry_seconds": 0.25,
    "lease_request_seconds": 1.0,
    "write_seconds": 2.0,
}
"""So short that a campaign of hundreds of deaths is over before dinner."""
LIVES_AT_ONCE = 3
NAME = "life"
EXIT_LOST = 137
POLICIES = "/apis/networking.k8s.io/v1/networkpolicies"
SEEDS, KERNELS = f"{GROUP}/seeds", f"{GROUP}/compiledkernels"
SEED = {"layer": "blocks.0", "slot": 1, "state": "training", "blueprint": "low-rank"}
CHECKPOINT = {"name": "checkpoints/first", "epoch": 1}
TARGET = KernelTarget.model_validate(
    {
        "layer": {"kind": "Linear", "inputs": 8, "outputs": 4},
        "inputShape": [8],
        "outputShape": [4],
    }
)
ASK_SECONDS = 2.0
TTL = "ttlSecondsAfterFinished"
ATTEMPTS = 3
"""The first, the one after the suspension, and the one after the failure."""


@dataclass(frozen=True)
class Life:
    """How a session's life went: changes that its operators made, and those they were killed at."""

    changes: int
    killed_at: tuple[str, ...]
    slowest_seconds: float
    """The longest time that something took, with an operator that had the lease."""


class Chaos:
    """Lives of sessions, each in a namespace of its own: they can go on at once."""

    def __init__(self, world: OperatorWorld) -> None:
        """`world` runs, without an operator."""
        self._world = world

    def live(self, *kill_at: int) -> Life:
        """One life, in which the operator is killed at the changes of these numbers.

        Raises:
            ServerError: something was not as it is to be, in time.
        """
        plane = self._world.plane
        namespace = plane.create_namespace(f"chaos-{uuid.uuid4().hex[:8]}")
        allow(plane, own=namespace, namespaces=namespace)
        objects = Objects(plane, namespace)
        counted = _in_namespace(namespace)
        try:
            with HttpProxy(plane.api.url, plane.api.context(), counts=counted) as proxy:
                return _Life(self._world, objects, proxy, kill_at).run()
        finally:
            objects.close()
            plane.delete_namespace(namespace)


class _Life:
    def __init__(
        self,
        world: OperatorWorld,
        objects: Objects,
        proxy: HttpProxy,
        kill_at: Sequence[int],
    ) -> None:
        self._world = world
        self._objects = objects
        self._proxy = proxy
        self._kill_at = kill_at
        self._killed: list[str] = []
        self._now = self._operator()
        self._slowest = 0.0
        self._over = threading.Event()
        proxy.seen = self._seen

    def run(self) -> Life:
        keeper = threading.Thread(target=self._keep, daemon=True)
        try:
            self._now.start()
            keeper.start()
            self._drive()
        finally:
            self._over.set()
            keeper.join()
            self._now.kill()
        return Life(self._proxy.count, tuple(self._killed), round(self._slowest, 2))

    def _operator(self) -> OperatorProcess:
        plane, own = self._world.plane, self._objects.namespace
        path = plane.folder / f"{own}.kubeconfig"
        token = plane.token("esper-operator", own)
        write_kubeconfig(path, server=self._proxy.url, authority=plane.api.certificate, token=token)
        settings = {"namespaces": own, "lease_namespace": own, "worker_egress": "[]", **LEASE}
        return self._world.operator(kubeconfig=path, **settings)

    def _seen(self, number: int, method: str, path: str) -> None:
        if number not in self._kill_at:
            return
        self._killed.append(f"{method} {path.partition(self._objects.namespace)[2]}")
        with suppress(ServerError, psutil.Error):  # it may have ended by itself just now
            victim = psutil.Process(self._now.pid)
            victim.kill()
            while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.001)

    def _keep(self) -> None:
        """Start another operator when one has died."""
        while not self._over.wait(0.05):
            if not self._now.running:
                self._now.kill()  # which has ended, and is let go
                self._now = self._operator()
                self._now.start()

    def _drive(self) -> None:
        workers = Workers(self._objects, NAME)
        made = self._objects.create(SESSIONS, self._world.session(NAME))
        self._soon(lambda: self._objects.condition(NAME), "has no condition")
        self._soon(self._has_children, "has not all its children")
        self._soon(lambda: len(workers.pods()) == 2, "has not two pods")
        workers.run()
        self._soon(lambda: self._is("WorkersReady", "True"), "has no ready workers")
        self._grow(made)
        self._objects.merge(f"{SESSIONS}/{NAME}", {"spec": {"runPolicy": {"suspend": True}}})
        self._soon(lambda: self._is("Suspended", "True") and not workers.pods(), "is not suspended")
        self._objects.merge(f"{SESSIONS}/{NAME}", {"spec": {"runPolicy": {"suspend": False}}})
        self._soon(lambda: len(self._pending(workers)) == 2, "is not resumed")
        first = workers.run()[0]
        self._lose(workers, first)
        self._soon(lambda: self._is("WorkersReady", "True"), "has no ready workers again")
        workers.succeed()
        self._soon(lambda: self._is("Succeeded", "True"), "does not succeed")
        self._judge(workers)
        self._expire()

    def _grow(self, session: dict[str, Any]) -> None:
        """It reports a seed, and asks for a kernel as its trainer does: until there is one."""
        trainer = Trainer(self._world.hub.redis.url, self._objects.namespace, session)
        trainer.stands(epoch=1, checkpoint=CHECKPOINT, seeds=[SEED])
        self._soon(lambda: self._status().get("epoch") == 1, "does not show its report")
        self._soon(lambda: "status" in self._one(SEEDS), "has no seed with a status")
        self._objects.create(BLUEPRINTS, catalogued("low-rank"))
        asked = 0.0

        def ordered() -> bool:
            nonlocal asked
            if time.monotonic() - asked > ASK_SECONDS:
                trainer.asks("low-rank", TARGET)
                asked = time.monotonic()
            compiling = [job for job in self._objects.items(JOBS) if _role(job) == "compile"]
            return "status" in self._one(KERNELS) and len(compiling) == 1

        self._soon(ordered, "has no kernel that is compiled")

    def _expire(self) -> None:
        """Its time is over: it goes, and what its namespace shared with it."""
        self._objects.merge(f"{SESSIONS}/{NAME}", {"spec": {"runPolicy": {TTL: 0}}})
        self._soon(lambda: not self._objects.get(f"{SESSIONS}/{NAME}"), "stays")
        shared = (f"{DEPLOYMENTS}/esper-tamiyo", f"{SECRETS}/esper-tamiyo")
        self._soon(lambda: not any(map(self._objects.get, shared)), "leaves what opens the hub")

    def _one(self, path: str) -> dict[str, Any]:
        """The only object of a list; empty before there is one."""
        found = self._objects.items(path)
        if len(found) > 1:
            raise ServerError(f"got {len(found)} of {path}; allowed: 1")
        return found[0] if found else {}

    def _lose(self, workers: Workers, first: dict[str, Any]) -> None:
        """One of the workers fails, so that there is another attempt."""
        workers.end(first, EXIT_LOST, reason="Killed", message="by the test")
        self._soon(lambda: self._status()["attempt"] == ATTEMPTS, "begins no new attempt")
        pause = FIRST_PAUSE + EVIDENCE_SECONDS  # which the operator makes after a failure
        self._soon(lambda: len(self._pending(workers)) == 2, "has no new pods", pause=pause)
        workers.run()

    def _judge(self, workers: Workers) -> None:
        """Nothing is there twice, and nothing was counted twice."""
        status = self._status()
        found = {
            "attempt": status["attempt"],
            "failures": len(status["failures"]),
            "services": len(self._own(SERVICES)),
            "secrets": len(self._own(SECRETS)),
            "policies": len(self._own(POLICIES)),
            "seeds": len(self._objects.items(SEEDS)),
            "kernels": len(self._objects.items(KERNELS)),
            "jobs of an attempt": max(Counter(_attempt(job) for job in workers.jobs()).values()),
        }
        allowed = {"attempt": ATTEMPTS, "failures": 1}
        allowed |= dict.fromkeys(("services", "secrets", "policies", "seeds", "kernels"), 1)
        allowed["jobs of an attempt"] = 1
        if found != allowed:
            raise ServerError(f"got {found}; allowed: {allowed}")

    def _soon(self, holds: Callable[[], Any], otherwise: str, *, pause: float = 0.0) -> None:
        """Wait; only while an operator has the lease does the time count."""
        counted, last = 0.0, time.monotonic()
        while not holds():
            time.sleep(0.05)
            now = time.monotonic()
            if self._now.running and self._now.leads:
                counted += now - last
            last = now
            if counted > CONVERGE_SECONDS + pause:
                words = self._now.log.read_text()[-2000:]
                raise ServerError(f"{NAME} {otherwise} after {counted:.1f} s: {words}")
        self._slowest = max(self._slowest, counted - pause)

    def _has_children(self) -> bool:
        return bool(self._own(SERVICES) and self._own(SECRETS) and self._own(JOBS))

    def _own(self, path: str) -> list[dict[str, Any]]:
        label = "esper.dev/session"
        found = self._objects.items(path)
        return [f for f in found if (f["metadata"].get("labels") or {}).get(label) == NAME]

    def _pending(self, workers: Workers) -> list[dict[str, Any]]:
        return [pod for pod in workers.pods() if pod["status"].get("phase") == "Pending"]

    def _is(self, kind: str, status: str) -> bool:
        return self._objects.condition(NAME, kind).get("status") == status

    def _status(self) -> dict[str, Any]:
        found: dict[str, Any] = (self._objects.get(f"{SESSIONS}/{NAME}") or {}).get("status", {})
        return found


def _role(job: dict[str, Any]) -> str:
    return str(job["metadata"]["labels"]["esper.dev/role"])


def _attempt(job: dict[str, Any]) -> str:
    return str(job["metadata"]["labels"]["esper.dev/attempt"])


def _in_namespace(namespace: str) -> Callable[[str, str], bool]:
    def counts(method: str, path: str) -> bool:
        return f"/namespaces/{namespace}/" in path and "/leases" not in path

    return counts


def points_of(changes: int, sample: int | None) -> Sequence[int]:
    """Every change, or so many of them by lot, the first and the last among them."""
    every = range(1, changes + 1)
    if sample is None or sample >= changes:
        return every
    inner = random.Random(changes).sample(range(2, changes), sample - 2)
    return [1, *sorted(inner), changes]


def main() -> int:
    """Run the campaign; 1 if a life went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, nargs="+", help="changes to die at; default: each")
    parser.add_argument("--sample", type=int, help="so many of them, by lot")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="esper-chaos-") as folder,
        ControlPlane(Path(folder) / "plane") as plane,
        OperatorWorld(Path(folder), plane) as world,
    ):
        chaos = Chaos(world)
        whole = chaos.live()
        sys.stdout.write(f"a life without a death: {whole.changes} changes\n")

        def lived(point: int) -> bool:
            try:
                life = chaos.live(point)
                at = ", ".join(life.killed_at) or "nowhere"
                said = f"{at}: lived on, slowest {life.slowest_seconds} s"
            except ServerError as error:
                said = f"WRONG: {error}"
            sys.stdout.write(f"{point}/{whole.changes} {said}\n")
            sys.stdout.flush()
            return "WRONG" not in said

        points = arguments.points or points_of(whole.changes, arguments.sample)
        with ThreadPoolExecutor(LIVES_AT_ONCE) as at_once:
            wrong = list(at_once.map(lived, points)).count(False)
    sys.stdout.write(json.dumps({"changes": whole.changes, "wrong": wrong}) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
