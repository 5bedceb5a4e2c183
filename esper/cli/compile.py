"""`esper compile`: one kernel that the hub was asked for, compiled as a worker would.

Exit codes: 0 the hub has the kernel, 78 it can never be compiled, else as every command's. Where a
pod looks for it, the reason stands as JSON.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from esper.cli.output import write_json, write_result
from esper.cli.termination import add_termination_log, leave

if TYPE_CHECKING:
    from esper.configs import EsperConfig
    from esper.contracts.assets import CompiledKernel

HELP = "compile one kernel that was requested from the hub"
NEVER = 78
"""EX_CONFIG of sysexits.h, as of `esper worker`: to try again is no use."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    command.add_argument("--kernel", required=True, metavar="ID", help="40 hex digits")
    add_termination_log(command)
    command.add_argument("--json", action="store_true", help="print the kernel as JSON")


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Compile; 0 where the hub then has the kernel, `NEVER` where it says that nobody can.

    Raises:
        ConfigError: `hub.url` is missing.
        KernelError: the hub does not know the kernel, or has archived it.
        Unavailable: the hub does not answer, or the compilation was killed from outside.
        Interrupted: a signal stopped it; the kernel is given back.
    """
    import asyncio
    import sys

    from esper.contracts.enums import BlueprintState
    from esper.errors import KernelError, one_line

    kernel = asyncio.run(_compiled_unless_stopped(arguments.kernel, config))
    if kernel.state is BlueprintState.FAILED:
        message = one_line(f"kernel {kernel.kernel}: {kernel.error}", 2000)
        leave(arguments, "KernelFailed", message)
        sys.stderr.write(f"esper: error: {message}\n")
        return NEVER
    if kernel.state is not BlueprintState.CHARACTERIZED:
        raise KernelError(f"kernel {kernel.kernel}: {kernel.state}")
    leave(arguments, "Compiled", f"kernel {kernel.kernel}: {kernel.artifact_digest}")
    if arguments.json:
        write_json(kernel.to_wire())
    else:
        write_result(f"kernel {kernel.kernel}: {kernel.artifact_digest}")
    return 0


async def _compiled_unless_stopped(kernel: str, config: EsperConfig) -> CompiledKernel:
    """As `_compiled`; a signal ends it in order."""
    from esper.cli.closing import Closing, unless_stopped
    from esper.cli.serving import stop_on_signals

    with stop_on_signals() as stop:
        return await unless_stopped(_compiled(kernel, config), stop, Closing())


async def _compiled(kernel: str, config: EsperConfig) -> CompiledKernel:
    """The kernel once it is settled: by this process, or by the worker that has it."""
    import asyncio

    from esper.cli.serving import worker_name
    from esper.cli.wiring import hub_elsewhere
    from esper.contracts.enums import BlueprintState
    from esper.services.tezzeret.forge import Forge
    from esper.services.tezzeret.sandbox import SubprocessCompiler

    settings = config.tezzeret
    compiler = SubprocessCompiler(
        seconds=settings.compile_seconds, memory_bytes=settings.compile_memory_bytes
    )
    async with hub_elsewhere(config) as hub:
        forge = Forge(hub, compiler, worker=worker_name(), lease_seconds=settings.lease_seconds)
        while True:
            settled = await forge.compile(kernel) or await hub.kernel(kernel)
            if settled.state not in (BlueprintState.PROPOSED, BlueprintState.COMPILING):
                return settled
            await asyncio.sleep(settings.poll_seconds)
