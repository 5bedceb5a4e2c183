"""Compiling in a process of its own, with limits on time and memory.

What compiles badly must not take the worker along: an endless loop, a gigabyte of activations, a
crash inside torch. The processes are forked from one that has imported torch and done nothing
else (multiprocessing's fork server), so that a compilation costs milliseconds more than in place.

Memory is limited by RLIMIT_DATA, counted from what the forked process has already: the kernel
enforces it at every allocation, where watching the resident set would come too late or too often.
RLIMIT_AS would also count address space that is only reserved, as CUDA and torch's libraries do.

Time is limited twice: the worker kills what takes too long, and the process has set itself an
alarm, for the case that the worker is no longer there. The limit holds until the last byte has
come. The process leads a session of its own, and whatever it has forked is killed with it.

It writes no files, and what it says on its standard streams is nobody's: the worker's log is no
place for a blueprint to write to.

An embedded run compiles in place instead: it has one user, who wrote its blueprints, and would
pay seconds for a second process with torch in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import TYPE_CHECKING

from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.kernels import KernelMetadata
from esper.errors import EsperError, HubUnavailable, KernelError, one_line

if TYPE_CHECKING:
    from esper.services.tezzeret.compiler import CompiledArtifact

MAX_ARTIFACT_BYTES = 2 * 2**30
_ALARM_GRACE_SECONDS = 5
_DRAIN_SECONDS = 1.0
"""To read what a process that has ended left in the pipe: it is there already."""
_MAX_HEADER_BYTES = 2**20
_READ_BYTES = 2**20
_LENGTHS = struct.Struct("!QQ")
"""What a result begins with: how long its header is, in JSON, and how long the artifact."""

Compile = Callable[[BlueprintDocument, KernelTarget], "CompiledArtifact"]

_COMPILER = "esper.services.tezzeret.compiler"
"""Imports torch: in the fork server, not in the worker, which is ready seconds sooner and needs a
tenth of the memory."""

CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGALRM}
)
"""Deaths that the compilation brought on itself. Others come from outside: a person, the system's
out-of-memory killer, a pod that is moved."""


class CompilationKilled(HubUnavailable):
    """A compilation was killed from outside, for want of memory perhaps; another may go well."""


def _compile_kernel(document: BlueprintDocument, target: KernelTarget) -> CompiledArtifact:
    from esper.services.tezzeret.compiler import compile_kernel

    return compile_kernel(document, target)


@dataclass(frozen=True)
class CompiledBytes:
    """A compiled kernel: what the hub keeps of it, and its artifact."""

    metadata: KernelMetadata
    data: bytes


class SubprocessCompiler:
    """Compiles in processes of their own.

    Args:
        seconds: after which a compilation is killed.
        memory_bytes: that a compilation may allocate.
        compile: what compiles; an importable function, because the process imports it.

    Raises:
        ModuleNotFoundError: torch is not installed; no kernel is to be blamed for that.
    """

    def __init__(
        self, *, seconds: float, memory_bytes: int, compile: Compile = _compile_kernel
    ) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._compile = compile
        self._context = multiprocessing.get_context("forkserver")
        if find_spec("torch") is None:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        self._context.set_forkserver_preload([__name__, _COMPILER])

    async def compile(self, document: BlueprintDocument, target: KernelTarget) -> CompiledBytes:
        """The kernel. Cancelling kills the process.

        Raises:
            KernelError: it can't be compiled, not in that time or not in that memory.
            CompilationKilled: the process was killed from outside; another try may go well.
        """
        request = json.dumps([document.to_wire(), target.to_wire()])
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_compile_here,
            args=(sending, self._compile, request, self._seconds, self._memory_bytes),
            daemon=True,
        )
        starting = asyncio.create_task(asyncio.to_thread(process.start))
        try:
            await asyncio.shield(starting)
            sending.close()
            async with asyncio.timeout(self._seconds):
                sent = await _sent(receiving, process)
        except TimeoutError:
            raise KernelError(
                f"blueprint {document.name}: got no kernel in {self._seconds:g} s of "
                "compiling; allowed: so much; see tezzeret.compile_seconds"
            ) from None
        finally:
            receiving.close()
            await asyncio.shield(_ended(starting, process))
        if isinstance(sent, int):
            raise self._death(sent, document)
        return self._understood(*sent, document)

    def _understood(self, header: bytes, data: bytes, document: BlueprintDocument) -> CompiledBytes:
        """The kernel that the process sent, or the reason that it gave."""
        try:
            verdict, text = json.loads(header)
            if verdict == "compiled":
                return CompiledBytes(KernelMetadata.model_validate_json(text), data)
        except ValueError as error:
            raise KernelError(
                f"blueprint {document.name}: compiling it gave no result that can be read: "
                f"{one_line(str(error), 400)}"
            ) from error
        if verdict == "memory":
            raise KernelError(
                f"blueprint {document.name}: got no kernel in {self._memory_bytes} bytes of "
                "memory; allowed: so much; see tezzeret.compile_memory_bytes"
            )
        raise KernelError(text)

    def _death(self, status: int | None, document: BlueprintDocument) -> EsperError:
        number = -(status or 0)
        if number in CRASHES:
            name = signal.Signals(number).name
            return KernelError(f"blueprint {document.name}: compiling it ended with {name}")
        if number > 0:
            return CompilationKilled(
                f"blueprint {document.name}: its compilation was killed by signal {number}"
            )
        return KernelError(f"blueprint {document.name}: compiling it ended with status {status}")


async def _sent(receiving: Connection, process: ForkServerProcess) -> tuple[bytes, bytes] | int:
    """What the process sent, header and artifact; its exit status where it ended before.

    Its end counts, not that of the pipe: what it has forked may hold that open.
    """
    async with _stream(receiving) as stream, _end_of(process) as end:
        reading = asyncio.create_task(_result(stream))
        dying = asyncio.create_task(end.wait())
        try:
            await asyncio.wait({reading, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await asyncio.wait({reading}, timeout=_DRAIN_SECONDS)
            if reading.done() and reading.exception() is None:
                return reading.result()
            await end.wait()
        finally:
            reading.cancel()
            dying.cancel()
            await asyncio.gather(reading, dying, return_exceptions=True)
    process.join()
    return process.exitcode or 0


async def _result(stream: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Header and artifact; EOFError where they don't come, or are too long."""
    header, artifact = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
    if header > _MAX_HEADER_BYTES or artifact > MAX_ARTIFACT_BYTES:
        raise EOFError("what came is no result")
    return await stream.readexactly(header), await stream.readexactly(artifact)


@asynccontextmanager
async def _stream(receiving: Connection) -> AsyncIterator[asyncio.StreamReader]:
    """What comes through the pipe, read by the event loop: no thread is left waiting for it."""
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader(limit=_READ_BYTES)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream),
        os.fdopen(os.dup(receiving.fileno()), "rb", 0),
    )
    try:
        yield stream
    finally:
        transport.close()


@asynccontextmanager
async def _end_of(process: ForkServerProcess) -> AsyncIterator[asyncio.Event]:
    """An event that the end of the process sets."""
    loop = asyncio.get_running_loop()
    end = asyncio.Event()

    def ended() -> None:
        loop.remove_reader(process.sentinel)
        end.set()

    loop.add_reader(process.sentinel, ended)
    try:
        yield end
    finally:
        loop.remove_reader(process.sentinel)


async def _ended(starting: asyncio.Task[None], process: ForkServerProcess) -> None:
    """End the process once it is there, and all that it has forked."""
    await asyncio.wait({starting})
    await asyncio.to_thread(_end, process)


def _end(process: ForkServerProcess) -> None:
    with contextlib.suppress(ValueError, AttributeError, TypeError):  # it was never started
        # Its session first: those that it has forked are found by it. Before the process leads
        # one it has forked nothing.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.kill()
        process.join()
        process.close()


def _compile_here(
    sending: Connection, compile: Compile, request: str, seconds: float, memory_bytes: int
) -> None:
    """Compile in this process and send the outcome: a JSON header, then the artifact's bytes."""
    os.setsid()
    _say_nothing()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's to deal with
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(int(seconds) + _ALARM_GRACE_SECONDS)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    _limit_memory(memory_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    document, target = json.loads(request)
    data = b""
    try:
        artifact = compile(
            BlueprintDocument.model_validate(document), KernelTarget.model_validate(target)
        )
        data = artifact.data
        header = ["compiled", artifact.metadata.model_dump_json(by_alias=True)]
    except MemoryError:
        header = ["memory", ""]
    except EsperError as error:
        header = ["memory" if _no_memory(error) else "failed", str(error)]
    except Exception as error:
        header = ["failed", f"{type(error).__name__}: {one_line(str(error), 400)}"]
    resource.setrlimit(resource.RLIMIT_DATA, before)  # what is left to do is not the kernel's
    with contextlib.suppress(OSError):  # a worker that has gone wants no result
        _send(sending.fileno(), json.dumps(header).encode(), data)
    sending.close()


def _send(pipe: int, header: bytes, data: bytes) -> None:
    for part in (_LENGTHS.pack(len(header), len(data)), header, data):
        left = memoryview(part)
        while left:
            left = left[os.write(pipe, left[:_READ_BYTES]) :]


def _say_nothing() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def _limit_memory(memory_bytes: int) -> None:
    """Allow `memory_bytes` above what is allocated now; Linux alone says how much that is."""
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/status", encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    allocated = int(lines["VmData"].split()[0]) * 2**10
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (allocated + memory_bytes, hard))


def _no_memory(error: BaseException) -> bool:
    """Whether torch refused an allocation somewhere below `error`."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or "can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
