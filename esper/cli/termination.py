"""What a container says last: reason and message, where Kubernetes looks for them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TERMINATION_LOG = Path("/dev/termination-log")
"""Where Kubernetes makes a file for what a container says last."""
MAX_BYTES = 4096
"""Kubernetes keeps so many of it."""


def add_termination_log(command: argparse.ArgumentParser) -> None:
    """The option of a command that pods run."""
    command.add_argument(
        "--termination-log",
        type=Path,
        metavar="P",
        help=f"file for reason and message as JSON (default: {TERMINATION_LOG}, if it exists)",
    )


def leave(arguments: argparse.Namespace, reason: str, message: str) -> None:
    """Leave how a command ended, unless it is none that pods run.

    The file may be one that can't be replaced; one that can't be written is no error.
    """
    log = getattr(arguments, "termination_log", None)
    if log is None and hasattr(arguments, "termination_log") and TERMINATION_LOG.exists():
        log = TERMINATION_LOG
    if log is None:
        return
    try:
        log.write_text(termination_text(reason, message), encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"esper: nothing is left in {log}: {error.strerror}\n")


def termination_text(reason: str, message: str) -> str:
    """Both as one JSON object of at most `MAX_BYTES` bytes; the message is cut where it must be."""
    while True:
        text = json.dumps({"reason": reason, "message": message}, ensure_ascii=False)
        excess = len(text.encode()) - MAX_BYTES
        if excess <= 0:
            return text
        # A character has six bytes at most, escaped: what is cut is never too much by far.
        message = message[: -max(1, excess // 6) - 1] + "…"
