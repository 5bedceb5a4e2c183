"""What happens in a namespace, as one hears it who watches: each change, and when it was heard."""

import json
import subprocess
import threading
import time
from datetime import datetime

from tools.cluster.programs import cluster_program

KINDS = {
    "session": "/apis/esper.dev/v1alpha1/namespaces/{}/trainingsessions",
    "pod": "/api/v1/namespaces/{}/pods",
    "event": "/api/v1/namespaces/{}/events",
}


class Told:
    """What was heard of objects, by kind; whoever asks is told when no more is heard."""

    def __init__(self):
        self._heard = []
        self._ended = ""

    def heard(self, kind, name=""):
        """When an object of the kind came to be how, in order; of names that begin so."""
        if self._ended:
            raise AssertionError(self._ended)
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

    def take(self, kind, lines):
        """Hear what a watch of a kind writes, until it ends, which it is not to do by itself."""
        try:
            for line in lines:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    self.end(f"the watch of each {kind} broke: {event['object']}")
                    return
                self._heard.append((kind, time.time(), event["object"]))
            self.end(f"the watch of each {kind} has ended")
        except ValueError as error:
            self.end(f"the watch of each {kind} broke off: {error}")

    def end(self, why):
        """No more is heard, for the first reason that there was."""
        self._ended = self._ended or why


class Story(Told):
    """Watches a namespace's sessions, pods and Events; a context manager."""

    def __init__(self, cluster, namespace):
        super().__init__()
        self._watches = []
        for kind, path in KINDS.items():
            command = [
                *(str(cluster_program("kubectl")), f"--kubeconfig={cluster.layout.admin}"),
                *("get", "--raw", f"{path.format(namespace)}?watch=true"),
            ]
            watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self._watches.append(watch)
            threading.Thread(target=self.take, args=(kind, watch.stdout), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Hear no more; who waits for something in it does so no longer."""
        self.end("nobody listens any more")
        for watch in self._watches:
            watch.kill()
            watch.wait()


def seconds(text):
    """A time of Kubernetes' as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


def container(pod):
    """The status of a pod's container; empty while it has none."""
    return (pod["status"].get("containerStatuses") or [{}])[0]


def terminated(pod):
    """How a pod's container has ended; empty while it has not."""
    return container(pod).get("state", {}).get("terminated", {})


def started(pod):
    """When a pod's container began to run, in seconds since 1970; None while it does not run."""
    running = container(pod).get("state", {}).get("running")
    return None if running is None else seconds(running["startedAt"])


def next_report(told, session, before):
    """The session's status by the first report after a worker began that is none of `before`.

    Args:
        told: what was heard.
        session: its name.
        before: uids of the workers that there were.

    Returns:
        None while there was no such report.
    """
    begun = [
        at
        for _, pod in told.heard("pod", f"{session}-")
        if pod["metadata"].get("labels", {}).get("esper.dev/role") == "worker"
        and pod["metadata"]["uid"] not in before
        and (at := started(pod)) is not None
    ]
    for _, found in told.heard("session", session) if begun else ():
        status = found.get("status", {})
        if reported(status) >= begun[0]:
            return status
    return None


def reported(status):
    """When the report came that a status shows, in seconds since 1970; 0 before the first."""
    return seconds(status.get("lastHeartbeatTime") or "1970-01-01T00:00:00Z")


def figures(told, session, *, since=0.0):
    """The metrics that were told of each epoch by reports from then on: one text, or several."""
    found = {}
    for _, one in told.heard("session", session):
        status = one.get("status", {})
        if status.get("metrics") and reported(status) >= since:
            text = json.dumps(status["metrics"], sort_keys=True)
            found.setdefault(status.get("epoch", 0), set()).add(text)
    return found
