"""The `esper-operator` command: the settings, the log, and what is run."""

from __future__ import annotations

import argparse
import asyncio
import sys
import traceback
from collections.abc import Sequence

from esper.configs import EsperConfig, parse_assignments
from esper.errors import EsperError, one_line
from esper.utils.commands import OneLineParser, add_common, logged

FAILED = 1


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = OneLineParser(
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
    add_common(top)
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

    with logged("operator", config, debug=debug):
        return asyncio.run(run(config))
