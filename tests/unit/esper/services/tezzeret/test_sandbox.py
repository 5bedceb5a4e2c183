"""Compilations in processes of their own, which hang, eat memory, crash and are killed."""

import asyncio
import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from esper.contracts.blueprints import BlueprintDocument, KernelTarget, LayerGeometry, builtin
from esper.errors import HubUnavailable, KernelError
from esper.services.tezzeret.compiler import compile_kernel
from esper.services.tezzeret.sandbox import SubprocessCompiler
from tests.unit.esper.services.tezzeret import misbehaving

LOW_RANK = builtin("low-rank", {"rank": 2})
TARGET = KernelTarget(
    layer=LayerGeometry(kind="Linear", inputs=6, outputs=4), input_shape=(6,), output_shape=(4,)
)
LOUD = BlueprintDocument.model_validate(
    {
        "name": "loud",
        "hosts": ["Linear"],
        "graph": {
            "nodes": [
                {"op": "input", "id": "x"},
                {"op": "linear", "id": "y", "input": "x", "features": "out"},
            ],
            "output": "y",
        },
    }
)
MEMORY = 256 * 2**20
WAIT_SECONDS = misbehaving.LONG_SECONDS / 2
"""On a slow machine too, nothing takes so long but what sleeps."""


def compiler(compile=compile_kernel, seconds=60.0, memory_bytes=MEMORY):
    return SubprocessCompiler(seconds=seconds, memory_bytes=memory_bytes, compile=compile)


def compiled(by, document=LOW_RANK):
    return asyncio.run(by.compile(document, TARGET))


def compilations():
    """The processes that compile at this moment: those that the fork server has forked."""
    found = []
    for server in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
            # Not Postgres, nor what another test started.
            if "forkserver" in " ".join(server.cmdline()):
                found += filter(alive, server.children(recursive=True))
    return found


def alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def test_the_bytes_are_those_of_a_compilation_in_place():
    apart, here = compiled(compiler()), compile_kernel(LOW_RANK, TARGET)
    assert apart.data == here.data
    assert apart.metadata.artifact_digest == here.metadata.artifact_digest
    assert apart.metadata.figures is not None
    by_default = compiled(SubprocessCompiler(seconds=60.0, memory_bytes=MEMORY))
    assert by_default.data == here.data


def test_torch_is_in_the_processes_that_compile_and_not_in_the_worker():
    code = (
        "import sys\n"
        "from esper.cli import serving\n"
        "from esper.services.tezzeret.main import TezzeretService\n"
        "from esper.services.tezzeret.sandbox import SubprocessCompiler\n"
        "SubprocessCompiler(seconds=1, memory_bytes=1)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_torch_there_is_no_compiler_and_no_kernel_is_blamed(monkeypatch):
    monkeypatch.setattr("esper.services.tezzeret.sandbox.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        SubprocessCompiler(seconds=1, memory_bytes=1)


def test_a_refusal_comes_over_word_for_word():
    with pytest.raises(KernelError) as here:
        compile_kernel(LOUD, TARGET)
    with pytest.raises(KernelError) as apart:
        compiled(compiler(), LOUD)
    assert str(apart.value) == str(here.value)


@pytest.mark.parametrize("hanging", [misbehaving.hang, misbehaving.hang_deaf])
def test_one_that_hangs_is_killed_when_its_time_is_over(hanging):
    started = time.monotonic()
    with pytest.raises(KernelError, match=r"no kernel in 0.6 s .* tezzeret.compile_seconds"):
        compiled(compiler(hanging, seconds=0.6))
    assert time.monotonic() - started < WAIT_SECONDS
    assert compilations() == []


def test_the_limit_on_time_holds_until_the_last_byte():
    started = time.monotonic()
    with pytest.raises(KernelError, match=r"tezzeret\.compile_seconds"):
        compiled(compiler(misbehaving.begin_to_answer_and_freeze, seconds=1.0))
    assert time.monotonic() - started < WAIT_SECONDS
    assert compilations() == []


def test_one_that_ends_is_not_waited_for_while_its_child_holds_the_pipe():
    started = time.monotonic()
    with pytest.raises(KernelError, match="ended with status 3"):
        compiled(compiler(misbehaving.die_but_leave_a_child))
    assert time.monotonic() - started < WAIT_SECONDS


def test_what_a_compilation_forks_ends_with_it():
    # What it forks holds the pipe's only other end: nobody else's processes are looked at.
    receiving, sending = multiprocessing.Pipe(duplex=False)
    with receiving:
        with sending:
            forking = functools.partial(misbehaving.fork_and_compile, sending)
            assert compiled(compiler(forking)).data
        assert receiving.poll(WAIT_SECONDS)
        assert receiving.recv_bytes() == b"forked"
        assert receiving.poll(WAIT_SECONDS), "what it has forked is still alive"
        with pytest.raises(EOFError):
            receiving.recv_bytes()


def test_a_compilation_writes_no_files():
    with pytest.raises(KernelError, match="No usable temporary directory"):
        compiled(compiler(misbehaving.write_a_file))


def test_what_a_compilation_says_is_not_heard(capfd):
    assert compiled(compiler(misbehaving.say_something)).data
    assert "not asked for" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("eating", [misbehaving.eat_python_memory, misbehaving.eat_torch_memory])
def test_one_that_eats_memory_is_refused_it(eating):
    with pytest.raises(KernelError, match=r"bytes of memory; .* tezzeret.compile_memory_bytes"):
        compiled(compiler(eating))


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (misbehaving.crash, "ended with SIGSEGV"),
        (misbehaving.abort, "ended with SIGABRT"),
        (misbehaving.exit_at_once, "ended with status 3"),
        (misbehaving.raise_something, "LookupError: nobody foresaw this in two lines"),
    ],
)
def test_one_that_breaks_fails_the_kernel_with_a_reason(ending, reason):
    with pytest.raises(KernelError, match=reason):
        compiled(compiler(ending))


def test_one_that_is_killed_from_outside_is_not_the_kernels_fault():
    with pytest.raises(HubUnavailable, match="was killed by signal 9"):
        compiled(compiler(misbehaving.be_killed))


def test_the_next_compilation_after_every_fault_goes_well():
    for ending in (misbehaving.crash, misbehaving.be_killed):
        with pytest.raises((KernelError, HubUnavailable)):
            compiled(compiler(ending))
    assert compiled(compiler()).data


def test_the_event_loop_goes_round_while_it_compiles():
    async def life() -> int:
        turns = 0
        work = asyncio.create_task(compiler(misbehaving.compile_slowly).compile(LOW_RANK, TARGET))
        while not work.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert (await work).data
        return turns

    assert asyncio.run(life()) > 10


def test_cancelling_kills_the_process():
    async def life() -> None:
        work = asyncio.create_task(compiler(misbehaving.hang).compile(LOW_RANK, TARGET))
        for _ in range(1000):
            if compilations():
                break
            await asyncio.sleep(0.01)
        assert compilations()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(life())
    assert compilations() == []


def test_a_process_killed_at_work_is_reported_while_the_worker_lives():
    async def life() -> None:
        work = asyncio.create_task(compiler(misbehaving.hang).compile(LOW_RANK, TARGET))
        for _ in range(1000):
            if running := compilations():
                break
            await asyncio.sleep(0.01)
        os.kill(running[0].pid, signal.SIGKILL)
        with pytest.raises(HubUnavailable):
            await work

    asyncio.run(life())
