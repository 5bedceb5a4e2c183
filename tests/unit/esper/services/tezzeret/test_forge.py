"""Work under leases: a real hub on disk, compilers that hang, fail and are killed."""

import asyncio
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from esper.configs import DatabaseConfig, StorageConfig
from esper.contracts.blueprints import BlueprintDocument, builtin, kernel_id
from esper.contracts.enums import BlueprintState
from esper.contracts.messages import KernelReady, TopicNames
from esper.errors import (
    BadInput,
    HubUnavailable,
    KernelError,
    KernelNotFound,
    StorageFull,
    Unauthorized,
)
from esper.services.oona_client import InProcessOona
from esper.services.tezzeret.compiler import compile_kernel
from esper.services.tezzeret.forge import Forge
from esper.services.tezzeret.main import TezzeretService
from esper.services.tezzeret.sandbox import CompilationKilled, CompiledBytes, SubprocessCompiler
from esper.services.urza.client import in_process_urza
from esper.services.urza.leases import MAX_ATTEMPTS
from tests.unit.esper.services.tezzeret.test_worker import LOUD, LOW_RANK, carrying, request, target

LEASE = 5.0
WIDEN = builtin("widen", {"units": 2})
KERNEL = kernel_id(LOW_RANK.digest, target())


class Here:
    """Compiles in this process, after what `before` does."""

    def __init__(self, before=None):
        self.before = before
        self.compiled = []

    async def compile(self, document, target):
        if self.before is not None:
            await self.before()
        self.compiled.append(document.name)
        artifact = compile_kernel(document, target)
        return CompiledBytes(artifact.metadata, artifact.data)


class Flaky:
    """A hub whose methods named in `away` fail the first times, by default as one that is away."""

    def __init__(self, hub, times, *away, error=HubUnavailable("the hub is away")):  # noqa: B008
        self._hub = hub
        self._error = error
        self._left = dict.fromkeys(away, times)

    def __getattr__(self, name):
        method = getattr(self._hub, name)
        if name not in self._left:
            return method

        async def flaky(*arguments, **named):
            if self._left[name]:
                self._left[name] -= 1
                raise self._error
            return await method(*arguments, **named)

        return flaky


@asynccontextmanager
async def hub_in(folder):
    settings = DatabaseConfig(url=f"sqlite+aiosqlite:///{folder}/urza.sqlite")
    async with in_process_urza(settings, StorageConfig(folder=str(folder / "artifacts"))) as hub:
        for document in (LOW_RANK, LOUD):
            await hub.put_blueprint(document)
        yield hub


def forge_of(hub, compiler=None, lease_seconds=LEASE, worker="one"):
    return Forge(hub, compiler or Here(), worker=worker, lease_seconds=lease_seconds)


async def until(condition):
    """Look until `condition`, an asynchronous one, gives something."""
    for _ in range(3000):
        if found := await condition():
            return found
        await asyncio.sleep(0.01)
    raise TimeoutError("what was waited for did not happen")


async def compiled(hub, kernel):
    """Wait until the kernel is compiled."""

    async def look():
        return (await hub.kernel(kernel)).state is BlueprintState.CHARACTERIZED

    await until(look)


async def requested(hub, document=LOW_RANK, inputs=6):
    return (await hub.request_kernel(document.digest, target(inputs))).kernel


def test_a_kernel_is_compiled_in_a_process_of_its_own_and_handed_in(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            compiler = SubprocessCompiler(seconds=60, memory_bytes=2**28)
            forge = forge_of(hub, compiler)
            kernel = await forge.compile(await requested(hub))
            assert kernel.state is BlueprintState.CHARACTERIZED
            assert await hub.artifact(KERNEL) == compile_kernel(LOW_RANK, target()).data
            assert forge.counts["compiled_total"] == 1
            assert await forge.compile(KERNEL) is None  # settled

    asyncio.run(life())


def test_one_that_can_not_be_compiled_is_failed_with_the_reason(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            forge = forge_of(hub)
            kernel = await forge.compile(await requested(hub, LOUD))
            assert kernel.state is BlueprintState.FAILED
            assert "allowed: exactly 0" in kernel.error
            assert forge.counts["failed_total"] == 1

    asyncio.run(life())


def test_one_that_hangs_is_failed_and_the_worker_goes_on(tmp_path):
    from tests.unit.esper.services.tezzeret import misbehaving

    async def life():
        async with hub_in(tmp_path) as hub:
            hanging = SubprocessCompiler(seconds=0.5, memory_bytes=2**28, compile=misbehaving.hang)
            kernel = await forge_of(hub, hanging).compile(await requested(hub))
            assert kernel.state is BlueprintState.FAILED
            assert "tezzeret.compile_seconds" in kernel.error
            following = await requested(hub, inputs=7)
            assert (await forge_of(hub).compile(following)).state is BlueprintState.CHARACTERIZED

    asyncio.run(life())


@pytest.mark.parametrize("fault", [HubUnavailable("killed by signal 9"), StorageFull("no room")])
def test_what_is_not_the_kernels_fault_gives_it_back(tmp_path, fault):
    async def fail():
        raise fault

    async def life():
        async with hub_in(tmp_path) as hub:
            forge = forge_of(hub, Here(fail))
            with pytest.raises(type(fault)):
                await forge.compile(await requested(hub))
            assert (await hub.kernel(KERNEL)).state is BlueprintState.PROPOSED
            assert forge.counts["given_back_total"] == 1
            assert (await forge_of(hub).compile(KERNEL)).state is BlueprintState.CHARACTERIZED

    asyncio.run(life())


def test_a_kernel_whose_compilation_is_always_killed_is_given_up_and_holds_up_no_other(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            bad, good = await requested(hub), await requested(hub, inputs=7)
            compiled = []

            class Killing(Here):
                async def compile(self, document, target):
                    if target.input_shape == (7,):
                        compiled.append(target)
                        return await super().compile(document, target)
                    raise CompilationKilled("its compilation was killed by signal 9")

            forge = forge_of(hub, Killing())
            for attempt in range(1, MAX_ATTEMPTS + 1):
                with pytest.raises(CompilationKilled):
                    await forge.work_off()
                state = (await hub.kernel(bad)).state
                given_up = BlueprintState.FAILED if attempt == MAX_ATTEMPTS else None
                assert state is (given_up or BlueprintState.PROPOSED)
                if attempt == 2:  # what was tried less came before the second try
                    assert (await hub.kernel(good)).state is BlueprintState.CHARACTERIZED
            assert len(compiled) == 1

    asyncio.run(life())


def test_a_worker_that_is_stopped_gives_its_kernel_back(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            started = asyncio.Event()

            async def wait():
                started.set()
                await asyncio.sleep(60)

            await requested(hub)
            work = asyncio.create_task(forge_of(hub, Here(wait)).compile(KERNEL))
            await started.wait()
            assert (await hub.kernel(KERNEL)).state is BlueprintState.COMPILING
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            assert (await hub.kernel(KERNEL)).state is BlueprintState.PROPOSED

    asyncio.run(life())


def test_a_lease_is_extended_while_the_work_lasts(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            await requested(hub)

            async def last():
                await asyncio.sleep(2.5)
                # The lease of 1 s would be over long ago.
                assert await hub.lease_kernel(KERNEL, "another", 1.0) is None

            settled = await forge_of(hub, Here(last), lease_seconds=1.0).compile(KERNEL)
            assert settled.state is BlueprintState.CHARACTERIZED

    asyncio.run(life())


def test_a_worker_that_lost_its_lease_stops_and_its_result_does_not_count(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            await requested(hub)
            started = asyncio.Event()

            async def hang():
                started.set()
                await asyncio.sleep(60)

            first = forge_of(Flaky(hub, 5, "heartbeat_kernel"), Here(hang), 1.0)
            losing = asyncio.create_task(first.compile(KERNEL))
            await started.wait()
            taken = await until(lambda: hub.lease_kernel(KERNEL, "another", 60.0))
            assert await losing is None
            assert first.counts["lost_total"] == 1
            artifact = compile_kernel(LOW_RANK, target())
            done = await hub.complete_kernel(artifact.metadata, artifact.data, token=taken.lease)
            assert done.state is BlueprintState.CHARACTERIZED

    asyncio.run(life())


def test_a_result_waits_for_a_hub_that_is_away(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            await requested(hub)
            compiler = Here()
            forge = forge_of(Flaky(hub, 2, "complete_kernel"), compiler)
            assert (await forge.compile(KERNEL)).state is BlueprintState.CHARACTERIZED
            assert compiler.compiled == ["low-rank"]  # once

    asyncio.run(life())


def test_an_unknown_kernel_is_refused(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            with pytest.raises(KernelNotFound):
                await forge_of(hub).compile("0" * 40)

    asyncio.run(life())


def test_working_off_compiles_everything_and_validates_new_blueprints(tmp_path):
    odd = BlueprintDocument.model_validate(LOUD.to_wire() | {"name": "odd"})

    async def life():
        async with hub_in(tmp_path) as hub:
            for inputs in (5, 6):
                await requested(hub, inputs=inputs)
            await hub.put_blueprint(WIDEN)
            assert odd.digest == LOUD.digest or await hub.put_blueprint(odd)
            forge = forge_of(hub)
            assert await forge.work_off() >= 4
            assert await forge.work_off() == 0
            states = {b.document.name: b.state for b in await hub.blueprints()}
            assert states["low-rank"] is BlueprintState.CHARACTERIZED
            assert states["loud"] is BlueprintState.FAILED
            assert states["widen"] is BlueprintState.CHARACTERIZED  # fits no sample
            assert {k.state for k in await hub.kernels()} == {BlueprintState.CHARACTERIZED}

    asyncio.run(life())


def test_many_workers_compile_each_kernel_once(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            for inputs in range(4, 10):
                await requested(hub, inputs=inputs)
            compilers = [Here(lambda: asyncio.sleep(0.01)) for _ in range(3)]
            forges = [
                forge_of(hub, compiler, worker=f"worker-{n}")
                for n, compiler in enumerate(compilers)
            ]
            await asyncio.gather(*(forge.work_off() for forge in forges))
            assert sum(forge.counts["compiled_total"] for forge in forges) == 6

    asyncio.run(life())


def test_the_service_finds_work_by_itself_and_answers_requests(tmp_path):
    async def life():
        bus = InProcessOona()
        answers = await bus.subscribe({TopicNames.KERNEL_READY}, "tolaria")
        async with hub_in(tmp_path) as hub:
            service = TezzeretService(bus, hub, forge=forge_of(hub), poll_seconds=0.01)
            await service.start()
            await service.start()
            unasked = await requested(hub, inputs=9)
            await compiled(hub, unasked)
            asked = carrying(request()).model_copy(update={"scope": "uid-1"})
            await bus.publish(asked)
            came = await asyncio.wait_for(answers.receive(), timeout=120)
            assert (came.trace_id, came.scope) == (asked.trace_id, "uid-1")
            assert KernelReady.model_validate(came.payload).error is None
            await service.stop()
            assert not service.running

    asyncio.run(life())


def test_the_service_outlasts_a_hub_that_is_away(tmp_path, caplog):
    async def life():
        async with hub_in(tmp_path) as hub:
            away = Flaky(hub, 3, "claim_next_kernel")
            service = TezzeretService(InProcessOona(), hub, forge=forge_of(away), poll_seconds=0.01)
            await requested(hub)
            await service.start()
            await compiled(hub, KERNEL)
            await service.stop()

    asyncio.run(life())
    assert "no work can be done at the moment: the hub is away" in caplog.text


def test_a_result_that_the_hub_refuses_fails_the_kernel_and_the_worker_goes_on(tmp_path):
    refusal = BadInput("body", "1248 bytes or more", "at most 1024 bytes")

    async def life():
        async with hub_in(tmp_path) as hub:
            refusing = Flaky(hub, 1, "complete_kernel", error=refusal)
            first, second = [await requested(hub, inputs=n) for n in (6, 7)]
            forge = forge_of(refusing)
            assert await forge.work_off() >= 2
            failed = await hub.kernel(first)
            assert failed.state is BlueprintState.FAILED
            assert failed.error == f"the hub refuses the result: {refusal}"
            assert (await hub.kernel(second)).state is BlueprintState.CHARACTERIZED

    asyncio.run(life())


@pytest.mark.parametrize("fault", [StorageFull("no room"), LookupError("nobody foresaw this")])
def test_the_service_survives_what_gives_work_back_and_pauses(tmp_path, fault):
    tries = []

    async def fail():
        tries.append(asyncio.get_running_loop().time())
        if len(tries) < 4:
            raise fault

    async def life():
        async with hub_in(tmp_path) as hub:
            forge = forge_of(hub, Here(fail))
            service = TezzeretService(InProcessOona(), hub, forge=forge, poll_seconds=0.05)
            await requested(hub)
            await service.start()
            await compiled(hub, KERNEL)
            assert service.running
            await service.stop()

    asyncio.run(life())
    pauses = [later - sooner for sooner, later in pairwise(tries)]
    assert pauses[0] > 0.09
    assert pauses[2] > 0.39


def test_a_token_that_is_refused_ends_the_service(tmp_path):
    async def life():
        async with hub_in(tmp_path) as hub:
            refusal = Unauthorized("hub.token", "token's role: reader", "worker, admin")
            weak = Flaky(hub, 1, "claim_next_kernel", error=refusal)
            service = TezzeretService(InProcessOona(), hub, forge=forge_of(weak))
            await service.start()
            await asyncio.sleep(0.05)
            assert not service.running
            with pytest.raises(Unauthorized):
                await service.stop()

    asyncio.run(life())


def test_what_does_not_pass_ends_the_service_and_is_told(tmp_path):
    class Refusing(InProcessOona):
        async def subscribe(self, topics, group, *, prefetch=None):
            raise KernelError("something permanent")

    async def life():
        async with hub_in(tmp_path) as hub:
            service = TezzeretService(Refusing(), hub, forge=forge_of(hub))
            await service.start()
            await asyncio.sleep(0.05)
            assert not service.running
            with pytest.raises(KernelError, match="something permanent"):
                await service.stop()

    asyncio.run(life())
