"""Urza's process: the hub behind its REST interface."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from esper import __version__
from esper.configs import EsperConfig, UrzaConfig
from esper.errors import ConfigError, HubUnavailable
from esper.services.urza.api.blueprints import blueprints
from esper.services.urza.api.description import describe
from esper.services.urza.api.failures import Observed, install_handlers
from esper.services.urza.api.internal import internal
from esper.services.urza.api.kernels import kernels
from esper.services.urza.api.objects import objects
from esper.services.urza.api.operations import operations
from esper.services.urza.api.sessions import sessions
from esper.services.urza.api.state import Urza

KEEP_ALIVE_SECONDS = 30
MAX_HEADER_BYTES = 16 * 2**10
BACKLOG = 512


def create_app(config: EsperConfig) -> FastAPI:
    """The hub as an ASGI application; its lifespan opens and closes what it stands on.

    Raises:
        ConfigError: `urza.signing_key` is not set, or an address can't be read.
    """
    urza = Urza(config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with urza.running():
            yield

    routers = (blueprints, kernels, sessions, objects, internal, operations)
    app = FastAPI(
        title="Urza",
        version=__version__,
        routes=[route for router in routers for route in router.routes],
        lifespan=lifespan,
        # The pages that show the description load scripts from elsewhere; docs/api.md is ours.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.urza = urza
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.add_middleware(Observed, urza=urza)
    install_handlers(app)
    return app


async def serve(
    config: EsperConfig,
    *,
    stop: asyncio.Event | None = None,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve the hub until `stop` is set, then let requests end for `urza.shutdown_seconds`.

    `started` gets the address, once requests are accepted. Without `stop` it serves until it is
    cancelled.

    Raises:
        ConfigError: the settings can't be used, or the address is taken.
        HubUnavailable: the server ended by itself.
    """
    stopping = stop or asyncio.Event()
    app = create_app(config)
    with _listening(config.urza) as listener:
        async with app.router.lifespan_context(app):
            host, port = listener.getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            server = _Server(
                uvicorn.Config(
                    app,
                    lifespan="off",
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    backlog=BACKLOG,
                    timeout_keep_alive=KEEP_ALIVE_SECONDS,
                    timeout_graceful_shutdown=config.urza.shutdown_seconds,
                    h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                ),
                lambda: None if started is None else started(address),
            )
            serving = asyncio.create_task(server.serve([listener]), name="urza-server")
            waiting = asyncio.create_task(stopping.wait())
            try:
                await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
                ended = serving.done()
            finally:
                waiting.cancel()
                server.should_exit = True
                await serving
            if ended:
                raise HubUnavailable("Urza's server ended by itself")


class _Server(uvicorn.Server):
    """Says when it accepts requests, and leaves signals to whoever runs the service."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept requests."""
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


@contextlib.contextmanager
def _listening(config: UrzaConfig) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sends small answers at once only over sockets that say they are TCP's; the others wait
    # 40 ms for the caller's delayed acknowledgement.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((config.host, config.port))
            listener.listen(BACKLOG)
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                allowed = f"an address of this machine, to listen at urza.port of it ({error})"
                raise ConfigError("urza.host", config.host, allowed) from error
            raise ConfigError(
                "urza.port", f"{config.host}:{config.port}", f"an address to listen on ({error})"
            ) from error
        yield listener
