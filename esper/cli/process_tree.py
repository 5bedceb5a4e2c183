"""No process outlives the one that it works for. On Linux; elsewhere the functions do nothing.

A process asks the kernel to be killed when its parent dies, and one that starts others adopts those
whose own parent is gone, so that it can end them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LINUX = sys.platform == "linux"


def die_with_parent(parent: int | None = None) -> None:
    """Be killed when the parent dies; at once if that was `parent` and it is gone already."""
    if not LINUX:
        return
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Who was orphaned before it asked is never told. Only a process that nobody supervises is a
    # child of the first one.
    if os.getppid() != parent if parent is not None else os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies."""
    if LINUX:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)


def status_of(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status of `process`, None while it runs; other children that have ended are reaped.

    In a container the first process is the parent of every orphan: nobody else reaps them.
    """
    while (ended := _ended_child()) is not None:
        if ended == process.pid:
            return process.wait()
        os.waitpid(ended, 0)
    return process.poll()


def kill_children(seconds: float) -> None:
    """Kill every child with its process group, and what is adopted thereby, until none is left.

    Gives up after `seconds`: a process that waits for a device can't be killed.
    """
    deadline = time.monotonic() + seconds
    while (children := _children()) and time.monotonic() < deadline:
        for child in children:
            with suppress(ProcessLookupError, PermissionError):
                # A rank leads a group of its own, with what it has forked.
                if os.getpgid(child) == child:
                    os.killpg(child, signal.SIGKILL)
                os.kill(child, signal.SIGKILL)
        while (ended := _ended_child()) is not None:
            os.waitpid(ended, 0)
        time.sleep(0.01)


def _prctl(option: int, value: int) -> None:
    """Ask the kernel; a sandbox that refuses leaves things as they were."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _ended_child() -> int | None:
    """A child that has ended and is not reaped yet."""
    if not LINUX:
        return None
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid


def _children() -> list[int]:
    own, found = os.getpid(), []
    for entry in Path("/proc").glob("[0-9]*/stat") if LINUX else ():
        # A process may end while we look. Its name, in parentheses, may hold anything.
        with suppress(OSError):
            parent = int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])
            if parent == own:
                found.append(int(entry.parent.name))
    return found
