"""kubectl, as the person has it: with their cluster, their rights and their ways to log in."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from esper.errors import BadInput, HubUnavailable, one_line

_FORWARDING = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+) ")
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
        HubUnavailable: it can't forward; the message is its own.
    """
    words = ["kubectl", f"--namespace={namespace}", "port-forward", f"service/{service}"]
    try:
        process = subprocess.Popen(
            [*words, f":{port}", "--address=127.0.0.1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except OSError as error:
        raise _missing() from error
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = _FORWARDING.match(line)
            if found is None:
                said = _said(line + process.stdout.read())
                raise HubUnavailable(f"{' '.join(words)} :{port}: {said}")
            yield int(found[1])
        finally:
            process.terminate()


_ALLOWED = "a name and a cluster (KUBECONFIG) for which kubectl finds it"


def _missing() -> BadInput:
    return BadInput("PATH", "no kubectl", "one; a cluster of make cluster says where its lies")


def _said(text: str) -> str:
    """The last line, which is for people: before it a server that does not answer is told often."""
    return one_line(text.strip().rpartition("\n")[2], _MESSAGE)
