"""Empties NVIDIA's libraries in an image for machines without a GPU.

PyTorch is linked against them, so that it can't be imported without; but on the CPU it calls none
of them. Each big one that a process has mapped, once it has imported PyTorch, gives way to a
library of the same name that has the functions for which PyTorch asks, all of which end the
process. What was not mapped is removed. The small ones, which PyTorch asks whether there is a GPU,
stay as they are.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

BIG_BYTES = 8 * 2**20
FUNCTIONS = "TtWwi"
"""What nm calls functions; the rest are variables."""
VARIABLE_BYTES = 4096
"""More than any of those variables has."""


class Symbol(NamedTuple):
    """What a library defines, or asks for, by name; the version and the kind as nm tells them."""

    name: str
    version: str
    kind: str


def symbols(library: Path, which: str) -> list[Symbol]:
    """The names that a library defines (`--defined-only`), or asks for (`--undefined-only`)."""
    said = subprocess.run(
        ["nm", "--dynamic", "--format=posix", which, str(library)],
        check=True,
        capture_output=True,
        text=True,
    )
    words = (line.split() for line in said.stdout.splitlines())
    found = ((name.partition("@"), kind) for name, kind, *_ in words)
    return [Symbol(name, version.lstrip("@"), kind) for (name, _, version), kind in found]


def empty(path: Path, kept: list[Symbol]) -> None:
    """Put a library in the place of another, that has some of its names and nothing behind them."""
    lines = [
        f"void {each.name}(void) {{ __builtin_trap(); }}"
        if each.kind in FUNCTIONS
        else f"char {each.name}[{VARIABLE_BYTES}];"
        for each in sorted(kept)
    ]
    versions: dict[str, list[str]] = {}
    for each in sorted(kept):
        if each.version:
            versions.setdefault(each.version, []).append(f"{each.name};")
    script = "".join(f"{name} {{ {' '.join(of)} }};\n" for name, of in versions.items())
    with tempfile.TemporaryDirectory() as folder:
        source, listed, made = (Path(folder) / name for name in ("a.c", "a.map", path.name))
        source.write_text("\n".join(lines))
        listed.write_text(script or "{ global: *; };")
        subprocess.run(
            [
                *("g++", "-x", "c", "-w", "-fno-builtin", "-shared", "-fPIC", "-nostdlib", "-s"),
                *(f"-Wl,-soname,{path.name}", f"-Wl,--version-script={listed}"),
                *("-o", str(made), str(source)),
            ],
            check=True,
        )
        path.unlink()  # never into a file that a cache may share
        path.write_bytes(made.read_bytes())


def size(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    """Do so for the PyTorch of this Python; 0 where it has such libraries."""
    import torch
    import torch.distributed
    import torch.utils.data

    root = Path(torch.__file__).parents[1]
    nvidia = root / "nvidia"
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = {Path(line.split(maxsplit=5)[-1]) for line in lines if str(nvidia) in line}
    if not loaded:
        sys.stderr.write(f"{nvidia}: got nothing that PyTorch has loaded\n")
        return 1
    big = {path for path in loaded if path.stat().st_size > BIG_BYTES}
    callers = [*(root / "torch").rglob("*.so*"), *(loaded - big)]
    called = {symbol.name for path in callers for symbol in symbols(path, "--undefined-only")}
    before = size(nvidia)
    for path in big:
        empty(path, [each for each in symbols(path, "--defined-only") if each.name in called])
    for path in nvidia.rglob("*"):
        if path.is_file() and path not in loaded and path.suffix != ".py":
            path.unlink()
    mebibytes = [count // 2**20 for count in (before, size(nvidia))]
    sys.stdout.write("NVIDIA's libraries: {} MiB before, {} MiB now\n".format(*mebibytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
