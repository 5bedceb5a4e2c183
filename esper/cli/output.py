"""What commands write: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping


def write_result(text: str) -> None:
    """One line, or one document, of what was asked for."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def write_json(result: Mapping[str, object]) -> None:
    """`result` as one line of JSON, the last that a command with `--json` writes.

    Raises:
        ValueError: a number in it is not finite.
    """
    write_result(json.dumps(result, ensure_ascii=False, allow_nan=False))


def write_note(text: str) -> None:
    """One line about the work, for the person who watches it."""
    sys.stderr.write(text + "\n")
