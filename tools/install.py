"""`make install`: the chart in a cluster, with the images of `make images`.

The cluster is that of KUBECONFIG, else the one of `make cluster`. The chart is installed, or
upgraded, and waited for: in the cluster of `make cluster` pods whose image is another one under the
same tag are made anew. Then Helm's own test of it runs. Further arguments are Helm's: `make
install ARGUMENTS="--set operator.logLevel=debug"`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from tools import helm, kubectl
from tools.cluster.containers.layout import STATE, BadState, layout
from tools.cluster.containers.standing import runs
from tools.images.loaded import loaded
from tools.servers.process import ServerError

CONFIG = "KUBECONFIG"
WAIT = "5m"
IMAGE = "esper.dev/image"
"""Annotation of pods: which image they were made for, so that another one has them made anew."""
IMAGES = {"operator": "control", "urza": "control", "redis": "redis"}
"""Whose pods, and the chart's name of their image."""
LABELS = (
    "pod-security.kubernetes.io/enforce=restricted",
    "pod-security.kubernetes.io/warn=restricted",
)


def main(arguments: Sequence[str]) -> int:
    """Install, wait and test; 1 where one of them fails, with the reason in a line."""
    try:
        sys.stdout.write(install(arguments, chosen()))
    except (ServerError, BadState) as error:
        sys.stderr.write(f"make install: {error}\n")
        return 1
    return 0


def chosen() -> Path | None:
    """The kubeconfig of the cluster of `make cluster`; None where KUBECONFIG says another.

    A kubeconfig that nobody has named, as the one in a home directory, is not taken: its cluster
    may be one in which these images are not.

    Raises:
        ServerError: there is neither.
        BadState: the cluster's folder can't be one.
    """
    if os.environ.get(CONFIG):
        return None
    cluster = layout()
    if not runs(cluster):
        raise ServerError(
            f"{CONFIG}: got nothing, and no cluster runs in {cluster.state}; "
            f"allowed: a kubeconfig, or the cluster of make cluster ({STATE} names its folder)"
        )
    sys.stdout.write(f"{CONFIG} is not set: into the cluster of {cluster.state}\n")
    return cluster.admin


def install(arguments: Sequence[str], kubeconfig: Path | None) -> str:
    """Install, or upgrade, and wait; returns what Helm's test said.

    Raises:
        ServerError: one of them failed.
    """
    restricted(helm.NAMESPACE, kubeconfig)
    helm.run(
        *("upgrade", "--install", helm.RELEASE, str(helm.CHART)),
        *("--namespace", helm.NAMESPACE, "--values", str(helm.LOCAL_VALUES)),
        *("--wait", "--timeout", WAIT, *arguments),
        values=annotations(kubeconfig),
        kubeconfig=kubeconfig,
    )
    words = ("test", helm.RELEASE, "--namespace", helm.NAMESPACE, "--logs")
    return helm.run(*words, kubeconfig=kubeconfig)


def annotations(kubeconfig: Path | None) -> helm.Values:
    """The chart's values by which pods tell their image; none for a cluster that is not ours."""
    try:
        cluster = layout()
    except BadState:  # of which a cluster elsewhere needs none
        return {}
    config = kubeconfig or Path(os.environ.get(CONFIG, ""))
    known = loaded(cluster) if config.resolve() == cluster.admin else {}
    names = yaml.safe_load(helm.LOCAL_VALUES.read_text())["images"]
    found = {part: "{repository}:{tag}".format(**names[image]) for part, image in IMAGES.items()}
    return {
        part: {"podAnnotations": {IMAGE: known[name]}}
        for part, name in found.items()
        if name in known
    }


def restricted(namespace: str, kubeconfig: Path | None) -> None:
    """Have a namespace, and have the cluster refuse every pod in it that is not restricted.

    Raises:
        ServerError: the cluster refuses that, or does not answer.
    """
    manifest = f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n"
    words = ("apply", "--server-side", "-f", "-")
    kubectl.run(*words, kubeconfig=kubeconfig, given=manifest)
    kubectl.run("label", "--overwrite", "namespace", namespace, *LABELS, kubeconfig=kubeconfig)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
