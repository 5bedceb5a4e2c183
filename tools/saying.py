"""How the tools tell a person what happens: a line at once, wherever standard output leads."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Write a line to standard output, which a pipe or a log shows as soon."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
