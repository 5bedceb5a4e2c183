"""Compiling in a process of its own, with limits on time and memory.

What compiles badly must not take the worker along: an endless loop, a gigabyte of activations, a
crash inside torch. The processes are forked from one that has imported torch and done nothing
else (multiprocessing's fork server), so that a compilation costs milliseconds more than in place.

Memory is limited by RLIMIT_DATA, counted from what the forked process has already: the kernel
enforces it at every allocation, where watching the resident set would come too late or too often.
RLIMIT_AS would also count address space that is only reserved, as CUDA and torch's libraries do.

Time is limited twice: the worker kills what takes too long, and the process has set itself an
alarm, for the case that the worker is no longer there.

An embedded run compiles in place instead: it has one user, who wrote its blueprints, and would
pay seconds for a second process with torch in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess

from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.kernels import KernelMetadata
from esper.errors import EsperError, HubUnavailable, KernelError, one_line
from esper.services.tezzeret.compiler import CompiledArtifact, compile_kernel

MAX_ARTIFACT_BYTES = 2 * 2**30
_LOOK_SECONDS = 0.5
_ALARM_GRACE_SECONDS = 5
_MAX_HEADER_BYTES = 2**20

Compile = Callable[[BlueprintDocument, KernelTarget], CompiledArtifact]

CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGALRM}
)
"""Deaths that the compilation brought on itself. Others come from outside: a person, the system's
out-of-memory killer, a pod that is moved."""


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
    """

    def __init__(
        self, *, seconds: float, memory_bytes: int, compile: Compile = compile_kernel
    ) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._compile = compile
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    async def compile(self, document: BlueprintDocument, target: KernelTarget) -> CompiledBytes:
        """The kernel. Cancelling kills the process.

        Raises:
            KernelError: it can't be compiled, not in that time or not in that memory.
            HubUnavailable: the process was killed from outside; another try may go well.
        """
        request = json.dumps([document.to_wire(), target.to_wire()])
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_compile_here,
            args=(sending, self._compile, request, self._seconds, self._memory_bytes),
            daemon=True,
        )
        try:
            await asyncio.to_thread(process.start)
            sending.close()
            deadline = time.monotonic() + self._seconds
            while True:
                if await asyncio.to_thread(_spoke, receiving, process):
                    return await asyncio.to_thread(self._received, receiving, process, document)
                if time.monotonic() > deadline:
                    raise KernelError(
                        f"blueprint {document.name}: got no kernel in {self._seconds:g} s of "
                        "compiling; allowed: so much; see tezzeret.compile_seconds"
                    )
        finally:
            receiving.close()
            await asyncio.shield(asyncio.to_thread(_end, process))

    def _received(
        self, receiving: Connection, process: ForkServerProcess, document: BlueprintDocument
    ) -> CompiledBytes:
        """What the process sent, or why it sent nothing."""
        try:
            verdict, text = json.loads(receiving.recv_bytes(_MAX_HEADER_BYTES))
            if verdict == "compiled":
                data = receiving.recv_bytes(MAX_ARTIFACT_BYTES)
                return CompiledBytes(KernelMetadata.model_validate_json(text), data)
        except (EOFError, OSError):
            process.join()
            raise self._death(process.exitcode, document) from None
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
            return HubUnavailable(
                f"blueprint {document.name}: its compilation was killed by signal {number}"
            )
        return KernelError(f"blueprint {document.name}: compiling it ended with status {status}")


def _spoke(receiving: Connection, process: ForkServerProcess) -> bool:
    """Whether the process has sent something or ended; looks for a moment."""
    return bool(wait([receiving, process.sentinel], _LOOK_SECONDS))


def _end(process: ForkServerProcess) -> None:
    with contextlib.suppress(ValueError, AttributeError):  # it was never started
        process.kill()
        process.join()
        process.close()


def _compile_here(
    sending: Connection, compile: Compile, request: str, seconds: float, memory_bytes: int
) -> None:
    """Compile in this process and send the outcome: a JSON header, then the artifact's bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's to deal with
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(int(seconds) + _ALARM_GRACE_SECONDS)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    _limit_memory(memory_bytes)
    document, target = json.loads(request)
    data = None
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
    sending.send_bytes(json.dumps(header).encode())
    if data is not None:
        sending.send_bytes(data)
    sending.close()


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
