"""`make chaos-cluster`: sessions train on a real kubelet while what they need is killed.

Operator leader, Tamiyo, Urza, Redis, a worker, a compile pod: each is killed on its node, or its
pod deleted without grace (`tools/cluster_faults.py`), while equal sessions of example 02, made
shorter, train one after the other until the faults are used up. Each has a namespace of its own,
and before each the kernels of the first are deleted from the hub, so that all are compiled anew. In
the end nothing may be lost or done twice:

- every session has succeeded, its model and its logs are to the bit those of one that nobody
  disturbed, and its Seeds stand as its log tells;
- no decision was applied twice;
- each transition was on the bus, in order, once for whoever drops what it has heard already;
- the hub has accepted one result for each kernel, by the note that a trigger took of every one.

It needs a cluster from source (`make cluster`) with the images and the chart, whose hub has SQLite.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import yaml

from tools import helm
from tools.chaos_checks import Outcome, check_kernels, check_transitions, compare, lines
from tools.chaos_ranks import MODEL, differences
from tools.cluster.containers.layout import SOURCE, layout
from tools.cluster.containers.source import SourceCluster
from tools.cluster_demo import condition
from tools.cluster_faults import Faults, course
from tools.real_cluster import HUB, REDIS, RealCluster
from tools.servers.process import ServerError

EXAMPLE = helm.ROOT / "examples" / "02-digits-cnn" / "session.yaml"
SHORT: dict[str, dict[str, Any]] = {
    "training": {"epochs": 30, "checkpoint": {"everyEpochs": 3}},
    "gates": {"dwellEpochs": 3, "ageEpochs": 5, "rampEpochs": 1, "holdEpochs": 1},
}
"""Still six kernels are compiled, and a seed fossilises."""
DATABASE = "/var/lib/esper/urza.sqlite"
"""In the hub's pod."""
RETRIES = 1000
"""A worker that is killed is a failure, which `runPolicy.backoffLimit` bounds."""
SESSION_SECONDS = 1800.0
LOOK_SECONDS = 1.0
READY_SECONDS = 180


@dataclass(frozen=True)
class Plan:
    """How many faults, what chance starts with, and the most seconds between two."""

    faults: int = 20
    seed: int = 0
    longest: float = 10.0


class ClusterSession:
    """A session in a namespace of its own."""

    def __init__(self, cluster: RealCluster, manifest: dict[str, Any], namespace: str) -> None:
        """Make the namespace and apply the session."""
        self.cluster = cluster
        self.namespace = namespace
        self.name = str(manifest["metadata"]["name"])
        cluster.kubectl("create", "namespace", namespace)
        restricted = "pod-security.kubernetes.io/enforce=restricted"
        cluster.kubectl("label", "namespace", namespace, restricted)
        cluster.kubectl("-n", namespace, "apply", "-f", "-", given=json.dumps(manifest))

    def get(self) -> dict[str, Any]:
        """The session as it stands."""
        found: dict[str, Any] = self.cluster.get("-n", self.namespace, "ts", self.name)
        return found

    @property
    def running(self) -> bool:
        """Whether its end is not known."""
        return condition(self.get(), "Succeeded").get("status") not in ("True", "False")

    def wait(self) -> dict[str, Any]:
        """It, once it has ended.

        Raises:
            ServerError: it has not, in the time that any session may take.
        """
        deadline = time.monotonic() + SESSION_SECONDS
        while self.running:
            if time.monotonic() > deadline:
                raise ServerError(f"{self.namespace}/{self.name} has not ended")
            time.sleep(LOOK_SECONDS)
        return self.get()

    def items(self, kind: str) -> list[dict[str, Any]]:
        """The objects of a kind in its namespace."""
        found: list[dict[str, Any]] = self.cluster.get("-n", self.namespace, kind)["items"]
        return found

    def fetch(self, folder: Path) -> Path:
        """Its logs and its model, as the hub keeps them, in a folder called as its namespace."""
        place = folder / self.namespace
        place.mkdir()
        uid = self.get()["metadata"]["uid"]
        for name, content in asyncio.run(self.cluster.results(uid)).items():
            (place / name).write_bytes(content)
        return place


def run(
    cluster: SourceCluster,
    manifest: dict[str, Any],
    folder: Path,
    plan: Plan,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train `manifest` without faults, then through `plan`, and compare; `folder` keeps the logs.

    Raises:
        ServerError: something is not as it is after `make install`, or does not come back.
    """
    outcome = Outcome()
    real = RealCluster(cluster.layout.admin)
    prefix = f"chaos-{uuid.uuid4().hex[:6]}"
    notes = Notes(real)
    notes.begin()
    sessions: list[ClusterSession] = []
    try:
        began = time.monotonic()
        first = ClusterSession(real, manifest, f"{prefix}-undisturbed")
        sessions.append(first)
        ended = condition(first.wait(), "Succeeded")
        if ended["status"] != "True":
            raise ServerError(f"the undisturbed session: {ended['reason']}: {ended['message']}")
        undisturbed = first.fetch(folder)
        kernels = sorted(each["metadata"]["name"] for each in first.items("compiledkernels"))
        say(f"the undisturbed session has ended after {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        seen = _disturb(cluster, real, manifest, prefix, kernels, plan, sessions, outcome, say)
        for session in sessions[1:]:
            session.wait()
        say(f"the last disturbed session has ended after {time.monotonic() - began:.0f} s")
        outcome.figures |= {
            "seconds": round(time.monotonic() - began, 1),
            "sessions": len(sessions) - 1,
            "kubeletSawAfterSeconds": seen,
        }
        _await_release(real)
        told = [check_session(session, undisturbed, folder, outcome) for session in sessions[1:]]
        outcome.figures["perSession"] = told
        with real.hub() as hub:
            asyncio.run(check_kernels(hub, kernels, outcome))
        notes.check(kernels, outcome)
    finally:
        notes.end()
        for session in sessions:
            real.kubectl("delete", "namespace", session.namespace, "--wait=false")
    return outcome


def _disturb(
    cluster: SourceCluster,
    real: RealCluster,
    manifest: dict[str, Any],
    prefix: str,
    kernels: Sequence[str],
    plan: Plan,
    sessions: list[ClusterSession],
    outcome: Outcome,
    say: Callable[[str], None],
) -> list[float]:
    """The faults, one after the other, while a session trains; how soon the kubelet saw each."""
    chance = random.Random(plan.seed)
    faults = Faults(cluster, chance)
    for number, fault in enumerate(course(plan.faults, chance), start=1):
        hit = None
        while hit is None:
            if len(sessions) == 1 or not sessions[-1].running:
                _await_release(real)
                forget(real, kernels)
                sessions.append(ClusterSession(real, manifest, f"{prefix}-{len(sessions)}"))
                say(f"session {len(sessions) - 1} begins")
            session = sessions[-1]
            time.sleep(chance.uniform(0.0, plan.longest))
            hit = faults.bring(fault, session.namespace, lambda s=session: s.running)
        epoch = session.get().get("status", {}).get("epoch", 0)
        say(f"fault {number} of {plan.faults}: {fault}: {hit} (epoch {epoch})")
        outcome.faults.append(str(fault))
    return faults.seen


def check_session(
    session: ClusterSession, undisturbed: Path, folder: Path, outcome: Outcome
) -> dict[str, Any]:
    """What must hold of one that was disturbed; returns its figures."""
    found = session.get()
    status, where = found["status"], session.namespace
    ended = condition(found, "Succeeded")
    told = f"{where}: {ended['reason']}: {ended['message']}"
    outcome.check(ended["status"] == "True", told)
    if ended["status"] != "True":
        return {"namespace": where, "ended": ended["reason"]}
    place = session.fetch(folder)
    compare(undisturbed, place, outcome)
    outcome.check(not differences(undisturbed, place), f"{where}: logs or {MODEL} differ")
    uid = found["metadata"]["uid"]
    published = asyncio.run(session.cluster.transitions(where, uid))
    check_transitions(published, place, outcome)
    check_decisions(place, outcome)
    check_seeds(session.items("seeds"), place, outcome)
    unready = [
        kernel["metadata"]["name"]
        for kernel in session.items("compiledkernels")
        if condition(kernel, "Ready").get("status") != "True"
    ]
    outcome.check(not unready, f"{where}: kernels {', '.join(unready)} are not ready")
    return {
        "namespace": where,
        "attempts": status["attempt"],
        "failedAttempts": status.get("failedAttempts", 0),
        "disruptions": status.get("disruptions", 0),
        "fossilized": status["seeds"]["fossilized"],
        "compiled": len(session.items("compiledkernels")),
        "transitions": outcome.figures["transitions"],
        "transitionsPublished": outcome.figures["transitionsPublished"],
    }


def check_decisions(place: Path, outcome: Outcome) -> None:
    """No decision is twice in the record, and none that was applied led to two germinations."""
    decisions = lines(place / "decisions.jsonl")
    twice = [one for one, times in Counter(d["id"] for d in decisions).items() if times > 1]
    outcome.check(not twice, f"{place.name}: decisions {', '.join(twice)} are recorded twice")
    born = Counter(
        (line["layer"], line["slot"], line["cycle"])
        for line in lines(place / "events.jsonl")
        if line["type"] == "transition" and line["current"] == "germinated"
    )
    germinated = sum(1 for d in decisions if d["action"] == "germinate" and d["applied"])
    outcome.check(
        len(born) == sum(born.values()) == germinated,
        f"{place.name}: {germinated} decisions to germinate were applied, "
        f"{sum(born.values())} seeds germinated in {len(born)} slots and cycles",
    )


def check_seeds(seeds: Sequence[dict[str, Any]], place: Path, outcome: Outcome) -> None:
    """Each Seed is in the state that the log's last transition of its slot tells."""
    last = {
        (line["layer"], line["slot"]): line["current"]
        for line in lines(place / "events.jsonl")
        if line["type"] == "transition"
    }
    shown = {(s["spec"]["layer"], s["spec"]["slot"]): s["status"]["state"] for s in seeds}
    outcome.check(shown == last, f"{place.name}: Seeds say {shown}, the log {last}")


def forget(cluster: RealCluster, kernels: Sequence[str]) -> None:
    """Delete kernels from the hub, and every object of them: whoever asks has them made anew."""
    with cluster.hub() as hub:
        assert hub.token is not None
        headers = {"Authorization": f"Bearer {hub.token.get_secret_value()}"}
        for kernel in kernels:
            url = f"{hub.url}/api/v1/kernels/{kernel}"
            answer = httpx.delete(url, headers=headers, trust_env=False)
            if answer.status_code not in (httpx.codes.NO_CONTENT, httpx.codes.NOT_FOUND):
                raise ServerError(f"kernel {kernel} can't be deleted: {answer.text}")
    for item in cluster.get("compiledkernels", "-A")["items"]:
        meta = item["metadata"]
        if meta["name"] in kernels:
            words = ("compiledkernel", meta["name"], "--ignore-not-found")
            cluster.kubectl("-n", meta["namespace"], "delete", *words)


class Notes:
    """What the hub's database notes, by a trigger, of every result that it accepts for a kernel."""

    def __init__(self, cluster: RealCluster) -> None:
        self._cluster = cluster

    def begin(self) -> None:
        """Begin to note.

        Raises:
            ServerError: the hub has no SQLite on a volume.
        """
        self.end()
        self._executed(
            "CREATE TABLE accepted_results (id text, lease text);"
            "CREATE TRIGGER note_result AFTER UPDATE OF state ON compiled_kernels "
            "WHEN NEW.state = 'characterized' BEGIN "
            "INSERT INTO accepted_results VALUES (NEW.id, NEW.lease_token); END;"
        )

    def end(self) -> None:
        """Note no more, and leave nothing."""
        self._executed("DROP TRIGGER IF EXISTS note_result; DROP TABLE IF EXISTS accepted_results;")

    def check(self, kernels: Sequence[str], outcome: Outcome) -> None:
        """One accepted result a kernel, also of those that were deleted since, and of its lease."""
        rows = json.loads(
            self._asked(
                "SELECT a.id, count(*), k.kernel, k.lease_token = a.lease FROM accepted_results a "
                "LEFT JOIN compiled_kernels k ON k.id = a.id GROUP BY a.id"
            )
        )
        outcome.figures["acceptedResults"] = len(rows)
        for row, times, kernel, of_lease in rows:
            outcome.check(times == 1, f"kernel {kernel or row}: {times} results were accepted")
            outcome.check(of_lease != 0, f"kernel {kernel}: the result of another lease")
        missing = set(kernels) - {kernel for _, _, kernel, _ in rows}
        outcome.check(not missing, f"no result was accepted for kernels {', '.join(missing)}")

    def _executed(self, statements: str) -> None:
        self._run(f"db.executescript({statements!r})")

    def _asked(self, query: str) -> str:
        return self._run(f"print(json.dumps(db.execute({query!r}).fetchall()))")

    def _run(self, code: str) -> str:
        """What Python prints in the hub's pod, beside the hub, over its database."""
        program = (
            "import json, sqlite3\n"
            f"db = sqlite3.connect('file:{DATABASE}?mode=rw', uri=True, timeout=30)\n"
            f"{code}\ndb.close()\n"
        )
        words = ("exec", f"statefulset/{HUB}", "--", "python", "-c", program)
        return self._cluster.kubectl("-n", helm.NAMESPACE, *words)


def _await_release(cluster: RealCluster) -> None:
    """Wait until hub and Redis are ready: whoever asks them then has an answer."""
    for name in (HUB, REDIS):
        words = ("rollout", "status", f"statefulset/{name}", f"--timeout={READY_SECONDS}s")
        cluster.kubectl("-n", helm.NAMESPACE, *words)


def shortened(manifest: Path) -> dict[str, Any]:
    """The session, shorter, of two workers that may fail as often as they are killed."""
    document: dict[str, Any] = next(yaml.safe_load_all(manifest.read_text()))
    spec = document["spec"]
    spec["training"] |= SHORT["training"]
    spec["growth"]["gates"] |= SHORT["gates"]
    spec["runPolicy"] = {"backoffLimit": RETRIES}
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chaos and print what it came to as JSON; 0 where everything held."""
    parser = argparse.ArgumentParser(prog="make chaos-cluster", description=__doc__)
    parser.add_argument("--faults", type=int, default=Plan.faults)
    parser.add_argument("--seed", type=int, default=Plan.seed, help="what chance starts with")
    parser.add_argument("--session", type=Path, default=EXAMPLE, help="is shortened")
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    plan = replace(Plan(), faults=arguments.faults, seed=arguments.seed)
    place = layout()
    try:
        if place.way != SOURCE:
            raise ServerError(f"{place.state}: got {place.way or 'no cluster'}; allowed: {SOURCE}")
        with tempfile.TemporaryDirectory(prefix="chaos-cluster-") as temporary:
            folder = (arguments.folder or Path(temporary)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            document = shortened(arguments.session)
            outcome = run(SourceCluster(place), document, folder, plan, _say)
    except ServerError as error:
        sys.stderr.write(f"make chaos-cluster: {error}\n")
        return 1
    told = {"faults": outcome.faults, "figures": outcome.figures, "broken": outcome.broken}
    sys.stdout.write(json.dumps(told) + "\n")
    return 1 if outcome.broken else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
