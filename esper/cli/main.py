"""The `esper` command: options that all commands share, and how every command ends.

Exit codes: 0 done, 1 the work failed, 2 bad input, 130 interrupted; `esper worker` has its own. An
error is one line on standard error; a trace is shown with `--debug` only. What pods run leaves it
in the termination log, too.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from esper.cli import compile, crds, doctor, fetch, report, run, serve, token, validate, worker
from esper.cli.termination import leave
from esper.errors import EsperError, one_line
from esper.utils.commands import OneLineParser, add_common, logged

if TYPE_CHECKING:
    from esper.configs import EsperConfig

COMMANDS = {
    "run": run,
    "validate": validate,
    "report": report,
    "fetch": fetch,
    "crds": crds,
    "doctor": doctor,
    "serve": serve,
    "worker": worker,
    "compile": compile,
    "token": token,
}

OPTIONS = {"hub.url": "hub", "redis.url": "bus"}
"""Settings that also have an option of their own, where a command has it."""

FAILED = 1
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, without importing what they need to work."""
    top = OneLineParser(
        prog="esper",
        description="Train PyTorch models that grow while they train.",
        epilog="Exit codes: 0 done, 1 the work failed, 2 bad input, 130 interrupted.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="store_true", help="print the version and end")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=OneLineParser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.HELP, allow_abbrev=False
        )
        module.add_arguments(command)
        add_common(command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` is without the program's name."""
    top = parser()
    arguments = top.parse_args(argv)
    if arguments.version:
        from esper import __version__

        sys.stdout.write(f"esper {__version__}\n")
        return 0
    if arguments.command is None:
        top.print_help()
        return 0
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _ended("interrupted", INTERRUPTED, debug=arguments.debug)
    except BrokenPipeError:
        # Whoever read our output has gone, as in `esper crds | head`. Python would complain once
        # more when it flushes standard output at exit, so it gets somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except EsperError as error:
        message = one_line(str(error), 2000)
        leave(arguments, type(error).__name__, message)
        return _ended(message, error.exit_code, debug=arguments.debug)
    except (Exception, SystemExit) as error:
        # Of a command itself none exits: something that it has called did.
        message = _unexpected(error, debug=arguments.debug)
        leave(arguments, type(error).__name__, message)
        return _ended(message, FAILED, debug=arguments.debug)


def _run(arguments: argparse.Namespace) -> int:
    config = settings_of(arguments)
    name = getattr(arguments, "service", arguments.command)
    with logged(name, config, debug=arguments.debug):
        status: int = COMMANDS[arguments.command].execute(arguments, config)
        sys.stdout.flush()
        return status


def settings_of(arguments: argparse.Namespace) -> EsperConfig:
    """The settings, with what the command line says of them."""
    from esper.configs import EsperConfig, parse_assignments

    assignments = parse_assignments(arguments.assignments)
    for name, option in OPTIONS.items():
        if getattr(arguments, option, None) is not None:
            assignments[name] = getattr(arguments, option)
    return EsperConfig.load(assignments, file=arguments.config)


def _unexpected(error: BaseException, *, debug: bool) -> str:
    """One line about an error that Esper does not know: what to install, or where to look."""
    from esper.cli.checkup import extra_of

    if isinstance(error, ModuleNotFoundError):
        extra = extra_of((error.name or "").partition(".")[0])
        if extra is not None:
            return f"{error.name} is not installed; install it with: pip install 'esper[{extra}]'"
    hint = "" if debug else " (--debug shows where)"
    return f"unexpected {type(error).__name__}: {one_line(str(error), 500)}{hint}"


def _ended(message: str, status: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(
        f"esper: error: {message}\n" if status != INTERRUPTED else f"esper: {message}\n"
    )
    return status
