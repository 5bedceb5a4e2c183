"""Paths of a container, and the folders of this machine that stand for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_PART = r"A-Za-z0-9._-"


class PathMap:
    """Rewrites paths of a container wherever they stand in a text.

    A path is found as a whole or as the beginning of a longer one, never within one; the longest
    that fits counts. Folders of this machine that a pod may name itself stay as they are.

    Args:
        folders: what stands for each path of the container.
        own: folders of this machine that are named as such.
    """

    def __init__(self, folders: Mapping[str, Path], own: Sequence[Path] = ()) -> None:
        self._folders = {_bare(path): str(folder) for path, folder in folders.items()}
        self._folders |= {str(path): str(path) for path in own}
        longest = sorted(self._folders, key=len, reverse=True)
        names = "|".join(map(re.escape, longest)) or "(?!)"
        begins = rf"(?:(?<![/{_PART}])|(?<=://))"  # file:///path holds the path
        self._pattern = re.compile(rf"{begins}(?:{names})(?![{_PART}])")

    def rewritten(self, text: str) -> str:
        """`text` with every path of the container replaced."""
        return self._pattern.sub(lambda found: self._folders[found[0]], text)

    def folder(self, path: str) -> Path:
        """What stands for one path of the container; the path itself where nothing does."""
        return Path(self.rewritten(path))


def _bare(path: str) -> str:
    return path.rstrip("/") or "/"
