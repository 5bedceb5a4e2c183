"""The one error tree.

EsperError                  every error that Esper raises on purpose
├── BadInput                permanent · exit 2 · the person can mend it, nothing was written
│   ├── ManifestError       a field of a manifest or of a configuration file
│   ├── EntryPointError     a model, data or objective entry point
│   ├── DataError           datasets that are empty or that the model refuses
│   ├── BlueprintError      an IR graph that is malformed, too large or does not fit its host
│   ├── ConfigError         a setting from the command line, the environment or esper.yaml
│   ├── OutputError         an output directory that can't be used, or that is no run
│   ├── CheckpointError     a checkpoint that is incomplete, foreign, or of another version
│   ├── WrapError           a model or a layer that can't host seeds as asked
│   ├── AcceleratorMissing  a session that asks for GPUs where there are too few
│   ├── Unauthorized        a token that is missing, wrong, expired, or allows too little
│   └── NotFound            what was asked for by its name is not in the hub
│       ├── BlueprintNotFound   (a BlueprintError too)
│       └── KernelNotFound      (a KernelError too)
├── WorkFailed              permanent · exit 1 · the run is kept
│   ├── LossNotFinite       the loss stayed non-finite after every configured retry
│   ├── KernelError         a kernel that failed to compile, or whose bytes do not match its digest
│   ├── Superseded          a newer attempt of the same session has taken over
│   ├── Conflict            the hub's state refuses it: in use, changed meanwhile, a lease lost
│   └── StorageFull         the disk or the store has no room left
├── Unavailable             temporary · exit 1 · a later try may succeed
│   ├── HubUnavailable      Urza does not answer
│   ├── BusUnavailable      Oona does not answer
│   └── StoreUnavailable    the object store does not answer
└── Interrupted             temporary · exit 130 · a checkpoint was written

A message is one line: what it is about, what came, what is allowed, and which setting mends it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class EsperError(Exception):
    """Parent of every error raised by Esper.

    `permanent` says whether trying again unchanged can help; `exit_code` is the status with which
    a command ends that lets the error through.
    """

    permanent: ClassVar[bool] = True
    exit_code: ClassVar[int] = 1


class BadInput(EsperError):
    """Something a person wrote can't be used. Nothing was written."""

    exit_code = 2

    def __init__(self, field: str, came: object, allowed: str) -> None:
        self.field = field
        self.came = came
        self.allowed = allowed
        super().__init__(f"{field}: got {one_line(came)}; allowed: {allowed}")


class ManifestError(BadInput):
    """A field of a manifest has the wrong name, type or value."""


class EntryPointError(BadInput):
    """An entry point can't be imported, called, or returned something else than asked."""


class DataError(BadInput):
    """The datasets are missing, empty, or of a shape the model refuses."""


class BlueprintError(BadInput):
    """A blueprint's graph is malformed, above a size cap, or does not fit its host."""


class ConfigError(BadInput):
    """A setting of Esper itself is unknown or has a wrong value."""


class OutputError(BadInput):
    """An output directory can't be written, holds something else, or is no run."""


class CheckpointError(BadInput):
    """A checkpoint is incomplete, damaged, another session's or another version's."""


class WrapError(BadInput):
    """A model, or a layer named by the user, can't host seeds."""


class AcceleratorMissing(BadInput):
    """A session asks for GPUs, and this machine has too few that work."""


class Unauthorized(BadInput):
    """A bearer token is missing, wrong, expired, or does not allow what was asked."""


class NotFound(BadInput):
    """What was asked for by its name is not there."""


class BlueprintNotFound(BlueprintError, NotFound):
    """No blueprint of that digest was put into the hub."""


class WorkFailed(EsperError):
    """The work itself failed; what was reached so far is kept."""


class LossNotFinite(WorkFailed):
    """The training loss was not finite, also after rolling back as often as configured."""


class Superseded(WorkFailed):
    """A newer attempt of the same session has taken over; this one must change nothing more."""


class KernelError(WorkFailed):
    """A kernel can't be compiled, verified or built."""


class KernelNotFound(KernelError, NotFound):
    """No kernel of that id was requested from the hub."""


class ConflictReason(StrEnum):
    """Why the hub refuses; the word goes over the wire."""

    IN_USE = "InUse"
    STALE_VERSION = "StaleVersion"
    LEASE_LOST = "LeaseLost"
    REVOKED = "Revoked"


class Conflict(WorkFailed):
    """The hub's state refuses the request; asking again unchanged does not help."""

    def __init__(self, reason: ConflictReason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class StorageFull(WorkFailed):
    """No room left where the run writes."""


class Unavailable(EsperError):
    """A service did not answer; a later try may succeed."""

    permanent = False


class HubUnavailable(Unavailable):
    """Urza did not answer."""


class BusUnavailable(Unavailable):
    """Oona did not answer."""


class StoreUnavailable(Unavailable):
    """The object store did not answer."""


class Interrupted(EsperError):
    """A person or the system asked the run to stop; a checkpoint was written."""

    permanent = False
    exit_code = 130


def one_line(value: object, limit: int = 120) -> str:
    """`value` as one short line, for messages: no line breaks, at most `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split()) or "''"
    return text if len(text) <= limit else text[: limit - 1] + "…"
