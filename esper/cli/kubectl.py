"""kubectl, as the person has it: with their cluster, their rights and their ways to log in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryFile
from typing import Any

from esper.cli.process_tree import die_with_parent
from esper.errors import BadInput, HubUnavailable, one_line

FORWARD_SECONDS = 30.0
"""As long as kubectl may take until it forwards."""
_FORWARDING = re.compile(r"^Forwarding from 127\.0\.0\.1:(\d+) ", re.MULTILINE)
_REQUEST_SECONDS = 30
_STOP_SECONDS = 5.0
_LOOK_SECONDS = 0.05
_READ_BYTES = 2**20
_MESSAGE = 500


class Kubectl:
    """Commands of kubectl in one namespace.

    Args:
        namespace: None for the one that kubectl takes by itself.
    """

    def __init__(self, namespace: str | None) -> None:
        self._namespace = [] if namespace is None else [f"--namespace={namespace}"]

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """An object.

        Raises:
            BadInput: there is no kubectl, or it ended with an error, which the message tells.
        """
        words = ["kubectl", *self._namespace, "get", kind, name, "--output=json"]
        words.append(f"--request-timeout={_REQUEST_SECONDS}s")
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except OSError as error:
            raise _missing() from error
        if done.returncode:
            raise BadInput(f"kubectl get {kind} {name}", _said(done.stderr), _ALLOWED)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@contextmanager
def forwarded(service: str, namespace: str, port: int) -> Iterator[int]:
    """A port of this machine's loopback that leads to a Service of the cluster, while it lasts.

    Raises:
        BadInput: there is no kubectl.
        HubUnavailable: it can't forward, or does not within `FORWARD_SECONDS`; the message is its
            own.
    """
    words = ["kubectl", f"--namespace={namespace}", "port-forward", f"service/{service}"]
    words.append(f":{port}")
    # A file never fills up as a pipe does, whatever kubectl goes on to say.
    with TemporaryFile() as told:
        try:
            process = subprocess.Popen(
                [*words, "--address=127.0.0.1"],
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        except OSError as error:
            raise _missing() from error
        try:
            yield _port(process, told.fileno(), " ".join(words))
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(process: subprocess.Popen[bytes], told: int, command: str) -> int:
    """The port that kubectl says it forwards from; warnings may stand before it."""
    deadline = time.monotonic() + FORWARD_SECONDS
    while True:
        status, late = process.poll(), time.monotonic() > deadline
        text = os.pread(told, _READ_BYTES, 0).decode(errors="replace")
        found = _FORWARDING.search(text)
        if found is not None:
            return int(found[1])
        if status is not None:
            raise HubUnavailable(f"{command}: {_said(text)}")
        if late:
            raise HubUnavailable(f"{command}: no port after {FORWARD_SECONDS:g} s: {_said(text)}")
        time.sleep(_LOOK_SECONDS)


_ALLOWED = "a name and a cluster (KUBECONFIG) for which kubectl finds it"


def _missing() -> BadInput:
    return BadInput("PATH", "no kubectl", "one; a cluster of make cluster says where its lies")


def _said(text: str) -> str:
    """The last line, which is for people: before it a server that does not answer is told often."""
    last = text.strip().rpartition("\n")[2]
    return one_line(last, _MESSAGE) if last else "it said nothing"
