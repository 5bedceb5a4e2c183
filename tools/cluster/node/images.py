"""Images that this node has: names for environments of processes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_NAME = re.compile(
    r"[a-z0-9]+([._/:-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?"
)


@dataclass(frozen=True)
class Image:
    """An environment in which commands run: that of this Python unless it says otherwise.

    `entrypoint` is run where a container names no command; `environment` is laid over what this
    Python needs.
    """

    entrypoint: tuple[str, ...] = ("esper",)
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, container: Mapping[str, Any]) -> list[str]:
        """What a container runs, before anything in it is expanded."""
        entrypoint: Sequence[str] = container.get("command") or self.entrypoint
        arguments = container.get("args", ())
        return [*entrypoint, *arguments]

    def variables(self) -> dict[str, str]:
        """The variables that it brings along."""
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.defpath])
        return {"PATH": programs, "LANG": "C.UTF-8", **self.environment}


@dataclass(frozen=True)
class Images:
    """Images by name or glob, such as ``esper:*``."""

    known: Mapping[str, Image]

    def find(self, name: str) -> Image | None:
        """The image of that name, or None: there is none to pull."""
        for pattern, image in self.known.items():
            if fnmatchcase(name, pattern):
                return image
        return None


def is_image_name(name: str) -> bool:
    """Whether a name could be that of an image."""
    return _NAME.fullmatch(name) is not None
