"""The S3 server's program: built once from its Go module, then found in the cache."""

from __future__ import annotations

from pathlib import Path

from tools.servers.go_programs import built_once, run_go

VERSION = "1.8.0"
MODULE = "github.com/versity/versitygw/cmd/versitygw"


def versitygw_binary() -> Path:
    """The program; the first call on a machine builds it, which takes one to three minutes.

    Raises:
        ServerError: there is no Go, or the build failed.
    """
    return built_once(f"versitygw-{VERSION}", _build)


def _build(program: Path) -> None:
    words = ["install", "-trimpath", "-ldflags=-s -w", f"{MODULE}@v{VERSION}"]
    run_go(words, program.parent, GOBIN=str(program.parent))
    (program.parent / "versitygw").rename(program)
