"""The services' composition roots: each built from the settings, run until it is asked to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from esper.cli.closing import Closing
from esper.cli.wiring import bus_answers, bus_elsewhere, hub_elsewhere, hub_gives_work
from esper.configs import EsperConfig
from esper.services.health import Check, HealthServer, ServiceHealth, watch

SIGNALS = (signal.SIGINT, signal.SIGTERM)
COUNT_SECONDS = 1.0
STOP_SECONDS = 4.0
"""For what a service stops doing; what is left of the time is for what it says last."""


class Service(Protocol):
    """What `start` sets to work and `stop` ends."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What it has done since it was made, for /metrics."""

    @property
    def running(self) -> bool:
        """Whether it is at work."""

    async def start(self) -> None:
        """Set to work."""

    async def stop(self) -> None:
        """End; raises what ended it before."""


def serve_urza(config: EsperConfig) -> int:
    """The hub, until a signal stops it. It answers questions about its health itself.

    It has no run: what the settings place in a run's directory lies in the working directory.
    """
    from esper.services.urza.main import serve

    here = config.inside(Path())

    async def life() -> None:
        with stop_on_signals() as stop:
            await serve(here, stop=stop, started=lambda url: announce("urza", url))

    asyncio.run(life())
    return 0


def serve_tamiyo(config: EsperConfig, session: str | None = None) -> int:
    """The controller of a namespace, or of the session of that uid, until a signal stops it.

    Raises:
        BadInput: `session` is no uid that a message may have.
    """
    from esper.services.tamiyo.main import TamiyoService

    async def life() -> None:
        closing = Closing()
        async with bus_elsewhere(config, session, closing) as bus:
            service = TamiyoService(bus, lasting=True)
            checks: dict[str, Check] = {"redis.url": lambda: bus_answers(bus)}
            await attend("tamiyo", service, checks, config, closing)

    asyncio.run(life())
    return 0


def serve_tezzeret(config: EsperConfig) -> int:
    """A worker of the forge, until a signal stops it."""
    from esper.services.tezzeret.forge import Forge
    from esper.services.tezzeret.main import TezzeretService
    from esper.services.tezzeret.sandbox import SubprocessCompiler

    settings = config.tezzeret

    async def life() -> None:
        closing = Closing()
        async with bus_elsewhere(config, None, closing) as bus, hub_elsewhere(config) as hub:
            compiler = SubprocessCompiler(
                seconds=settings.compile_seconds, memory_bytes=settings.compile_memory_bytes
            )
            forge = Forge(hub, compiler, worker=worker_name(), lease_seconds=settings.lease_seconds)
            service = TezzeretService(bus, hub, forge=forge, poll_seconds=settings.poll_seconds)
            checks: dict[str, Check] = {
                "redis.url": lambda: bus_answers(bus),
                "hub.url": lambda: hub_gives_work(hub),
            }
            await attend("tezzeret", service, checks, config, closing)

    asyncio.run(life())
    return 0


def serve_tolaria(config: EsperConfig, manifest: Path, directory: Path | None) -> int:
    """Train a session to its end; started again, it goes on where it was.

    Raises:
        BadInput: the manifest, the directory or a setting can't be used.
        WorkFailed: training failed; the run is kept.
        Interrupted: a checkpoint was written.
    """
    from esper.cli import embedded
    from esper.contracts.manifests import load_manifest

    folder = directory or Path("runs") / load_manifest(manifest).session.metadata.name
    health = ServiceHealth("tolaria")
    with health_server(health, config):
        if (folder / "manifest.yaml").is_file():
            return embedded.resume(
                folder, json_output=False, live=False, quiet=True, config=config, health=health
            )
        return embedded.run_file(
            manifest,
            folder,
            overwrite=False,
            json_output=False,
            live=False,
            quiet=True,
            config=config,
            health=health,
        )


async def attend(
    component: str,
    service: Service,
    checks: Mapping[str, Check],
    config: EsperConfig,
    closing: Closing,
) -> None:
    """Run `service` with its health endpoints until a signal stops it, or it ends by itself.

    It is stopped within `closing`: what it could not give back by then ends with its leases.

    Raises:
        EsperError: what ended it.
    """
    health = ServiceHealth(component)
    with health_server(health, config), stop_on_signals() as stop:
        watching = asyncio.create_task(watch(health, checks), name="health checks")
        try:
            await service.start()
            health.started()
            while service.running and not stop.is_set():
                health.count(service.counts)
                await _sleep_unless(stop, COUNT_SECONDS)
        finally:
            watching.cancel()
            await closing.do(service.stop(), most=STOP_SECONDS)


async def _sleep_unless(stop: asyncio.Event, seconds: float) -> None:
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({waiting}, timeout=seconds)
    waiting.cancel()


@contextmanager
def health_server(health: ServiceHealth, config: EsperConfig) -> Iterator[HealthServer]:
    """The endpoints of `health` where the settings say; their address is announced."""
    component = config.component
    server = HealthServer(health, host=component.health_host, port=component.health_port or 0)
    with server:
        announce(health.component, server.url)
        yield server


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that SIGINT or SIGTERM sets; the second of them ends the process as ever."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in SIGNALS:
        loop.add_signal_handler(number, ask, number)
    try:
        yield stop
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def announce(component: str, url: str) -> None:
    """Say where a service's health endpoints are: one line on standard error."""
    sys.stderr.write(f"{component}: {url}\n")
    sys.stderr.flush()


def worker_name() -> str:
    """A name that no other worker has: host, process, and a part by chance."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
