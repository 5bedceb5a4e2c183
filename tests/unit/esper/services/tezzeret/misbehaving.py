"""Compilers that do what a compiler must not: each really does it."""

import contextlib
import ctypes
import fcntl
import os
import signal
import tempfile
import time

import torch

from esper.services.tezzeret.compiler import compile_kernel

LONG_SECONDS = 120.0
"""What sleeps so long is ended from outside."""


def hang(document, target):
    while True:
        time.sleep(0.01)


def hang_deaf(document, target):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def eat_python_memory(document, target):
    held = []
    while True:
        held.append(bytearray(2**20))


def eat_torch_memory(document, target):
    held = []
    try:
        while True:
            held.append(torch.ones(2**20))
    except RuntimeError as error:
        from esper.errors import KernelError

        raise KernelError(f"blueprint {document.name}: {error}") from error


def crash(document, target):
    ctypes.string_at(0)


def abort(document, target):
    os.abort()


def exit_at_once(document, target):
    os._exit(3)


def be_killed(document, target):
    os.kill(os.getpid(), signal.SIGKILL)


def raise_something(document, target):
    raise LookupError("nobody foresaw this\nin two lines")


def compile_slowly(document, target):
    time.sleep(0.5)
    return compile_kernel(document, target)


def die_but_leave_a_child(document, target):
    if os.fork() == 0:
        time.sleep(LONG_SECONDS)
    os._exit(3)


def begin_to_answer_and_freeze(document, target):
    os.write(_result_pipe(), b"\0" * 12)
    os.kill(os.getpid(), signal.SIGSTOP)


def fork_and_compile(told, document, target):
    """Says on the pipe `told` that it has forked; that process holds it open while it lives."""
    if os.fork() == 0:
        time.sleep(LONG_SECONDS)
        os._exit(0)
    told.send_bytes(b"forked")
    return compile_kernel(document, target)


def write_a_file(document, target):
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 2**16)


def say_something(document, target):
    os.write(1, b"a line that was not asked for\n")
    os.write(2, b"a line that was not asked for\n")
    return compile_kernel(document, target)


def _result_pipe():
    """The pipe that the worker reads from: the last one that this process may write to."""
    pipes = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            place = os.readlink(f"/proc/self/fd/{name}")
            if place.startswith("pipe:") and fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_WRONLY:
                pipes.append(int(name))
    return max(pipes)
