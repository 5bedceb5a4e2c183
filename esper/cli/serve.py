"""`esper serve`: one service as a process, until a signal stops it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.configs import EsperConfig

HELP = "run one service: urza, tezzeret, tamiyo or tolaria"
SERVICES = ("urza", "tezzeret", "tamiyo", "tolaria")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    command.add_argument("service", choices=SERVICES, metavar="SERVICE", help=", ".join(SERVICES))
    command.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="tolaria: the session's manifest"
    )
    command.add_argument(
        "--output-dir",
        type=Path,
        metavar="D",
        help="tolaria: where the run writes, and goes on (default: runs/<session>)",
    )
    command.add_argument(
        "--session",
        metavar="UID",
        help="tamiyo: decide for this session only (default: for all of redis.namespace)",
    )


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Serve; 0 when a signal has stopped it, or when tolaria's session is trained.

    Raises:
        BadInput: a setting or an argument can't be used.
        EsperError: what ended the service.
    """
    from esper.cli import serving
    from esper.errors import BadInput

    if arguments.session is not None and arguments.service != "tamiyo":
        raise BadInput("--session", arguments.session, "with tamiyo only")
    if arguments.service == "tolaria":
        if arguments.file is None:
            raise BadInput("FILE", "nothing", "the manifest of the session that tolaria trains")
        return serving.serve_tolaria(config, arguments.file, arguments.output_dir)
    for name in ("file", "output_dir"):
        if getattr(arguments, name) is not None:
            raise BadInput("FILE, --output-dir", str(getattr(arguments, name)), "with tolaria only")
    if arguments.service == "tamiyo":
        return serving.serve_tamiyo(config, arguments.session)
    serve = {"urza": serving.serve_urza, "tezzeret": serving.serve_tezzeret}[arguments.service]
    return serve(config)
