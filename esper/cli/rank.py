"""One rank of a session, as torchrun starts it for `esper worker`; nobody else does.

It exits with 0 when it has told how it ended; any other end is a crash, which torchrun answers by
starting all ranks again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esper.cli.process_tree import die_with_parent
from esper.services.tolaria.main import TolariaService

if TYPE_CHECKING:
    import argparse

    from esper.cli.outcomes import Outcomes

CRASHED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one of many."""
    tolaria = TolariaService()
    # A second signal, as of a torchrun that was stopping the ranks already when it was stopped
    # itself, must not cut the checkpoint short. Who is in a hurry kills.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # First of all: a signal that comes while things are imported asks to stop, too.
    with tolaria.signals():
        die_with_parent()
        from esper.cli.outcomes import Outcomes
        from esper.configs import rank_of_process

        arguments = parser().parse_args(argv)
        outcomes, rank = Outcomes(arguments.outcomes), rank_of_process()
        return told(
            outcomes,
            rank,
            lambda: _train(arguments, tolaria.stopping, outcomes, rank),
            debug=arguments.debug,
        )


def told(outcomes: Outcomes, rank: int, work: Callable[[], object], *, debug: bool = False) -> int:
    """Do a rank's work and tell how it ended; the exit code is 0 unless it crashed.

    What may go away when all ranks start again, as one that is gone, counts as a crash; so does an
    exit that something in the work asked for.
    """
    from esper.cli.outcomes import DONE, Ended, Outcome

    if not outcomes.begin(rank):
        return 0
    try:
        work()
        ended = DONE
    except (Exception, SystemExit) as error:
        if debug:
            import traceback

            traceback.print_exc()
        ended = Ended.by(error)
    outcomes.tell(rank, ended)
    if ended.outcome is not Outcome.CRASHED:
        return 0
    sys.stderr.write(f"esper worker: rank {rank}: {ended.message}\n")
    return CRASHED


def _train(
    arguments: argparse.Namespace, stopping: Callable[[], bool], outcomes: Outcomes, rank: int
) -> None:
    from esper.cli.main import settings_of
    from esper.utils.commands import logged

    config = settings_of(arguments)
    with logged("tolaria", config, debug=arguments.debug):
        from esper.cli.ranks import run_rank
        from esper.services.tolaria.process_group import process_group

        seconds = config.tolaria.collective_timeout_seconds
        with process_group(stopping, timeout_seconds=seconds) as ranks:
            outcomes.meet(rank)
            run_rank(
                arguments.file,
                arguments.output_dir,
                ranks,
                json_output=arguments.json,
                config=config,
                reached=lambda epoch: outcomes.reach(rank, epoch),
            )
        sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """The arguments that `worker.rank_program` and the supervisor give."""
    import argparse

    from esper.utils.commands import add_common

    found = argparse.ArgumentParser(prog="esper.cli.rank", description=__doc__)
    found.add_argument("file", type=Path)
    found.add_argument("--output-dir", type=Path, required=True)
    found.add_argument("--outcomes", type=Path, required=True)
    found.add_argument("--json", action="store_true")
    add_common(found)
    return found


def leave(status: int) -> None:
    """End the process at once: threads that wait for a store in vain would be waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
