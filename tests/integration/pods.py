"""Pods for tests, and how to wait for what becomes of them."""

from __future__ import annotations

import json
from typing import Any

from tools.cluster.control_plane import wait_for

SECONDS = 60.0
HEEDS = """
import signal, sys, time
def end(*_):
    open('/dev/termination-log', 'w').write('asked')
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
print('ready', flush=True)
time.sleep(600)
"""
"""Runs until it is asked to end; says so, and leaves with 75."""
SERVES = """
import http.server, os, pathlib
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        good = pathlib.Path(f"/state{self.path}").exists()
        self.send_response(200 if good else 503)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("", 8080), Answers).serve_forever()
"""
"""Answers 200 on port 8080 for the files of /state, else 503."""


def pod(name: str, code: str = "", *, container: dict[str, Any] | None = None, **spec: Any) -> Any:
    """A pod of one container that runs Python code; never started again unless `spec` says so."""
    main = {"name": "main", "image": "esper:test", "command": ["python", "-c", code]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "containers": [{**main, **(container or {})}],
            **spec,
        },
    }


def claim(name: str) -> Any:
    """A claim, which the node of processes takes for bound."""
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    metadata = {"name": name}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def apply(plane, namespace, *documents):
    """Make objects, or change them."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)})
    plane.kubectl("apply", "--server-side", "-n", namespace, "-f", "-", given=text)


def find(plane, namespace, name, kind="pods", group="api/v1"):
    """An object as it is now, or None."""
    with plane.client() as client:
        answer = client.get(f"/{group}/namespaces/{namespace}/{kind}/{name}")
        return answer.json() if answer.is_success else None


def wait_for_pod(plane, namespace, name, holds, *, seconds=SECONDS):
    """The pod, once `holds(pod)`."""
    seen = []

    def found():
        there = find(plane, namespace, name)
        seen[:] = [there and there["status"]]
        return there if there is not None and holds(there) else None

    try:
        return wait_for(found, f"{name} did not get there", seconds=seconds)
    except Exception as error:
        raise AssertionError(f"{error}; last seen: {json.dumps(seen, indent=1)}") from None


def wait_for_phase(plane, namespace, name, phase):
    """The pod, once it is in that phase."""
    return wait_for_pod(plane, namespace, name, lambda pod: pod["status"].get("phase") == phase)


def wait_for_end(plane, namespace, name):
    """The pod, once it has succeeded or failed."""
    over = ("Succeeded", "Failed")
    return wait_for_pod(plane, namespace, name, lambda pod: pod["status"].get("phase") in over)


def wait_until_gone(plane, namespace, name):
    """Until there is no such pod."""
    wait_for(
        lambda: find(plane, namespace, name) is None, f"{name} is still there", seconds=SECONDS
    )


def state(pod, container=0):
    """The kind of state of a container, and what it says."""
    ((kind, said),) = pod["status"]["containerStatuses"][container]["state"].items()
    return kind, said


def conditions(pod):
    """The status of each condition."""
    return {c["type"]: c["status"] for c in pod["status"].get("conditions", ())}


def waits(reason):
    """Whether the first container waits for that reason."""

    def holds(pod):
        statuses = pod["status"].get("containerStatuses")
        return bool(statuses) and state(pod)[1].get("reason") == reason

    return holds


def wait_for_words(plane, namespace, name, words):
    """Until the pod's log holds `words`."""
    wait_for(
        lambda: words in plane.try_kubectl("logs", "-n", namespace, name).stdout,
        f"{name} does not say {words}",
    )
