"""Whether the cluster of a folder runs, whichever way it was made."""

from __future__ import annotations

from tools.cluster.containers.kind import KindCluster
from tools.cluster.containers.layout import KIND, Layout
from tools.cluster.containers.source import SourceCluster


def runs(cluster: Layout) -> bool:
    """Whether there is one, and all of it runs.

    Raises:
        ServerError: it is of kind, and Docker does not answer.
    """
    if cluster.way is None:
        return False
    if cluster.way == KIND:
        return KindCluster(cluster).running
    return SourceCluster(cluster).running
