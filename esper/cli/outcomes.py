"""How ranks ended, told to the process that supervises them: one small file a rank.

torchrun starts every rank again when one ends with an error, and tells nobody why. So a rank that
ends on purpose says so in a folder of its launch and exits with 0; exit codes are for crashes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from esper.errors import BadInput, EsperError, Interrupted, WorkFailed, one_line

MOST_CHARACTERS = 1000
"""Of a message."""
OUT_OF_MEMORY = "OutOfMemory"

_STOPPING, _BEGUN, _MET, _REACHED = "stopping", "begun", "met", "reached"


class Outcome(StrEnum):
    """How a rank ended; all but a crash are on purpose."""

    DONE = "done"
    INTERRUPTED = "interrupted"
    BAD_INPUT = "bad-input"
    FAILED = "failed"
    CRASHED = "crashed"


FINAL = {Outcome.DONE, Outcome.BAD_INPUT, Outcome.FAILED}
"""Nothing changes when the ranks are started again."""

STATUSES = {
    Outcome.DONE: 0,
    Outcome.INTERRUPTED: 75,
    Outcome.BAD_INPUT: 78,
    Outcome.FAILED: 1,
    Outcome.CRASHED: 1,
}
"""Exit codes of `esper worker`; 75 and 78 are EX_TEMPFAIL and EX_CONFIG of sysexits.h."""


@dataclass(frozen=True)
class Ended:
    """How work ended: a constant in CamelCase and one line for people."""

    outcome: Outcome
    reason: str
    message: str

    @classmethod
    def by(cls, error: BaseException) -> Ended:
        """The end that `error` means for the work it ended."""
        message = str(error)
        if _is_out_of_memory(error):
            # Started again at once the same is too much again; whoever does so waits.
            reason = "no memory is left: " + (message or type(error).__name__)
            return cls(Outcome.FAILED, OUT_OF_MEMORY, one_line(reason, MOST_CHARACTERS))
        if not isinstance(error, EsperError):
            message = f"unexpected {type(error).__name__}: {message}"
        kinds = {
            BadInput: Outcome.BAD_INPUT,
            WorkFailed: Outcome.FAILED,
            Interrupted: Outcome.INTERRUPTED,
        }
        outcome = next((o for kind, o in kinds.items() if isinstance(error, kind)), Outcome.CRASHED)
        return cls(outcome, type(error).__name__, one_line(message, MOST_CHARACTERS))

    @property
    def status(self) -> int:
        """The exit code."""
        return STATUSES[self.outcome]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the GPU had no more to give; torch says so in words on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def is_crash(error: BaseException) -> bool:
    """Whether ranks that met `error` are started again."""
    return Ended.by(error).outcome is Outcome.CRASHED


DONE = Ended(Outcome.DONE, "Succeeded", "the session is trained")


@dataclass(frozen=True)
class Note:
    """What one rank told."""

    rank: int
    ended: Ended


class Outcomes:
    """The folder of one launch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    # -- a rank's part ------------------------------------------------------------------------

    def begin(self, rank: int) -> bool:
        """Whether this rank has anything to do; what it told before, if it was restarted, is gone.

        It has nothing to do when the launch is being stopped, or when all is said: rank 0 is done,
        or any rank found that it can't go on.
        """
        if (self._folder / _STOPPING).exists() or any(_final(note) for note in self.notes()):
            return False
        (self._folder / f"{_BEGUN}-{rank}").touch()
        (self._folder / f"{_MET}-{rank}").unlink(missing_ok=True)
        self._file(rank).unlink(missing_ok=True)
        return True

    def meet(self, rank: int) -> None:
        """This rank has met all others: from now on there is work that must not be lost."""
        (self._folder / f"{_MET}-{rank}").touch()

    def reach(self, rank: int, epoch: int) -> None:
        """This rank, which is not the first, has come to a checkpoint of that epoch."""
        partial = self._folder / f".{_REACHED}-{rank}"
        partial.write_text(str(epoch), encoding="utf-8")
        partial.replace(self._folder / f"{_REACHED}-{rank}")

    def tell(self, rank: int, ended: Ended) -> None:
        """Leave this rank's end; complete or not at all."""
        partial = self._file(rank).with_suffix(".partial")
        partial.write_text(json.dumps({"rank": rank} | asdict(ended)), encoding="utf-8")
        partial.replace(self._file(rank))

    # -- the supervisor's part ----------------------------------------------------------------

    def stop(self) -> None:
        """Ranks that torchrun starts from now on end at once."""
        (self._folder / _STOPPING).touch()

    def begun(self) -> set[int]:
        """The ranks that have begun here."""
        return self._marked(_BEGUN)

    def met(self) -> set[int]:
        """Those of them that have met all others since."""
        return self._marked(_MET)

    def reached(self) -> int:
        """The epoch of the last checkpoint that ranks here came to, -1 without one."""
        found = self._folder.glob(f"{_REACHED}-*")
        return max((int(path.read_text(encoding="utf-8")) for path in found), default=-1)

    def notes(self) -> list[Note]:
        """What ranks told so far, in their order."""
        found = []
        for path in self._folder.glob("rank-*.json"):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue  # its rank has just begun anew
            fields = json.loads(data)
            rank = fields.pop("rank")
            fields["outcome"] = Outcome(fields["outcome"])
            found.append(Note(rank, Ended(**fields)))
        return sorted(found, key=lambda note: note.rank)

    def _marked(self, mark: str) -> set[int]:
        found = self._folder.glob(f"{mark}-*")
        return {int(path.name.removeprefix(f"{mark}-")) for path in found}

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"


def _final(note: Note) -> bool:
    """Whether no rank need go on: only rank 0 knows that the whole session is done."""
    if note.ended.outcome is Outcome.DONE:
        return note.rank == 0
    return note.ended.outcome in FINAL


def deciding(notes: Sequence[Note], begun: Set[int]) -> Ended | None:
    """The end that counts for the launch: rank 0's, where it has begun here and ended on purpose.

    Else that of a rank that found that nobody can go on. Where rank 0 is on another node, any
    rank's: all of them end as it does.
    """
    first = next((note for note in notes if note.rank == 0), None)
    if first is not None and first.ended.outcome is not Outcome.CRASHED:
        return first.ended
    refusing = [note for note in notes if _final(note)]
    crashed = [note for note in notes if note.ended.outcome is Outcome.CRASHED]
    others = [] if 0 in begun else [note for note in notes if note not in crashed]
    found = [*refusing, *others, *crashed]
    return found[0].ended if found else None
