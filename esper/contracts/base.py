"""What every contract shares."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


def _within_utc(value: datetime) -> datetime:
    """Refuse the first and last hours of the calendar where UTC is in a year that it has not."""
    try:
        value.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("a time from year 1 to 9999 in UTC") from error
    return value


AwareTime = Annotated[AwareDatetime, AfterValidator(_within_utc)]
"""A time with its offset that can be told in UTC."""


class Contract(BaseModel):
    """Frozen, closed, camelCase on the wire and snake_case in Python.

    Non-finite floats travel as strings ("NaN", "Infinity"), so that what was measured is what
    arrives.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        populate_by_name=True,
        ser_json_inf_nan="strings",
    )

    def to_wire(self) -> dict[str, object]:
        """The contract as JSON-ready data, absent optional fields left out."""
        # By way of text: only there does pydantic write non-finite floats as strings.
        data: dict[str, object] = json.loads(self.model_dump_json(by_alias=True, exclude_none=True))
        return data


def canonical_json(data: object) -> bytes:
    """JSON with sorted keys and no spaces: equal data, equal bytes.

    Raises:
        ValueError: a float is not finite.
    """
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_of(data: object) -> str:
    """SHA-256 of `canonical_json(data)`, in hex."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


def utc_now() -> datetime:
    """The time now, aware, in UTC."""
    return datetime.now(UTC)
