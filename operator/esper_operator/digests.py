"""What tells one rendering of a manifest, or one status, from another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper.contracts.base import digest_of


def digest_of_object(data: Mapping[str, Any]) -> str:
    """The first 64 bits of the SHA-256 of its canonical JSON, in hexadecimal."""
    return digest_of(data)[:16]
