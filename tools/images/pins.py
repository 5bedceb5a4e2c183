"""What the images install: `requirements.lock`, cut down to what each of them needs.

`python -m tools.images.pins` writes `images/pins` anew; with `--check` it only looks.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "images" / "pins"
HEAD = "# Made by `make lock` from requirements.lock; never edited by hand.\n"
_PARENT = re.compile(r"^    #(?: via|  ) +([A-Za-z0-9][A-Za-z0-9._-]*)", re.MULTILINE)

Entries = Mapping[str, str]
"""The text of each package's pins, by its name."""


def entries(lock: str) -> dict[str, str]:
    """The pins of a lock file; a package can have several, for several releases of Python."""
    found: dict[str, str] = defaultdict(str)
    for block in re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]:
        found[block.partition("==")[0]] += block
    return dict(found)


def closure(pinned: Entries, roots: Iterable[str]) -> set[str]:
    """The packages named, and all that they ask for.

    Raises:
        KeyError: the lock has none of that name.
    """
    asked = defaultdict(set)
    for name, block in pinned.items():
        for parent in _PARENT.findall(block):
            asked[canonicalize_name(parent)].add(name)
    found: set[str] = set()
    todo = {str(canonicalize_name(root)) for root in roots}
    while todo:
        name = todo.pop()
        if name not in pinned:
            raise KeyError(name)
        found.add(name)
        todo |= asked[canonicalize_name(name)] - found
    return found


def pins(lock: str, project: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the files in `images/pins`, by their names.

    Args:
        lock: the text of `requirements.lock`.
        project: the table `project` of `pyproject.toml`.
    """
    pinned = entries(lock)

    def needed(*extras: str) -> set[str]:
        lines = [*project["dependencies"]]
        for extra in extras:
            lines += project["optional-dependencies"][extra]
        return closure(pinned, (Requirement(line).name for line in lines))

    torch = closure(pinned, ["torch"])
    chosen = {
        # By itself, since it is a hundred times as big as all the rest, and seldom changes.
        "torch.txt": torch,
        "runtime.txt": needed("runtime", "bus", "s3", "zoo") - torch,
        "control.txt": needed("hub", "bus", "s3", "operator"),
        "build.txt": closure(pinned, ["hatchling"]),
    }
    return {
        file: HEAD + "".join(_bare(pinned[name]) for name in sorted(names))
        for file, names in chosen.items()
    }


def _bare(block: str) -> str:
    """A pin without who asks for it."""
    return re.sub(r"^    #.*\n", "", block, flags=re.MULTILINE)


def main(argv: Sequence[str]) -> int:
    """Write the files, or with `--check` say which are not up to date."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = pins((ROOT / "requirements.lock").read_text(), project)
    FOLDER.mkdir(parents=True, exist_ok=True)
    stale = [
        name
        for name, text in wanted.items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text
    ]
    if "--check" in argv:
        for name in stale:
            sys.stderr.write(f"images/pins/{name} is not up to date: make lock\n")
        return 1 if stale else 0
    for name in stale:
        (FOLDER / name).write_text(wanted[name])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
