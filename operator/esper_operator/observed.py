"""What a decision is made on: everything that is known of one object at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from esper.contracts.assets import Blueprint, CompiledKernel
from esper.contracts.kernels import KernelFigures
from esper.contracts.messages import KernelRequested
from esper.contracts.operational import SessionSnapshot
from esper_operator.pod_view import PodView
from esper_operator.views import (
    BlueprintView,
    DeploymentView,
    JobView,
    KernelView,
    MetaView,
    Said,
    SessionView,
)

Refusals = Mapping[str, Said]
"""The API server's last refusal of a child, by `Kind/name`: the reason of its Status (`Invalid`,
`Forbidden`) and its message. A child that was applied since is not in it. `Pod/<name of the Job>`
is for pods that the Job could not make, as an Event says."""


@dataclass(frozen=True)
class Observed:
    """A session, and all that was made for it."""

    session: SessionView
    now: float
    jobs: tuple[JobView, ...] = ()
    pods: tuple[PodView, ...] = ()
    metas: tuple[MetaView, ...] = ()
    """Its Service, its NetworkPolicy, its Secret and its Seeds."""
    tamiyo: DeploymentView | None = None
    """The controller that decides for it: its own, or the namespace's."""
    snapshot: SessionSnapshot | None = None
    """The newest from the bus, as last heard by this process."""
    heard: float | None = None
    """When this process heard it: workers' clocks may say anything."""
    seed_statuses: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Statuses of its Seeds as this process last wrote them, by uid; one that it has not written
    yet is missing."""
    seed_times: Mapping[str, float] = field(default_factory=dict)
    """When this process last wrote each of them."""
    refusals: Refusals = field(default_factory=dict)
    hearing_since: float | None = None
    """Since when the bus has answered without a break; None: it does not answer now. While nobody
    can hear a session, nobody can say that it stands still."""


@dataclass(frozen=True)
class BlueprintObserved:
    """A Blueprint, what the hub says of it, and what was compiled from it."""

    blueprint: BlueprintView
    now: float
    kernels: tuple[KernelView, ...] = ()
    stored: Blueprint | None = None
    """The hub's answer to its submission."""
    asked_at: float = 0.0
    """When it answered last."""
    same_answers: int = 0
    """How many of its answers in a row have said the same."""
    refused: Said | None = None
    """Why the hub did not take it: its error's class and message."""


@dataclass(frozen=True)
class KernelObserved:
    """A CompiledKernel, its compile Job, and what the hub says of the kernel."""

    kernel: KernelView
    now: float
    blueprint: BlueprintView | None = None
    job: JobView | None = None
    pods: tuple[PodView, ...] = ()
    """Of that Job."""
    secret: MetaView | None = None
    """The one of that Job."""
    stored: CompiledKernel | None = None
    figures: KernelFigures | None = None
    """What was measured of it, once it is compiled."""
    refusals: Refusals = field(default_factory=dict)
    refused: Said | None = None
    """Why the hub did not take the order."""


@dataclass(frozen=True)
class NamespaceObserved:
    """What shares a controller: the sessions of a namespace."""

    namespace: str
    now: float
    sessions: tuple[SessionView, ...] = ()
    tamiyo: DeploymentView | None = None
    secret: MetaView | None = None
    refusals: Refusals = field(default_factory=dict)


@dataclass(frozen=True)
class RequestsObserved:
    """Kernels that one session asks for on the bus, and those that there are."""

    session: SessionView
    requests: tuple[KernelRequested, ...]
    blueprints: tuple[BlueprintView, ...] = ()
    """Of the session's namespace."""
    kernels: tuple[KernelView, ...] = ()
    """Of the session's namespace."""
