"""`esper validate`: everything that `esper run` would refuse, found without training or writing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from esper.cli.output import write_json, write_result

if TYPE_CHECKING:
    from esper.configs import EsperConfig

HELP = "check a manifest, its entry points and its data"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    command.add_argument("file", type=Path, metavar="FILE", help="manifest to check")
    command.add_argument(
        "--json", action="store_true", help="print what was found as JSON on standard output"
    )


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Check; 0 where the manifest can be run.

    Raises:
        BadInput: it can't; the message names the field, what came and what is allowed.
    """
    from esper.cli import preparing

    found = preparing.validate_file(arguments.file, config)
    if arguments.json:
        write_json(found)
    else:
        write_result(f"{arguments.file}: valid")
    return 0
