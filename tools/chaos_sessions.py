"""A session on a cluster whose parts are killed, and what must hold of it in the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import kubectl
from tools.chaos_checks import (
    MODEL,
    Outcome,
    check_transitions,
    compare,
    condition,
    lines,
    same_model,
    was_compiled,
)
from tools.real_cluster import RealCluster
from tools.servers.process import ServerError

SESSION_SECONDS = 1800.0
LOOK_SECONDS = 1.0


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

    def await_progress(self) -> None:
        """Wait until it has told of an epoch, or ended: before, there is nothing to lose."""
        while self.running and not self.get().get("status", {}).get("epoch"):
            time.sleep(LOOK_SECONDS)

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
        """What it has left, once it has succeeded, in a folder called as its namespace."""
        place, config = folder / self.namespace, self.cluster.kubeconfig
        kubectl.fetch(self.name, place, namespace=self.namespace, kubeconfig=config)
        return place


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
    outcome.check(same_model(undisturbed, place), f"{where}: {MODEL} differs")
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
        "compiled": sum(map(was_compiled, session.items("compiledkernels"))),
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
