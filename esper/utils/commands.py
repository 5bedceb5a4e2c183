"""What `esper` and `esper-operator` share: how a command line is read, and how the log begins."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from esper.errors import one_line

if TYPE_CHECKING:
    from esper.configs import EsperConfig

BAD_INPUT = 2


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, as all of Esper does."""

    def error(self, message: str) -> NoReturn:
        """End the program with that line."""
        program = self.prog.partition(" ")[0]
        said = one_line(message, 500)
        self.exit(BAD_INPUT, f"{program}: error: {said} (see {self.prog} --help)\n")


def add_common(command: argparse.ArgumentParser) -> None:
    """The options of every command; also those of a rank, which is told its supervisor's."""
    group = command.add_argument_group("options of every command")
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings file, or a folder of them (default: esper.yaml if any)",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="NAME=VALUE",
        help="one setting, e.g. component.log_level=info; see `esper doctor` for all",
    )
    group.add_argument("--debug", action="store_true", help="log everything; show traces of errors")


@contextmanager
def logged(name: str, config: EsperConfig, *, debug: bool) -> Iterator[None]:
    """The log of a process of that name, as the settings say.

    Raises:
        ConfigError: its file can't be written.
    """
    # Not needed for --help, and slow to import.
    from esper.configs import parse_levels
    from esper.utils.logging import AsyncEsperLogger

    component = config.component
    log = AsyncEsperLogger(
        name,
        level="debug" if debug else component.log_level,
        levels=parse_levels(component.log_levels),
        file=Path(component.log_file) if component.log_file else None,
        queue_records=component.log_queue_records,
    )
    try:
        log.start()
    except OSError as error:
        from esper.errors import ConfigError

        raise ConfigError(
            "component.log_file", component.log_file, f"a file that can be written ({error})"
        ) from error
    try:
        yield
    finally:
        log.stop()
