"""Seeds for random streams, as functions of what they are for."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on `parts` alone, the same in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
