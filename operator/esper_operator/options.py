"""What the decisions and the manifests take from the operator's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pairs = tuple[tuple[str, str], ...]
PullPolicy = Literal["Always", "IfNotPresent", "Never"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """One installation's answers: images, addresses, limits."""

    image: str
    """Of workers whose session names none, of Tamiyo and of compile Jobs."""
    image_pull_policy: PullPolicy = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    """Names of Secrets, added to those of each session."""
    hub_url: str
    redis_url: str
    """With no user: each session has its own."""
    shared_memory: str = "1Gi"
    """Size of /dev/shm where a session does not say."""
    grace_seconds: int = 60
    """For a worker to write a checkpoint once it is asked to stop, where a session does not say."""
    tamiyo_requests: Pairs = (("cpu", "50m"), ("memory", "256Mi"))
    tamiyo_limits: Pairs = (("memory", "1Gi"),)
    compile_requests: Pairs = (("cpu", "500m"), ("memory", "512Mi"))
    compile_limits: Pairs = (("memory", "5Gi"),)
    compile_deadline_seconds: int = 900
    """After which a compile Job is given up."""
    compile_attempts: int = 5
    """Jobs that may fail to compile one kernel."""
    compile_ttl_seconds: int = 600
    """How long a compile Job that is done stays for its log."""
    kernels_per_session: int = 64
    """CompiledKernels that one session may ask for."""
    blueprints_per_session: int = 64
    """Blueprints of its namespace that one session is given."""
    worker_egress: str | None = None
    """Rules of a NetworkPolicy as JSON: where workers may connect to; None: they have no policy."""
    own_namespace: str = ""
    """Where the installation itself is."""
    own_secrets: tuple[str, ...] = ()
    own_claims: tuple[str, ...] = ()
    """Its Secrets and claims there, which no session may name."""
    pod_labels: Pairs = ()
    """Added to every pod, as for a NetworkPolicy."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"


def pairs_of(text: str) -> Pairs:
    """``"cpu=50m,memory=1Gi"`` as pairs, as the settings have them."""
    items = (item.partition("=") for item in text.split(",") if item)
    return tuple((name, value) for name, _, value in items)
