"""What is to be written: the outcome of a decision, carried out in this order.

First the status, then what is to be gone, then what is to be made, each in its order. A status
that is written first is what makes an attempt count once: whoever decides again after a crash finds
the new attempt in it, and carries on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Manifest = Mapping[str, Any]
"""A whole object to be applied by the operator's own field manager."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """An object to be deleted, if it still is the one that was seen."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str
    """Precondition of the deletion: an object made anew in its place stays."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A Kubernetes Event about the object that was decided on."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    background: bool = False
    """Whether it is left out while as much is written in the background as may be."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A blueprint that the hub is to be given, JSON-ready; to give it again changes nothing."""

    document: Manifest
    digest: str


@dataclass(frozen=True, slots=True)
class KernelOrder:
    """A kernel that the hub is to be asked for, so that a compile Job finds it there."""

    kernel: str
    blueprint_digest: str
    target: Manifest


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done about one object; an empty one does nothing."""

    status: Manifest | None = None
    """The whole status to be applied, without the object around it; None where it is written."""
    delete: tuple[Deletion, ...] = ()
    apply: tuple[Manifest, ...] = ()
    child_statuses: tuple[Manifest, ...] = ()
    """Objects with a status and no spec, for the status subresource: those of Seeds."""
    notices: tuple[Notice, ...] = ()
    again_in: float | None = None
    """Seconds until it must be looked at again though nothing has happened; None: never."""
    credentials: bool = False
    """Whether its Secret has to be made, which only the hub can fill."""
    submit: Submission | None = None
    order: KernelOrder | None = None
