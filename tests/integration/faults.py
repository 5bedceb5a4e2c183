"""Faults at exact places, each a function that a started process calls on itself.

A fault patches one function of Esper so that its n-th call dies, or finds the disk full. The disk
is full by the system's own doing: a limit on the size of files, set at that moment.
"""

import errno
import os
import resource
import signal
from fnmatch import fnmatchcase
from pathlib import Path


def kill_before(place, call=1, number=signal.SIGKILL):
    """A signal to the process itself at the beginning of a call of `place`."""
    _at(place, call, before=lambda *_, **__: _signal(number))


def kill_after(place, call=1):
    """The process's end as soon as a call of `place` has returned."""
    _at(place, call, after=_signal)


def kill_in_arm(arm, step, number=signal.SIGKILL):
    """A signal in a recovery trial's arm, "with" or "without" its seed, after some steps."""
    from esper.services.tolaria.engine import Engine
    from esper.services.tolaria.trainer import TolariaTrainer

    trial, original = TolariaTrainer._recovery_trial, Engine._step
    steps = {"with": -1, "without": -1}

    def marked(self, record, epochs):
        steps.update({"with": 0, "without": 0})
        rows = trial(self, record, epochs)
        steps.update({"with": -1, "without": -1})
        return rows

    def counted(self, grafting, learning):
        original(self, grafting, learning)
        now = "with" if self._excluded is None else "without"
        if steps[now] >= 0:
            steps[now] += 1
            if now == arm and steps[now] == step:
                _signal(number)

    TolariaTrainer._recovery_trial, Engine._step = marked, counted


def kill_in_file(name, call=1):
    """The process's end when half of a checkpoint's file is written."""
    from esper.services.tolaria import checkpoint_folder

    original = checkpoint_folder._write
    calls = _counter(call)

    def halved(path, data):
        if path.name == name and calls():
            original(path, data[: len(data) // 2])
            _signal()
        original(path, data)

    checkpoint_folder._write = halved


def kill_at_rename(name, call=1, late=False):
    """The process's end when something of that name is renamed into its place, or just after."""
    for function in ("rename", "replace"):
        _watch_rename(function, name, _counter(call), late)


def kill_in_removal(name):
    """The process's end when the first file of a folder, or of what it was, is removed."""
    original = os.unlink

    def removing(path, *, dir_fd=None):
        original(path, dir_fd=dir_fd)
        folder = Path(f"/proc/self/fd/{dir_fd}").readlink().name if dir_fd is not None else ""
        if name in folder:
            _signal()

    os.unlink = removing


def empty_plots():
    """No fault: the report has no plots, as of a run without epochs."""
    from esper.cli import report_page

    report_page.page_plots = lambda _: {}
    report_page.growth_png = lambda _: b"\x89PNG"


def both(*chosen):
    """Several faults at once."""
    for name, *arguments in chosen:
        globals()[name](*arguments)


def kill_in_line(name, call=1):
    """The process's end when half a line of a log is written."""
    from esper.services.tolaria.run_directory import RunLog

    original = RunLog._append
    calls = _counter(call)

    def halved(self, log, line):
        if log == name and calls():
            file = self._files[log]
            start = file.tell()
            original(self, log, line)
            os.truncate(file.name, (start + file.tell()) // 2)
            _signal()
        original(self, log, line)

    RunLog._append = halved


def full_before(place, call=1, room=0):
    """A disk on which from a call of `place` on no file grows beyond `room` bytes."""
    _at(place, call, before=lambda *_, **__: _limit(room))


def full_in_line(name, call=1):
    """A disk whose room ends within a line of a log."""
    from esper.services.tolaria.run_directory import RunLog

    original = RunLog._append
    calls = _counter(call)

    def limited(self, log, line):
        if log == name and calls():
            _limit(self._files[log].tell() + 20)
        original(self, log, line)

    RunLog._append = limited


def refused_sync(pattern, call=1):
    """A disk that finds itself full when a file of such a name is synced."""
    original = os.fsync
    calls = _counter(call)

    def refusing(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if fnmatchcase(name, pattern) and calls():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    os.fsync = refusing


def full_database(place, call=1):
    """A database that may not grow from a call of `place` on."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    full = []

    def limit(connection):
        if full:
            # SQLite takes the size that the file has now.
            connection.exec_driver_sql("PRAGMA max_page_count = 1")

    event.listen(Engine, "begin", limit)
    _at(place, call, before=lambda *_, **__: full.append(True))


def file_size(room):
    """No file larger than `room` bytes, from the start."""
    _limit(room)


def _at(place, call, before=lambda *_, **__: None, after=lambda: None):
    """Do something around the n-th call of "module:attribute.attribute"."""
    import importlib

    module, _, path = place.partition(":")
    *parents, last = path.split(".")
    owner = importlib.import_module(module)
    for name in parents:
        owner = getattr(owner, name)
    original = getattr(owner, last)
    calls = _counter(call)

    def around(*positional, **named):
        now = calls()
        if now:
            before(*positional, **named)
        returned = original(*positional, **named)
        if now:
            after()
        return returned

    setattr(owner, last, around)


def _watch_rename(function, name, calls, late):
    original = getattr(Path, function)

    def watched(self, target):
        now = Path(target).name == name and calls()
        if now and not late:
            _signal()
        moved = original(self, target)
        if now:
            _signal()
        return moved

    setattr(Path, function, watched)


def _counter(call):
    """A function that is true at its n-th call alone."""
    left = [call]

    def counted():
        left[0] -= 1
        return left[0] == 0

    return counted


def _signal(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def _limit(room):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
