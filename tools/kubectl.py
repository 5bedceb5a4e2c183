"""kubectl of the release that the cluster's programs have, with any kubeconfig."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tools.cluster.programs import cluster_program
from tools.servers.process import ServerError

SECONDS = 600.0


def run(*words: str, kubeconfig: Path | None = None, given: str | None = None) -> str:
    """What kubectl prints; `given` is its standard input.

    Without a kubeconfig that of the environment is used.

    Raises:
        ServerError: it ended with an error; the message is the last line of its own.
    """
    config = [] if kubeconfig is None else [f"--kubeconfig={kubeconfig}"]
    done = subprocess.run(
        [str(cluster_program("kubectl")), *config, *words],
        input=given or "",
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode:
        # A server that does not answer is told in many lines, of which the last is for people.
        said = done.stderr.strip().rpartition("\n")[2]
        raise ServerError(f"kubectl {' '.join(words)}: {said}")
    return done.stdout


def get(*words: str, kubeconfig: Path | None = None) -> Any:
    """What `kubectl get WORDS` finds, as an object.

    Raises:
        ServerError: it ended with an error.
    """
    return json.loads(run("get", *words, "-o", "json", kubeconfig=kubeconfig))
