"""`make cluster-demo`: a cluster, its images, the chart, and an example that trains there.

It takes the cluster of `make cluster`, makes it where it is not up, and leaves it up. The example
is followed to its end in a namespace of its own, its grown model is fetched, and the same session
is trained once more outside of any cluster. What was seen is the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools import helm, kubectl
from tools.chaos_kernels import forget
from tools.cluster.containers import __main__ as clusters
from tools.cluster.containers.layout import BadState, Layout, layout
from tools.cluster.programs import cluster_program
from tools.cluster_demo import Demo, DemoFailed, DemoSession
from tools.images import __main__ as images
from tools.install import install, restricted
from tools.real_cluster import RealCluster
from tools.saying import say
from tools.servers.process import ServerError

FOLDER = Path("runs/cluster-demo")
EXAMPLE = Path("examples/02-digits-cnn/session.yaml")
NAMESPACE = "esper-demo"
INTERRUPTED = 130
_PROCESSES = 'for each in /proc/[0-9]*/cmdline; do tr "\\0" " " < $each; echo; done'


@dataclass(frozen=True)
class InstalledCluster:
    """A `DemoCluster` in which the chart is.

    Attributes:
        layout: the cluster.
        folder: where what is fetched from it goes.
        namespace: where the session goes.
        catalogue: where the release has its Blueprints.
    """

    layout: Layout
    folder: Path
    namespace: str = NAMESPACE
    catalogue: str = helm.NAMESPACE

    @property
    def kubeconfig(self) -> Path:
        """Of one who may do everything."""
        return self.layout.admin

    def kubectl(self, *words: str, given: str | None = None) -> str:
        """What kubectl prints in the namespace; see `DemoCluster.kubectl`."""
        own = f"--namespace={self.namespace}"
        return kubectl.run(own, *words, kubeconfig=self.kubeconfig, given=given)

    def forget(self, kernels: Sequence[str]) -> list[str]:
        """Have kernels made anew, but those in use; see `DemoCluster.forget`."""
        gone = forget(RealCluster(self.kubeconfig), kernels)
        if gone:  # where an object says that one is ready, nobody has it made
            self.kubectl("delete", "ck", *gone, "--ignore-not-found", "--cascade=foreground")
        return gone

    def processes(self, pod: str) -> list[str]:
        """The command lines of all that runs in a pod."""
        return self.kubectl("exec", pod, "--", "sh", "-c", _PROCESSES).splitlines()

    def mend(self) -> bool:
        """Nothing is to be mended: the cluster does it."""
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Do all of it; 0 where all that was checked holds.

    What was made stays, also where it breaks off: a second one goes on from there.
    """
    arguments = _parsed(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    seconds: dict[str, float] = {}
    try:
        cluster = layout()
        told = _told(cluster, arguments, seconds)
    except (ServerError, BadState, DemoFailed) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted: what was made stays; make cluster-demo goes on, make cluster-down ends")
        return INTERRUPTED
    _show(cluster, arguments.folder, seconds)
    say(json.dumps(told))
    return 0 if told["holds"] else 1


def _told(
    cluster: Layout, arguments: argparse.Namespace, seconds: dict[str, float]
) -> dict[str, object]:
    began = time.monotonic()
    clusters.way_to_make(cluster)  # who can't is told before programs are built for minutes
    session = DemoSession.read(arguments.session)
    with _step("programs", seconds):
        for name in ("kubectl", "helm"):
            cluster_program(name)
    with _step("cluster", seconds):
        _run(clusters.main, ["up"], "make cluster")
    with _step("images", seconds):
        _run(images.main, [], "make images")
    with _step("install", seconds):
        say(install((), cluster.admin).rstrip())
    restricted(NAMESPACE, cluster.admin)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    installed = InstalledCluster(cluster, arguments.folder)
    with _step("demo", seconds):
        told = Demo(installed, session, say, threading.Event()).run()
    seconds["all"] = round(time.monotonic() - began, 1)
    return {"way": cluster.way, "namespace": NAMESPACE, **told, "steps": seconds}


def _run(command: Callable[[Sequence[str]], int], words: Sequence[str], name: str) -> None:
    """Run another command's main function, which has said why where it fails."""
    if command(words) != 0:
        raise DemoFailed(f"{name} failed")


def _show(cluster: Layout, folder: Path, seconds: dict[str, float]) -> None:
    say("")
    for step, spent in seconds.items():
        say(f"{step:10} {spent:7.1f} s")
    program = cluster_program("kubectl")
    say("")
    say(f"The cluster is up, the grown model and its report are in {folder}/inside. What next:")
    say(f"  export KUBECONFIG={cluster.admin} PATH={program.parent}:$PATH")
    say(f"  kubectl -n {NAMESPACE} get ts,seeds,ck")
    say("  kubectl apply -f SESSION.yaml          # one of your own")
    say("  make cluster-down                      # ends the cluster; nothing of it is left")
    say("")


@contextmanager
def _step(name: str, seconds: dict[str, float]) -> Iterator[None]:
    say(f"== {name}")
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 1)
    say(f"== {name}: {seconds[name]:.1f} s")


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make cluster-demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument("--session", type=Path, default=EXAMPLE, help=f"default: {EXAMPLE}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
