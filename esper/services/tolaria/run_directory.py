"""A run's output directory: claimed, written in order, and found again after a crash.

The manifest is the first file; a directory with it is a run that can be resumed. Lines are
appended and flushed; a checkpoint remembers how long each file was, so that a resumed run cuts off
what the lost epochs had written and writes it again. A checkpoint that lies elsewhere carries the
files as they were, so that they are put back where the directory has lost them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from esper.contracts.base import utc_now
from esper.contracts.operational import AdaptationDecision, SeedTransition, SessionEvent
from esper.errors import EsperError, Interrupted, OutputError, StoreUnavailable, Unavailable
from esper.services.tolaria.checkpoint_folder import sync, translated
from esper.services.tolaria.checkpoint_manifest import LOGS
from esper.services.tolaria.checkpoint_writer import SILENCE_SECONDS, CheckpointWriter, Silence
from esper.services.tolaria.checkpoints import Checkpoints, Found, Written
from esper.services.tolaria.snapshots import Snapshot

MANIFEST = "manifest.yaml"
FILES = (
    MANIFEST,
    *LOGS,
    "status.yaml",
    "result.json",
    "model.safetensors",
    "grown.py",
    "report.html",
    "growth.png",
)
FOLDERS = ("checkpoints", "hub")

SAVED = "a checkpoint was written"

_log = logging.getLogger(__name__)


class RunDirectory:
    """One run's directory, held by this process until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path, manifest: str, *, overwrite: bool) -> RunDirectory:
        """Claim `path` for a new run and write its manifest.

        Raises:
            OutputError: it can't be written, or holds another run or anything else.
        """
        refuse_unusable(path, overwrite=overwrite)
        directory = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            directory._claim()
            if overwrite:
                directory._clear()
            write_atomically(path / MANIFEST, manifest.encode())
        except OSError as error:
            directory.close()
            raise _unwritable(path, error) from error
        return directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Claim the directory of an earlier run.

        Raises:
            OutputError: it is no run's directory, or another process runs in it.
        """
        if not (path / MANIFEST).is_file():
            raise OutputError(
                "--resume", str(path), f"the output directory of a run, with its {MANIFEST}"
            )
        directory = cls(path)
        try:
            directory._claim()
        except OSError as error:
            raise _unwritable(path, error) from error
        return directory

    def close(self) -> None:
        """Let other processes have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def manifest(self) -> str:
        """The manifest as it was given, with the annotations of this run."""
        return (self.path / MANIFEST).read_text(encoding="utf-8")

    def told(self, session: str) -> list[SeedTransition | SessionEvent]:
        """The transitions and events in events.jsonl, in order; after a rewind."""
        path = self.path / "events.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [_news(json.loads(line), session) for line in lines]

    def result(self) -> dict[str, Any] | None:
        """What the finished run came to; None while it has not finished."""
        path = self.path / "result.json"
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Keep the result: from now on the run counts as finished."""
        write_atomically(self.path / "result.json", (json.dumps(result, indent=1) + "\n").encode())

    def _claim(self) -> None:
        # A lock on the directory itself: it needs no file, and the system lets go of it when the
        # process dies, however it dies.
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(
                "output directory",
                f"{self.path}, in which another process runs",
                "a directory of its own for each run",
            ) from error
        self._lock = descriptor

    def _clear(self) -> None:
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)


class RunLog:
    """Writes what a trainer tells its observers into the run's directory, and its checkpoints."""

    def __init__(
        self,
        directory: RunDirectory,
        checkpoints: Checkpoints,
        written: Callable[[Written], None] = lambda _: None,
        *,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`written` is told of each checkpoint that is complete, in the thread that wrote it.

        Once `stopping` says so, a place that does not answer is not waited for any longer.
        """
        self._path = directory.path
        self._checkpoints = checkpoints
        self._written = written
        self.saved = SAVED
        """What the run can go on from, said of one that was interrupted."""
        self._stopping = stopping
        self._silence = Silence(stopping, checkpoints.answers)
        self._newest: Written | None = None
        self._writer = CheckpointWriter(self._write_checkpoint)
        self._handed_over: Snapshot | None = None
        self._files: dict[str, IO[bytes]] = {}

    def rewind(self, found: Found | None) -> list[AdaptationDecision]:
        """Cut every file to where the checkpoint left it; returns the decisions that were cut off.

        Those were made before the interruption and are replayed, not asked for again. A file that
        does not begin as the checkpoint has it is put back from there.
        """
        self._newest = found.written if found else None
        for name, data in (found.logs if found else {}).items():
            self._put_back(self._path / name, data)
        lengths = found.snapshot.state.get("lengths", {}) if found else {}
        lost: list[AdaptationDecision] = []
        for name in LOGS:
            path = self._path / name
            if not path.exists():
                continue
            keep = int(lengths.get(name, 0))
            if name == "decisions.jsonl":
                lost = _decisions(path.read_bytes()[keep:])
            with path.open("r+b") as file:
                file.truncate(min(keep, path.stat().st_size))
        return lost

    def open(self) -> None:
        """Open the files for appending."""
        for name in LOGS:
            self._files[name] = (self._path / name).open("ab")

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._append("metrics.jsonl", row)

    def transition(self, transition: SeedTransition) -> None:
        """Append a transition to events.jsonl."""
        line = {"time": utc_now().isoformat(), "type": "transition"} | transition.to_wire()
        self._append("events.jsonl", line)

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        """Append a line to decisions.jsonl."""
        line = {"time": utc_now().isoformat()} | decision.to_wire()
        self._append("decisions.jsonl", line | {"applied": applied, "outcome": outcome})

    def event(self, epoch: int, reason: str, message: str) -> None:
        """Append an event to events.jsonl."""
        line = {"time": utc_now().isoformat(), "type": "event", "epoch": epoch}
        self._append("events.jsonl", line | {"reason": reason, "message": message})

    def lengths(self) -> dict[str, int]:
        """How long each file is now, in bytes; a trainer keeps it with each boundary."""
        return {name: file.tell() for name, file in self._files.items()}

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Hand over a checkpoint, which knows how long each file was at its boundary.

        It is written while training goes on. The snapshot that was handed over last is not written
        once more.

        Raises:
            StorageFull: no room was left for the one before.
            StoreUnavailable: the place of the one before did not answer.
            Interrupted: nor does it now that the run is stopping; there is an older one.
        """
        if snapshot is self._handed_over:
            self.drain()
            return
        try:
            self.drain()
        except Interrupted as unsaved:
            if self._writer.busy:
                raise
            _log.warning("%s", unsaved)  # it may take this one
        lengths = snapshot.state.get("lengths") or self.lengths()
        self._writer.hand_over(replace(snapshot, state=snapshot.state | {"lengths": lengths}))
        self._handed_over = snapshot

    def drain(self) -> None:
        """Wait until every checkpoint that was handed over is written; raises as `checkpoint`."""
        try:
            if self._writer.drain(self._silence):
                self.saved = SAVED
                return
            why: EsperError = StoreUnavailable(
                f"{self._checkpoints.path} has not answered for {SILENCE_SECONDS:g} seconds"
            )
        except Unavailable as error:
            why = error
        if not self._stopping() or self._newest is None:
            raise why
        self.saved = (
            f"no newer checkpoint could be written than {self._newest.where}, "
            f"of epoch {self._newest.epoch}: {why}"
        )
        raise Interrupted(self.saved) from why

    @contextmanager
    def draining(self) -> Iterator[None]:
        """Around a training run: at its end, however it comes, its checkpoints are written.

        Where that fails the end of the run is that failure, unless the run had failed already.

        Raises:
            StorageFull: no room was left for a checkpoint.
            StoreUnavailable: its place did not answer.
        """
        try:
            yield
        except Interrupted:
            self.drain()
            raise
        except Exception as failure:
            try:
                self.drain()
            except Exception as error:
                if isinstance(failure, OSError):
                    raise  # the same disk refused a log; this one says it better
                _log.warning("the last checkpoint was not written either: %s", error)
            raise
        self.drain()

    def _write_checkpoint(self, snapshot: Snapshot) -> None:
        """In the writer's thread: first the logs have to outlast a power cut, then it."""
        logs: dict[str, bytes] = {}
        for name, length in snapshot.state["lengths"].items():
            path = self._path / name
            with translated(f"checkpoint of epoch {snapshot.epoch}: {path}"):
                sync(path)
                if self._checkpoints.portable:
                    with path.open("rb") as file:
                        logs[name] = file.read(length)
        self._newest = self._checkpoints.write(snapshot, logs)
        self._written(self._newest)

    def _put_back(self, path: Path, data: bytes) -> None:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(data)) == data:
                    return
        write_atomically(path, data)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        file = self._files[name]
        text = json.dumps(_standard(line), ensure_ascii=False, allow_nan=False)
        file.write(text.encode() + b"\n")
        file.flush()


def refuse_unusable(path: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that holds something, or lies where nothing can be written.

    Raises:
        OutputError: it can't be used. Nothing was written.
    """
    if path.exists() and not path.is_dir():
        raise OutputError("--output-dir", f"{path}, a file", "a directory")
    try:
        held = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        held = [name for name in held if name != _partial(Path(MANIFEST)).name]
    except OSError as error:
        raise _unwritable(path, error) from error
    if MANIFEST in held:
        if not overwrite:
            raise OutputError(
                "--output-dir",
                f"{path}, which holds a run",
                f"an empty or new directory; --resume {path} goes on with that run, "
                "--overwrite replaces it",
            )
    elif held:
        raise OutputError(
            "--output-dir", f"{path}, which holds {held[0]} and is no run", "an empty directory"
        )
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError("--output-dir", f"{path} (not writable)", "a directory you may write to")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step: under a temporary name, synced, renamed."""
    partial = _partial(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _standard(value: object) -> object:
    """`value` as JSON has it: null where a number is not finite."""
    if isinstance(value, Mapping):
        return {key: _standard(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_standard(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _decisions(data: bytes) -> list[AdaptationDecision]:
    """The complete lines of `data`; a kill may have cut the last one short."""
    found = []
    for line in data.split(b"\n")[:-1]:
        fields = json.loads(line)
        for extra in ("time", "applied", "outcome"):
            fields.pop(extra, None)
        found.append(AdaptationDecision.model_validate(fields))
    return found


def _news(line: dict[str, Any], session: str) -> SeedTransition | SessionEvent:
    fields = {name: value for name, value in line.items() if name not in ("time", "type")}
    if line["type"] == "transition":
        return SeedTransition.model_validate(fields)
    return SessionEvent.model_validate(fields | {"session": session})


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        "--output-dir", f"{path} ({error.strerror or error})", "a directory you may write to"
    )
