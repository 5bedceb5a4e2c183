"""torchrun's elastic agent as a child of `esper worker`; only `supervising` starts it.

`python -m esper.cli.elastic_agent PARENT FOLDER OPTIONS… PROGRAM ARGUMENTS…`: torchrun, but it dies
with its parent, and it says why it ended, where torchrun's exit code is always 1.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.cli.outcomes import Ended, Outcome, Outcomes
from esper.cli.process_tree import die_with_parent
from esper.errors import one_line

CRASHED = 3
"""Ranks crashed once more than torchrun may start them again."""
LOST = 4
"""The ranks of other nodes, or the store that they meet at, are out of reach."""


def main(argv: Sequence[str]) -> int:
    """Run the agent to its end: 0, CRASHED, LOST, or 128 and the signal that stopped it."""
    die_with_parent(int(argv[0]))
    _log_without_traces()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(list(argv[2:])))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        tell_crash(Outcomes(Path(argv[1])), rank, failure.exitcode, failure.signal_name())
        return CRASHED
    except SignalException as error:
        return 128 + int(error.sigval)
    except Exception as error:
        # torch has no class for it: a rendezvous that was closed or took too long and a store that
        # is gone all raise different ones.
        message = one_line(str(error), 500)
        sys.stderr.write(f"esper worker: torchrun: {type(error).__name__}: {message}\n")
        return LOST
    return 0


def _log_without_traces() -> None:
    """Each node that is gone makes torch log a trace; its first line says as much."""
    made_by = logging.getLogRecordFactory()

    def without_trace(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = made_by(*arguments, **named)
        record.exc_info = None
        return record

    logging.setLogRecordFactory(without_trace)


def tell_crash(outcomes: Outcomes, rank: int, code: int, signal: str) -> None:
    """Tell how a rank crashed, where it was killed and could not say so itself."""
    if rank not in {note.rank for note in outcomes.notes()}:
        how = f"was killed by {signal}" if code < 0 else f"ended with exit code {code}"
        outcomes.tell(rank, Ended(Outcome.CRASHED, "RankCrashed", f"rank {rank} {how}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
