"""Compilers that do what a compiler must not: each really does it."""

import ctypes
import os
import signal
import time

import torch

from esper.services.tezzeret.compiler import compile_kernel


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
