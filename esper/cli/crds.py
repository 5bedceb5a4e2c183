"""`esper crds`: the CustomResourceDefinitions, generated from `esper.contracts.resources`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from esper.cli.output import write_note, write_result

if TYPE_CHECKING:
    from esper.configs import EsperConfig

HELP = "print, write or check the CustomResourceDefinitions"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    where = command.add_mutually_exclusive_group()
    where.add_argument("--output-dir", type=Path, metavar="D", help="write one file per kind to D")
    where.add_argument(
        "--check", type=Path, metavar="D", help="end with 1 if the files in D are not up to date"
    )


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Print to standard output, write to a folder, or compare with one.

    Raises:
        OutputError: the folder can't be written.
    """
    del config
    from tempfile import TemporaryDirectory

    from esper.contracts.crds import write_crds
    from esper.errors import OutputError

    if arguments.output_dir is not None:
        try:
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            write_crds(arguments.output_dir)
        except OSError as error:
            raise OutputError(
                "--output-dir", str(arguments.output_dir), f"a folder to write in ({error})"
            ) from error
        return 0
    with TemporaryDirectory() as scratch:
        write_crds(Path(scratch))
        generated = _documents(Path(scratch))
    if arguments.check is not None:
        return _compare(generated, _documents(arguments.check), arguments.check)
    write_result("---\n".join(text.removeprefix("---\n") for text in generated.values()))
    return 0


def _documents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.yaml"))}


def _compare(generated: dict[str, str], found: dict[str, str], folder: Path) -> int:
    stale = [name for name in sorted(generated | found) if generated.get(name) != found.get(name)]
    for name in stale:
        write_note(f"esper: {folder / name} is not what esper.contracts.resources gives: make crds")
    return 1 if stale else 0
