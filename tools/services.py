"""`make services`: every service as a process, its address and its health, until a signal.

What is kept (rows, artifacts, streams) lies in the folder and is found again by the next start.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tools.saying import say
from tools.servers.process import ServerError
from tools.stack import EsperProcess, Stack

FOLDER = Path("runs/services")
READY_SECONDS = 60.0
WATCH_SECONDS = 1.0
NO_ANSWER = "does not answer"


def main(argv: Sequence[str] | None = None) -> int:
    """Start, show, wait, stop; 0 where everything was ready, 1 where something was not.

    Ctrl-C and SIGTERM are how it is meant to end: they change nothing about that.
    """
    arguments = _parsed(argv)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stack = Stack(arguments.folder, workers=arguments.workers)
    try:
        say(f"starting Redis, Postgres, S3 and Esper's services in {stack.folder}")
        with stack:
            ready = _wait_until_ready(stack, stop)
            _show(stack)
            if not arguments.once:
                say("Ctrl-C stops everything")
                _watch(stack, stop)
            say("stopping")
    except ServerError as error:
        say(f"error: {error}")
        return 1
    say("stopped")
    return 0 if ready else 1


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make services", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument("--workers", type=int, default=2, help="workers of Tezzeret (default: 2)")
    parser.add_argument("--once", action="store_true", help="start, show the health, stop")
    return parser.parse_args(argv)


def _wait_until_ready(stack: Stack, stop: threading.Event) -> bool:
    """Whether every service became ready in time."""
    deadline = time.monotonic() + READY_SECONDS
    while any(service.ready() for service in stack.services):
        if time.monotonic() > deadline or stop.wait(0.1):
            return False
    return True


def _show(stack: Stack) -> None:
    for name, part in stack.parts.items():
        if isinstance(part, EsperProcess):
            problem = part.ready()
            say(f"  {name:<12} {part.url:<28} {'ready' if problem is None else problem}")
        else:
            problem = None if part.answers() else NO_ANSWER
            say(f"  {name:<12} {f'127.0.0.1:{part.port}':<28} {problem or 'answers'}")
    settings = stack.client_settings
    say(f"settings and token of a session (keep them private): {settings}")
    say(f"a session that uses them: esper run FILE --config {settings}")


def _watch(stack: Stack, stop: threading.Event) -> None:
    """Tell when something stops being ready or becomes so again."""
    told: dict[str, str | None] = dict.fromkeys(stack.parts)
    while not stop.wait(WATCH_SECONDS):
        for name, part in stack.parts.items():
            problem = "has ended" if not part.running else None
            if problem is None and isinstance(part, EsperProcess):
                problem = part.ready()
            elif problem is None and not part.answers():
                problem = NO_ANSWER
            if problem != told[name]:
                say(f"  {name:<12} {problem or 'ready again'}")
                told[name] = problem


if __name__ == "__main__":
    sys.exit(main())
