"""Which images a cluster was given last: a tag alone does not tell one from the next."""

from __future__ import annotations

import json

from tools.cluster.containers.layout import Layout


def note(cluster: Layout, image: str, identity: str) -> None:
    """Note, in the cluster's folder, what its nodes have under a name now."""
    noted = loaded(cluster) | {image: identity}
    new = cluster.images.with_suffix(".new")
    new.write_text(json.dumps(noted, indent=1))
    new.replace(cluster.images)


def loaded(cluster: Layout) -> dict[str, str]:
    """What was noted: each name's image, by the digest of its configuration."""
    if not cluster.images.exists():
        return {}
    found: dict[str, str] = json.loads(cluster.images.read_text())
    return found
