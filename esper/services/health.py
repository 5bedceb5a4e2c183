"""Whether a service lives, is ready, and what it counts: three answers over HTTP.

The server has a thread of its own: Tolaria's event loop stands still while it trains, and a
service whose loop hangs must still be able to say so. What it answers was reported before; a
question waits for nobody.

    /healthz  200, or 503 where nothing was heard from the service's loop for too long
    /readyz   200, or 503 with one line for each thing that fails, naming the setting that mends it
    /metrics  numbers in Prometheus' text form
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from esper.errors import ConfigError, EsperError, one_line

CHECK_SECONDS = 2.0
"""Between two looks at what a service needs."""
CHECK_TIMEOUT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""Without a beat for so long, a service that beats counts as hanging."""
STARTING = "starting"

_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_log = logging.getLogger(__name__)


class ServiceHealth:
    """What a service reports of itself; any thread may report and ask.

    A service is ready once `started` was called and no problem is reported.
    """

    def __init__(self, component: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self.component = component
        self._clock = clock
        self._lock = threading.Lock()
        self._problems: dict[str, str] = {STARTING: f"{component} is starting"}
        self._beat: float | None = None
        self._numbers: dict[str, float] = {}
        self._since = clock()

    def started(self) -> None:
        """Everything that the service needs was set up once."""
        self.report(STARTING, None)

    def report(self, name: str, problem: str | None) -> None:
        """`problem` with the setting or service `name`, in a line; None: there is none."""
        with self._lock:
            if problem is None:
                self._problems.pop(name, None)
            else:
                self._problems[name] = one_line(problem, 500)

    def beat(self) -> None:
        """The service's loop goes round; from the first beat on, silence counts as hanging."""
        with self._lock:
            self._beat = self._clock()

    def count(self, numbers: Mapping[str, float]) -> None:
        """Set numbers for /metrics by name, lower case with underscores."""
        unfit = next((name for name in numbers if not _NAME.fullmatch(name)), None)
        if unfit is not None:
            raise ValueError(f"metric: got {unfit}; allowed: lower case with underscores")
        with self._lock:
            self._numbers.update(numbers)

    def problems(self) -> dict[str, str]:
        """What keeps the service from being ready, by setting or service."""
        with self._lock:
            return dict(self._problems)

    def hangs(self) -> bool:
        """Whether a service that beats has been silent for too long."""
        with self._lock:
            return self._beat is not None and self._clock() - self._beat > SILENCE_SECONDS

    def metrics(self) -> str:
        """Every number in Prometheus' text form."""
        with self._lock:
            numbers = dict(self._numbers)
            numbers["ready"] = float(not self._problems)
            numbers["uptime_seconds"] = self._clock() - self._since
        prefix = f"esper_{self.component}"
        return "".join(
            f"# TYPE {prefix}_{name} {'counter' if name.endswith('_total') else 'gauge'}\n"
            f"{prefix}_{name} {number:.10g}\n"
            for name, number in sorted(numbers.items())
        )


Check = Callable[[], Awaitable[bool]]


def watch(
    health: ServiceHealth, checks: Mapping[str, Check], *, beating: bool = True
) -> Coroutine[Any, Any, None]:
    """Look at what a service needs, all of it at once and for ever; `checks` are by setting.

    From this call on, before it is awaited, the service is not ready until each has gone well
    once. A check that raises, or doesn't answer in time, has failed. `beating` says that this is
    the loop of the service itself.
    """
    not_looked_at(health, checks)
    return _watching(health, checks, beating)


def not_looked_at(health: ServiceHealth, settings: Iterable[str]) -> None:
    """Report that it is not known yet whether what `settings` name answers."""
    for setting in settings:
        health.report(setting, f"{setting}: what it names was not asked yet")


async def _watching(health: ServiceHealth, checks: Mapping[str, Check], beating: bool) -> None:
    async def look(setting: str, check: Check) -> None:
        health.report(setting, await _problem(setting, check))

    while True:
        if beating:
            health.beat()
        await asyncio.gather(*[look(setting, check) for setting, check in checks.items()])
        await asyncio.sleep(CHECK_SECONDS)


async def _problem(setting: str, check: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
            return None if await check() else f"{setting}: what it names does not answer"
    except TimeoutError:
        return f"{setting}: what it names gives no answer in {CHECK_TIMEOUT_SECONDS:g} s"
    except EsperError as error:
        said = str(error)
        return said if said.startswith(setting) else f"{setting}: {said}"
    except Exception as error:
        # A library's own, whose text may hold what it was given; and no check may end the watch.
        _log.debug("the check of %s broke off", setting, exc_info=True)
        return f"{setting}: the check of what it names broke off with {type(error).__name__}"


class HealthServer:
    """Serves a `ServiceHealth`; a context manager.

    Args:
        health: what the service reports.
        host: address to listen on.
        port: port to listen on; 0 is a free one, `url` tells which.

    Raises:
        ConfigError: the address can't be listened on.
    """

    def __init__(self, health: ServiceHealth, *, host: str = "127.0.0.1", port: int = 0) -> None:
        handler = type("_Handler", (_Handler,), {"health": health})
        try:
            self._server = _Server((host, port), handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "component.health_port",
                f"{host}:{port}",
                f"a free address of this machine ({error}); see also component.health_host",
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1},
            name="health", daemon=True,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away while it is answered is no fault of the service."""
        _log.debug("a question about health broke off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    health: ServiceHealth
    timeout = 5  # a client that sends nothing holds its thread no longer

    def do_GET(self) -> None:
        """Answer one of the three questions."""
        if self.path == "/healthz":
            hangs = self.health.hangs()
            self._answer(not hangs, "the service's loop hangs" if hangs else "ok")
        elif self.path == "/readyz":
            problems = self.health.problems()
            self._answer(not problems, "\n".join(problems.values()) or "ready")
        elif self.path == "/metrics":
            self._answer(True, self.health.metrics().rstrip())
        else:
            self._send(
                HTTPStatus.NOT_FOUND, "got another path; allowed: /healthz, /readyz, /metrics"
            )

    def _answer(self, well: bool, text: str) -> None:
        self._send(HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE, text)

    def _send(self, status: HTTPStatus, text: str) -> None:
        body = text.encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """What the Server header says: nothing about versions."""
        return "esper"

    def log_message(self, format: str, *arguments: object) -> None:
        """Probes come every few seconds; they are worth no line."""
