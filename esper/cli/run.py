"""`esper run`: train one session in this process, from its manifest or from its last checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.configs import EsperConfig

HELP = "train a session to the end, or resume one"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="manifest with one TrainingSession and any Blueprints",
    )
    what.add_argument(
        "--resume", type=Path, metavar="D", help="go on with the run whose output directory is D"
    )
    command.add_argument(
        "--output-dir",
        type=Path,
        metavar="D",
        help="where the run writes (default: runs/<session>)",
    )
    command.add_argument(
        "--hub", metavar="URL", help="the hub elsewhere, as hub.url; together with --bus"
    )
    command.add_argument(
        "--bus", metavar="URL", help="the bus elsewhere, as redis.url; together with --hub"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run left there"
    )
    command.add_argument(
        "--json", action="store_true", help="print the result as JSON, last line of standard output"
    )
    command.add_argument(
        "--no-live", action="store_true", help="plain lines instead of the live view"
    )
    command.add_argument("--quiet", action="store_true", help="show errors only")


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Train; the exit code says how it ended.

    Raises:
        BadInput: the manifest, an argument or the directory can't be used.
        WorkFailed: training failed; the run is kept.
        Interrupted: a checkpoint was written.
    """
    _refuse_pointless(arguments)
    from esper.cli import embedded

    if arguments.resume is not None:
        return embedded.resume(
            arguments.resume,
            json_output=arguments.json,
            live=not arguments.no_live,
            quiet=arguments.quiet,
            config=config,
        )
    return embedded.run_file(
        arguments.file,
        arguments.output_dir,
        overwrite=arguments.overwrite,
        json_output=arguments.json,
        live=not arguments.no_live,
        quiet=arguments.quiet,
        config=config,
    )


def _refuse_pointless(arguments: argparse.Namespace) -> None:
    """A resumed run goes on where it is: it has no other directory and replaces nothing."""
    if arguments.resume is None:
        return
    from esper.errors import OutputError

    if arguments.output_dir is not None:
        raise OutputError("--output-dir", str(arguments.output_dir), "only --resume D alone")
    if arguments.overwrite:
        raise OutputError("--overwrite", "given", "not together with --resume")
