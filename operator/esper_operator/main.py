"""The `esper-operator` command: the settings, the log, and what is run."""

from __future__ import annotations

import argparse
import asyncio
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from esper.configs import EsperConfig, parse_assignments, parse_levels
from esper.errors import ConfigError, EsperError, one_line
from esper.utils.logging import AsyncEsperLogger

FAILED = 1
BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all of Esper does."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"esper-operator: error: {one_line(message, 500)}\n")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = _Parser(
        prog="esper-operator",
        description="Run Esper's training sessions on Kubernetes.",
        epilog="Exit codes: 0 stopped by a signal, 1 to be started anew, 2 bad input.",
        allow_abbrev=False,
    )
    top.add_argument(
        "command", nargs="?", choices=("run", "rbac"), default="run", metavar="COMMAND",
        help="run (the default), or rbac: print the roles that it needs",
    )  # fmt: skip
    top.add_argument(
        "--namespaced", action="store_true", help="rbac: a Role for each of operator.namespaces"
    )
    top.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings file, or a folder of them (default: esper.yaml if any)",
    )
    top.add_argument(
        "--set", action="append", default=[], dest="assignments", metavar="NAME=VALUE",
        help="one setting, e.g. operator.namespaces=team-a",
    )  # fmt: skip
    top.add_argument("--debug", action="store_true", help="log everything; show traces of errors")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the operator until a signal stops it; `argv` is without the program's name."""
    arguments = parser().parse_args(argv)
    try:
        config = EsperConfig.load(parse_assignments(arguments.assignments), file=arguments.config)
        if arguments.command == "rbac":
            from esper_operator.rbac import rendered

            sys.stdout.write(rendered(config.operator, namespaced=arguments.namespaced))
            return 0
        return _serve(config, debug=arguments.debug)
    except KeyboardInterrupt:
        return FAILED
    except EsperError as error:
        if arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"esper-operator: error: {one_line(str(error), 2000)}\n")
        return error.exit_code


def _serve(config: EsperConfig, *, debug: bool) -> int:
    from esper_operator.running import run

    component = config.component
    log = AsyncEsperLogger(
        "operator",
        level="debug" if debug else component.log_level,
        levels=parse_levels(component.log_levels),
        file=Path(component.log_file) if component.log_file else None,
        queue_records=component.log_queue_records,
    )
    try:
        log.start()
    except OSError as error:
        raise ConfigError(
            "component.log_file", component.log_file, f"a file that can be written ({error})"
        ) from error
    with log:
        return asyncio.run(run(config))
