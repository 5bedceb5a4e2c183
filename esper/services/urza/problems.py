"""How the hub says what went wrong: problem details (RFC 9457), one kind for each error class.

`type` is what a client goes by: it raises the same error here that the hub raised there, with the
same text. No trace and nothing of a token or a password is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field

from esper.contracts.base import Contract
from esper.errors import (
    BadInput,
    BlueprintError,
    BlueprintNotFound,
    Conflict,
    ConflictReason,
    EsperError,
    HubUnavailable,
    KernelError,
    KernelNotFound,
    NotFound,
    StorageFull,
    StoreUnavailable,
    Unauthorized,
    Unavailable,
    WorkFailed,
    one_line,
)

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:esper:problem:"
MAX_DETAIL_CHARACTERS = 2000

KINDS: Mapping[str, tuple[type[EsperError], int, str]] = {
    "blueprint-not-found": (BlueprintNotFound, 404, "No such blueprint"),
    "kernel-not-found": (KernelNotFound, 404, "No such kernel"),
    "not-found": (NotFound, 404, "Not found"),
    "unauthorized": (Unauthorized, 401, "Not authorized"),
    "blueprint-error": (BlueprintError, 422, "The blueprint is not allowed"),
    "bad-input": (BadInput, 422, "The request is not allowed"),
    "conflict": (Conflict, 409, "The hub's state refuses the request"),
    "kernel-error": (KernelError, 422, "The kernel is not allowed"),
    "storage-full": (StorageFull, 507, "No room left"),
    "work-failed": (WorkFailed, 422, "The work failed"),
    "store-unavailable": (StoreUnavailable, 503, "The object store does not answer"),
    "hub-unavailable": (HubUnavailable, 503, "The hub's database does not answer"),
    "unavailable": (Unavailable, 503, "A service does not answer"),
}
"""Each kind's error, status and title; an error has the first kind whose class it is of."""


class Problem(Contract):
    """What went wrong. `detail` is for people, `type` for programs.

    `field`, `got` and `allowed` are the parts of a refused input, `reason` that of a conflict.
    """

    type: Annotated[str, Field(examples=["urn:esper:problem:kernel-not-found"])]
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    field: str | None = None
    got: str | None = None
    allowed: str | None = None
    reason: ConflictReason | None = None

    @classmethod
    def of(cls, error: EsperError, status: int | None = None) -> Self:
        """The problem that `error` is; `status` where its kind's own does not fit."""
        kind, (_, usual, title) = next(
            (kind, entry) for kind, entry in KINDS.items() if isinstance(error, entry[0])
        )
        parts: dict[str, str] = {}
        if isinstance(error, BadInput):
            parts = {
                "field": _text(error.field),
                "got": _text(one_line(error.came)),
                "allowed": _text(error.allowed),
            }
        return cls.model_validate(
            {
                "type": TYPE_PREFIX + kind,
                "title": title,
                "status": status or usual,
                "detail": _text(str(error)),
                **parts,
                "reason": error.reason if isinstance(error, Conflict) else None,
            }
        )

    def error(self) -> EsperError:
        """The error that this problem was made of, with the same text; never None."""
        kind = KINDS.get(self.type.removeprefix(TYPE_PREFIX), KINDS["work-failed"])[0]
        if issubclass(kind, Conflict):
            return Conflict(self.reason or ConflictReason.STALE_VERSION, self.detail)
        if issubclass(kind, BadInput):
            return kind(self.field or "request", self.got or "", self.allowed or self.detail)
        return kind(self.detail)


def _text(text: str) -> str:
    """One line that UTF-8 can carry: what came may hold half a character."""
    return one_line(text, MAX_DETAIL_CHARACTERS).encode(errors="backslashreplace").decode()
