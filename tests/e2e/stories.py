"""What happens in a namespace, as one hears it who watches: each change, and when it was heard."""

import json
import subprocess
import threading
import time
from contextlib import suppress
from datetime import datetime

from tools.cluster.programs import cluster_program

KINDS = {
    "session": "/apis/esper.dev/v1alpha1/namespaces/{}/trainingsessions",
    "pod": "/api/v1/namespaces/{}/pods",
    "event": "/api/v1/namespaces/{}/events",
}


class Story:
    """Watches a namespace's sessions, pods and Events; a context manager."""

    def __init__(self, cluster, namespace):
        self._heard = []
        self._watches = []
        for kind, path in KINDS.items():
            command = [
                *(str(cluster_program("kubectl")), f"--kubeconfig={cluster.layout.admin}"),
                *("get", "--raw", f"{path.format(namespace)}?watch=true"),
            ]
            watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self._watches.append(watch)
            threading.Thread(target=self._read, args=(kind, watch.stdout), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for watch in self._watches:
            watch.kill()
            watch.wait()

    def heard(self, kind, name=""):
        """When an object of the kind came to be how, in order; of names that begin so."""
        found = [entry for entry in self._heard if entry[0] == kind]
        return [(at, it) for _, at, it in found if it["metadata"]["name"].startswith(name)]

    def last(self, kind, name):
        """An object as it was last heard of; empty before."""
        found = [it for _, it in self.heard(kind, name) if it["metadata"]["name"] == name]
        return found[-1] if found else {}

    def first(self, kind, name, holds):
        """When it was first heard of an object that `holds` is true of, and that object."""
        for at, found in self.heard(kind, name):
            if holds(found):
                return at, found
        raise AssertionError(f"no {kind} {name} was ever so")

    def said(self, session, holds):
        """When a condition of the session was first one that `holds` is true of, and that."""

        def which(found):
            conditions = found.get("status", {}).get("conditions", ())
            return next((each for each in conditions if holds(each)), None)

        at, found = self.first("session", session, which)
        return at, which(found)

    def _read(self, kind, lines):
        with suppress(ValueError):
            for line in lines:
                self._heard.append((kind, time.time(), json.loads(line)["object"]))


def seconds(text):
    """A time of Kubernetes' as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


def terminated(pod):
    """How a pod's container has ended; empty while it has not."""
    statuses = pod["status"].get("containerStatuses") or [{}]
    return statuses[0].get("state", {}).get("terminated", {})
