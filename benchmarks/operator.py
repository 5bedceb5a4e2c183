"""What does the operator cost? Many sessions at once without nodes, then idle, then some a second.

python -m benchmarks.operator [--quick] [--sessions N] [--profile FILE]

A real etcd, API server and controller manager, a real hub over SQLite and a real Redis are started
for it on the loopback, beside the operator on the same cores, and stopped again. Sessions are
made by eight connections as fast as the API server takes them. Figures of the operator itself are
its own metrics and what the system says of its process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import operator_creations
from benchmarks.bars import write_results
from tools.cluster.control_plane import ControlPlane, wait_for
from tools.operator_process import OperatorProcess
from tools.operator_world import OperatorWorld

SESSIONS, QUICK_SESSIONS = 1000, 100
CONNECTIONS = 8
NAMESPACE = "load"
MADE_SECONDS, SETTLE_SECONDS, IDLE_SECONDS = 600.0, 900.0, 60.0
BURST = "esper_operator_reconcile_seconds", "esper_operator_queue_wait_seconds"
WRITES = "esper_operator_api_writes_total"
HUB = "esper_urza_requests_total{"
CHILDREN = {
    "jobs": "/apis/batch/v1/namespaces/load/jobs",
    "services": "/api/v1/namespaces/load/services",
    "secrets": "/api/v1/namespaces/load/secrets",
}
PODS = "/api/v1/namespaces/load/pods"
PEER = {
    "name": "kubeflow training-operator 1.8.1, quoted, not measured here",
    "jobsPerSecond": 5.1,
    "rssMegabytes": 75,
}
Bars = dict[str, dict[str, Any]]
Samples = list[tuple[str, dict[str, str], float]]


def main() -> int:
    """Measure, print and write the results."""
    arguments = options().parse_args()
    count = arguments.sessions or (QUICK_SESSIONS if arguments.quick else SESSIONS)
    few = operator_creations.QUICK_SESSIONS if arguments.quick else operator_creations.SESSIONS
    with (
        tempfile.TemporaryDirectory(prefix="esper-bench-operator-") as folder,
        ControlPlane(Path(folder) / "plane") as plane,
        OperatorWorld(Path(folder), plane) as world,
    ):
        figures = measure(world, count, few, arguments.profile)
    bars = bars_of(figures)
    name = "operator-quick" if count < SESSIONS else "operator"
    path = write_results(name, figures, bars)
    sys.stdout.write(json.dumps({"results": str(path.relative_to(Path.cwd())), "bars": bars}))
    sys.stdout.write("\n")
    return 0


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look at 100 sessions, no figure")
    parser.add_argument("--sessions", type=int, help="how many")
    parser.add_argument("--profile", type=Path, help="where cProfile writes what took time")
    return parser


def measure(world: OperatorWorld, count: int, few: int, profile: Path | None) -> dict[str, Any]:
    """Load, then rest, then `few` sessions one after another."""
    world.plane.create_namespace(NAMESPACE)
    with operator_of(world, profile) as operator:
        wait_for(lambda: operator.leads, "the operator does not lead")
        with watched(operator) as process:
            load = measure_load(world, operator, process, count)
            sys.stderr.write(json.dumps(load) + "\n")
            settle(world, operator, 2 * count)
            idle = measure_idle(world, operator, process)
        creations = operator_creations.measure_creations(world, few)
    return {
        "sessions": count,
        "workers": 2,
        "load": load,
        "idle": idle,
        "creations": creations,
        "peer": PEER,
    }


@contextmanager
def operator_of(world: OperatorWorld, profile: Path | None) -> Iterator[OperatorProcess]:
    """An operator that runs, with a catalogue; under a profiler if one is asked for."""
    operator = world.operator(catalogue=NAMESPACE)
    operator.profile = profile
    with operator:
        yield operator


@dataclass
class Process:
    """The operator as the system sees it."""

    handle: psutil.Process
    most_bytes: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def cpu(self) -> float:
        """Seconds of a core that it has used."""
        times = self.handle.cpu_times()
        return float(times.user + times.system)

    def look(self) -> None:
        """Note its resident memory twice a second."""
        while not self.ended.wait(0.5):
            self.most_bytes = max(self.most_bytes, self.handle.memory_info().rss)


@contextmanager
def watched(operator: OperatorProcess) -> Iterator[Process]:
    """The operator's process, its memory noted all the while."""
    process = Process(psutil.Process(operator.pid))
    thread = threading.Thread(target=process.look, daemon=True)
    thread.start()
    try:
        yield process
    finally:
        process.ended.set()
        thread.join()


def measure_load(
    world: OperatorWorld, operator: OperatorProcess, process: Process, count: int
) -> dict[str, Any]:
    """All sessions at once, until each has all its objects."""
    before, cpu, all_cpu = operator.samples(), process.cpu(), cpu_of(world)
    counts = {name: number_of(world.plane, path) for name, path in CHILDREN.items()}
    began = time.monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as pool, world.plane.client() as client:
        making = [
            pool.submit(create, client, world.session(f"load-{number:04}"))
            for number in range(count)
        ]
        made: dict[str, float] = {}
        created = 0.0
        while len(made) < len(CHILDREN):
            for name, path in CHILDREN.items():
                if name not in made and number_of(world.plane, path) - counts[name] >= count:
                    made[name] = time.monotonic() - began
            if not created and all(job.done() for job in making):
                created = time.monotonic() - began
            if time.monotonic() - began > MADE_SECONDS:
                break
            time.sleep(0.5)
        for job in making:
            job.result()
    seconds = max(made.values()) if len(made) == len(CHILDREN) else MADE_SECONDS
    after = operator.samples()
    return {
        "createdSeconds": round(created, 2),
        "madeSeconds": {name: round(value, 2) for name, value in made.items()},
        "seconds": round(seconds, 2),
        "sessionsPerSecond": round(count / seconds, 2),
        "reconcileSeconds": spread(before, after, BURST[0]),
        "queueWaitSeconds": spread(before, after, BURST[1]),
        "writes": total(after, WRITES) - total(before, WRITES),
        "meanWriteSeconds": means(after, "esper_operator_api_write_seconds"),
        "errors": total(after, "esper_operator_reconcile_errors_total"),
        "cpuSeconds": round(process.cpu() - cpu, 2),
        "cpuSecondsOf": {n: round(s - all_cpu[n], 2) for n, s in cpu_of(world).items()},
        "rssMegabytes": round(process.most_bytes / 2**20, 1),
    }


def cpu_of(world: OperatorWorld) -> dict[str, float]:
    """Seconds of a core that each process beside the operator has used, this one's too."""
    servers = (*world.plane.parts, world.hub.urza, world.hub.redis)
    handles = {server.name: psutil.Process(server.pid) for server in servers}
    handles["benchmark"] = psutil.Process()
    return {
        name: handle.cpu_times().user + handle.cpu_times().system
        for name, handle in handles.items()
    }


def create(client: httpx.Client, manifest: dict[str, Any]) -> None:
    """Make one session."""
    path = f"/apis/esper.dev/v1alpha1/namespaces/{NAMESPACE}/trainingsessions"
    client.post(path, json=manifest).raise_for_status()


def number_of(plane: ControlPlane, path: str) -> int:
    """How many objects a list has, without reading them."""
    with plane.client() as client:
        answer = client.get(path, params={"limit": 1}).json()
    return len(answer["items"]) + int(answer["metadata"].get("remainingItemCount", 0))


def settle(world: OperatorWorld, operator: OperatorProcess, pods: int) -> None:
    """Wait until so many pods are made, and nothing has been written for ten seconds."""
    deadline = time.monotonic() + SETTLE_SECONDS
    last, since = -1.0, time.monotonic()
    while time.monotonic() < deadline:
        now = operator.total(WRITES)
        if now != last or number_of(world.plane, PODS) < pods:
            last, since = now, time.monotonic()
        if time.monotonic() - since > 10.0:
            return
        time.sleep(1.0)
    sys.stderr.write(f"{pods} pods did not come to rest\n")


def measure_idle(
    world: OperatorWorld, operator: OperatorProcess, process: Process
) -> dict[str, Any]:
    """A minute in which nothing happens, with Blueprints that nobody uses."""
    writes, cpu, began = operator.total(WRITES), process.cpu(), time.monotonic()
    asked = hub_requests(world)
    time.sleep(IDLE_SECONDS)
    seconds = time.monotonic() - began
    return {
        "seconds": round(seconds, 1),
        "writesPerSecond": round((operator.total(WRITES) - writes) / seconds, 4),
        "hubRequestsPerSecond": round((hub_requests(world) - asked) / seconds, 4),
        "cpuShare": round((process.cpu() - cpu) / seconds, 5),
        "rssMegabytes": round(process.handle.memory_info().rss / 2**20, 1),
        "mostRssMegabytes": round(process.most_bytes / 2**20, 1),
    }


def hub_requests(world: OperatorWorld) -> float:
    """How many requests the hub has answered."""
    text = httpx.get(f"{world.hub.urza.url}/metrics", trust_env=False).raise_for_status().text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(HUB))


def total(samples: Samples, name: str) -> float:
    """The sum of all samples of that name."""
    return sum(value for sample, _, value in samples if sample == name)


def means(samples: Samples, name: str) -> dict[str, float]:
    """The mean of a histogram by verb and kind."""
    sums = {tuple(labels.values()): v for n, labels, v in samples if n == f"{name}_sum"}
    counts = {tuple(labels.values()): v for n, labels, v in samples if n == f"{name}_count"}
    return {" ".join(sorted(key)): round(sums[key] / counts[key], 4) for key in sums}


def spread(before: Samples, after: Samples, name: str) -> dict[str, float]:
    """Count, mean and bounds of the shares of a histogram's sessions, from its buckets.

    A bound is the end of the bucket that the share falls into: the figure is at most that.
    """
    buckets = buckets_of(after, name)
    for bound, value in buckets_of(before, name).items():
        buckets[bound] -= value
    count = buckets[float("inf")]
    seconds = part(after, f"{name}_sum") - part(before, f"{name}_sum")
    found = {"count": count, "mean": round(seconds / max(count, 1.0), 4)}
    for share in (0.5, 0.9, 0.99):
        found[f"p{share * 100:g}"] = next(
            bound for bound, below in sorted(buckets.items()) if below >= share * count
        )
    return found


def buckets_of(samples: Samples, name: str) -> dict[float, float]:
    """How many were at most so long, by the bound."""
    return {
        float(labels["le"]): value
        for sample, labels, value in samples
        if sample == f"{name}_bucket" and labels["kind"] == "TrainingSession"
    } or {float("inf"): 0.0}


def part(samples: Samples, name: str) -> float:
    """That sample of the histogram's sessions."""
    return sum(
        value
        for sample, labels, value in samples
        if sample == name and labels["kind"] == "TrainingSession"
    )


def bars_of(figures: dict[str, Any]) -> Bars:
    """Each figure that the issue names, against its bar."""
    load, idle = figures["load"], figures["idle"]
    first = figures["creations"]["firstConditionSeconds"]
    most = {
        "7.3.made-seconds": (load["seconds"], 60.0),
        "7.3.reconcile-p99-seconds": (load["reconcileSeconds"]["p99"], 1.0),
        "7.3.queue-wait-p99-seconds": (load["queueWaitSeconds"]["p99"], 10.0),
        "7.3.rss-megabytes": (idle["mostRssMegabytes"], 256.0),
        "7.3.idle-writes-per-second": (idle["writesPerSecond"], 0.1),
        "7.3.idle-cpu-share": (idle["cpuShare"], 0.02),
        "7.2.first-condition-p99-seconds": (first["p99"], 2.0),
    }
    bars: Bars = {
        name: {"figure": figure, "bar": f"<= {bar:g}", "holds": figure <= bar}
        for name, (figure, bar) in most.items()
    }
    rate = load["sessionsPerSecond"]
    bars["7.3.sessions-per-second"] = {"figure": rate, "bar": ">= 16.7", "holds": rate >= 16.7}
    return bars


if __name__ == "__main__":
    sys.exit(main())
