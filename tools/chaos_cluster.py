"""`make chaos-cluster`: sessions train on a real kubelet while what they need is killed.

Operator leader, Tamiyo, Urza, Redis, a worker, a compile pod: each is killed on its node, or its
pod deleted without grace (`tools/cluster_faults.py`), while equal sessions of example 02
train one after the other until the faults are used up. Each has a namespace of its own,
and before each the kernels of the first are deleted from the hub, so that all are compiled anew but
those that somebody else's session uses. In the end nothing may be lost or done twice:

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from esper.errors import BadInput
from tools import helm
from tools.chaos_checks import Outcome, check_kernels, condition, kernels_of
from tools.chaos_kernels import Notes, forget
from tools.chaos_sessions import ClusterSession, check_session
from tools.cluster.containers.layout import SOURCE, BadState, Layout, layout
from tools.cluster.containers.source import SourceCluster
from tools.cluster_faults import Faults, course
from tools.manifests import session_document
from tools.real_cluster import HUB, REDIS, RealCluster
from tools.servers.process import ServerError

EXAMPLE = helm.ROOT / "examples" / "02-digits-cnn" / "session.yaml"
CHECKPOINT = {"everyEpochs": 3}
RETRIES = 1000
"""A worker that is killed is a failure, which `runPolicy.backoffLimit` bounds."""
READY_SECONDS = 180
UNDISTURBED = "undisturbed"
INTERRUPTED = 130


@dataclass(frozen=True)
class Plan:
    """How many faults, what chance starts with, and the most seconds between two."""

    faults: int = 20
    seed: int = 0
    longest: float = 10.0


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
        first = ClusterSession(real, manifest, f"{prefix}-{UNDISTURBED}")
        sessions.append(first)
        ended = condition(first.wait(), "Succeeded")
        if ended["status"] != "True":
            raise ServerError(f"the undisturbed session: {ended['reason']}: {ended['message']}")
        undisturbed = first.fetch(folder)
        kernels = kernels_of(undisturbed)
        say(f"the undisturbed session has ended after {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        seen, anew = _disturb(
            cluster, real, manifest, prefix, kernels, plan, sessions, outcome, say
        )
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
        notes.check(sorted(anew), outcome)
    finally:
        # The one after the last may have come as far as its namespace.
        names = [f"{prefix}-{name}" for name in (UNDISTURBED, *range(1, len(sessions) + 1))]
        words = ("delete", "namespace", *names, "--ignore-not-found", "--wait=false")
        steps: list[Callable[[], object]] = [
            partial(_await_release, real),  # the hub may just be away
            notes.end,
            partial(real.kubectl, *words),
        ]
        for step in steps:
            try:
                step()
            except ServerError as error:  # not in place of what has ended the campaign
                say(f"something is left behind: {error}")
                outcome.check(False, f"something is left behind: {error}")
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
) -> tuple[list[float], set[str]]:
    """The faults, one after the other, while a session trains.

    Returns:
        How soon the kubelet saw each, and the kernels that were to be compiled anew.
    """
    anew: set[str] = set()
    chance = random.Random(plan.seed)
    faults = Faults(cluster, chance)
    for number, fault in enumerate(course(plan.faults, chance), start=1):
        hit, begun = None, len(sessions)
        while hit is None:
            if len(sessions) > begun + 1:
                raise ServerError(f"{fault}: there was none to hit while a session trained")
            if len(sessions) == 1 or not sessions[-1].running:
                _await_release(real)
                gone = forget(real, kernels)
                if kept := set(kernels) - set(gone):
                    say(f"others train with {len(kept)} of {len(kernels)} kernels, which stay")
                anew.update(gone)
                sessions.append(ClusterSession(real, manifest, f"{prefix}-{len(sessions)}"))
                say(f"session {len(sessions) - 1} begins")
                sessions[-1].await_progress()
            session = sessions[-1]
            time.sleep(chance.uniform(0.0, plan.longest))
            hit = faults.bring(fault, session.namespace, lambda s=session: s.running)
        epoch = session.get().get("status", {}).get("epoch", 0)
        say(f"fault {number} of {plan.faults}: {fault}: {hit} (epoch {epoch})")
        outcome.faults.append(str(fault))
    return faults.seen, anew


def _await_release(cluster: RealCluster) -> None:
    """Wait until hub and Redis are ready: whoever asks them then has an answer."""
    for name in (HUB, REDIS):
        words = ("rollout", "status", f"statefulset/{name}", f"--timeout={READY_SECONDS}s")
        cluster.kubectl("-n", helm.NAMESPACE, *words)


def prepared(manifest: Path) -> dict[str, Any]:
    """The session, with more checkpoints, of workers that may fail as often as they are killed.

    Raises:
        BadInput: the manifest can't be read, or is refused.
    """
    document = session_document(manifest)
    spec = document["spec"]
    spec["runPolicy"] = {"backoffLimit": RETRIES}
    spec["training"] = spec.get("training", {}) | {"checkpoint": CHECKPOINT}
    # Without a share pods get next to nothing of a machine that is busy.
    share = {"resources": {"requests": {"cpu": "200m"}}}
    spec["workers"] = spec.get("workers", {}) | share
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chaos and print what it came to as JSON; 0 where everything held."""
    parser = argparse.ArgumentParser(prog="make chaos-cluster", description=__doc__)
    parser.add_argument("--faults", type=int, default=Plan.faults)
    parser.add_argument("--seed", type=int, default=Plan.seed, help="what chance starts with")
    parser.add_argument("--session", type=Path, default=EXAMPLE, help="that of the campaign")
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    plan = replace(Plan(), faults=arguments.faults, seed=arguments.seed)
    try:
        place = layout()
        if place.way != SOURCE:
            raise ServerError(_refused(place))
        with tempfile.TemporaryDirectory(prefix="chaos-cluster-") as temporary:
            folder = (arguments.folder or Path(temporary)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            document = prepared(arguments.session)
            outcome = run(SourceCluster(place), document, folder, plan, _say)
    except (ServerError, BadState, BadInput) as error:
        sys.stderr.write(f"make chaos-cluster: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("make chaos-cluster: interrupted\n")
        return INTERRUPTED
    told = {"faults": outcome.faults, "figures": outcome.figures, "broken": outcome.broken}
    sys.stdout.write(json.dumps(told) + "\n")
    return 1 if outcome.broken else 0


def _refused(place: Layout) -> str:
    """Why the cluster is not one whose containers can be killed, and the way out."""
    before = "make cluster-down, then " if place.way else ""
    said = f"{place.state}: got {f'a cluster of {place.way}' if place.way else 'no cluster'}"
    return f"{said}; allowed: one from {SOURCE} ({before}make cluster ARGUMENTS=--way={SOURCE})"


def _say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
