"""`esper report`: write a run's report anew from what it recorded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from esper.cli.output import write_json, write_result

if TYPE_CHECKING:
    from esper.configs import EsperConfig

HELP = "write report.html and growth.png of a run, finished or not"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    command.add_argument("directory", type=Path, metavar="D", help="output directory of the run")
    command.add_argument(
        "--json", action="store_true", help="print the written paths as JSON on standard output"
    )


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Write the report beside the records.

    Raises:
        OutputError: the directory is no run, or can't be written.
    """
    del config
    directory: Path = arguments.directory
    if not (directory / "manifest.yaml").is_file():
        from esper.errors import OutputError

        raise OutputError("D", str(directory), "the output directory of a run (has manifest.yaml)")
    from esper.cli.report_page import write_report

    write_report(directory)
    written = {"report": directory / "report.html", "growth": directory / "growth.png"}
    if arguments.json:
        write_json({name: str(path) for name, path in written.items()})
    else:
        write_result(str(written["report"]))
    return 0
