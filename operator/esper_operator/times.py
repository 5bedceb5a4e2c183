"""Times as the decisions reckon with them: seconds since the epoch, in UTC."""

from __future__ import annotations

from datetime import UTC, datetime


def seconds_of(text: object) -> float | None:
    """RFC 3339 as the API server writes it, in seconds; None where there is none."""
    if not isinstance(text, str) or not text:
        return None
    return datetime.fromisoformat(text).timestamp()


def text_of(seconds: float) -> str:
    """`seconds` as metav1.Time: whole seconds, in UTC."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def datetime_of(seconds: float) -> datetime:
    """`seconds` as an aware time, whole as the API server keeps it."""
    return datetime.fromtimestamp(int(seconds), UTC)
