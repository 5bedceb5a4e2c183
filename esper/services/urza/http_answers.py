"""What goes to the hub and what comes back, checked on this side."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from pydantic import ValidationError

from esper.contracts.base import Contract
from esper.contracts.enums import BlueprintState
from esper.errors import (
    BadInput,
    BlueprintNotFound,
    Conflict,
    ConflictReason,
    EsperError,
    Unauthorized,
    WorkFailed,
    one_line,
)
from esper.services.urza.problems import Problem

Params = dict[str, str | list[str]]
Answer = TypeVar("Answer", bound=Contract)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LEASE = re.compile(r"[0-9a-f]{32}")
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")


def hub_error(status: int, problem: bytes) -> EsperError:
    """The error that the hub raised, or, where what answered is no hub, one that says so."""
    try:
        error = Problem.model_validate_json(problem).error()
    except ValidationError:
        return WorkFailed(
            f"the hub: got HTTP {status} without a problem; allowed: 200; see hub.url"
        )
    if isinstance(error, Unauthorized):
        return Unauthorized("hub.token", f"{error.field}: {error.came}", error.allowed)
    return error


def read_answer(kind: type[Answer], data: bytes, path: str) -> Answer:
    """The hub's answer as the contract it is.

    Raises:
        WorkFailed: it is none.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise WorkFailed(
            f"the hub's answer to {path} is no {kind.__name__}: {one_line(str(error))}; see hub.url"
        ) from error


def built(kind: type[Answer], **fields: object) -> Answer:
    """The body of a request; what it refuses, the hub would have refused."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = " ".join(str(part) for part in first["loc"])
        raise BadInput(place.replace("_", " "), first.get("input"), first["msg"]) from error


def given(**params: str | None) -> Params:
    """The parameters of a query, those that are None left out."""
    return {name: value for name, value in params.items() if value is not None}


def in_states(states: Iterable[BlueprintState]) -> Params:
    """The parameters of a query for what is in one of these states."""
    return {"states": [state.value for state in states]}


# What stands in a path is looked at first, so that it leads nowhere else.


def checked_digest(digest: str) -> str:
    """`digest`, which may stand in a path.

    Raises:
        BlueprintNotFound: it is none.
    """
    if not _DIGEST.fullmatch(digest):
        raise BlueprintNotFound("blueprint digest", digest, "a SHA-256, 64 hex digits")
    return digest


def checked_uid(uid: str) -> str:
    """`uid`, which may stand in a path.

    Raises:
        BadInput: it is no session's.
    """
    if not _UID.fullmatch(uid):
        raise BadInput("session uid", uid, "1 to 63 letters, digits and dashes")
    return uid


def held_lease(lease: str) -> str:
    """`lease`, which may stand in a request.

    Raises:
        Conflict: it is none that the hub gives.
    """
    if not _LEASE.fullmatch(lease):
        raise Conflict(ConflictReason.LEASE_LOST, "lease: got none that a claim gave")
    return lease
