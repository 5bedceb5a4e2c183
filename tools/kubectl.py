"""kubectl of the release that the cluster's programs have, with any kubeconfig."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.cluster.programs import cluster_program
from tools.servers.process import ServerError

SECONDS = 600.0
_LOGGED = re.compile(r"[EWI]\d{4} ")
"""How a line begins that kubectl's libraries log, again and again of a server that is away."""


def run(
    *words: str,
    kubeconfig: Path | None = None,
    given: str | None = None,
    seconds: float = SECONDS,
) -> str:
    """What kubectl prints; `given` is its standard input.

    Without a kubeconfig that of the environment is used.

    Raises:
        ServerError: it ended with an error, of which the message tells what is for people, or not
            within so many seconds.
    """
    config = [] if kubeconfig is None else [f"--kubeconfig={kubeconfig}"]
    command = f"kubectl {' '.join(words)}"
    try:
        done = subprocess.run(
            [str(cluster_program("kubectl")), *config, *words],
            input=given or "",
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"{command}: it has not ended after {seconds:g} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not _LOGGED.match(line)]
        raise ServerError(f"{command}: {'; '.join(said) or done.stderr.strip()}")
    return done.stdout


def get(*words: str, kubeconfig: Path | None = None) -> Any:
    """What `kubectl get WORDS` finds, as an object.

    Raises:
        ServerError: it ended with an error.
    """
    return json.loads(run("get", *words, "-o", "json", kubeconfig=kubeconfig))


def fetch(session: str, directory: Path, *, namespace: str | None, kubeconfig: Path) -> str:
    """What `esper fetch` says, which puts what a session has left into a folder, as for a person.

    Raises:
        ServerError: it ended with an error.
    """
    words = ["esper", "fetch", session, f"--output-dir={directory}", "--overwrite"]
    if namespace is not None:
        words.append(f"--namespace={namespace}")
    path = f"{cluster_program('kubectl').parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=os.environ | {"KUBECONFIG": str(kubeconfig), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    said = (done.stdout + done.stderr).rstrip()
    if done.returncode:
        raise ServerError(f"{' '.join(words)}: exit code {done.returncode}: {said}")
    return said
