"""Requests to a hub elsewhere, over asynchronous HTTP.

The hub's address comes from the settings alone: no default, no proxy from the environment, no
redirect followed. What may heal is tried again, with full jitter (M. Brooker, Exponential Backoff
And Jitter, 2015); a hub that stays away is left alone by a circuit breaker, so that asking it
costs microseconds and not time limits. Everything that is asked can be asked again without harm.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from esper.configs import HubConfig
from esper.contracts.base import utc_now
from esper.errors import ConfigError, EsperError, HubUnavailable, KernelError, one_line
from esper.utils.circuit_breaker import CircuitBreaker, CircuitState, Outcome
from esper.utils.logging import current_trace_id

TRACE_HEADER = "X-Trace-Id"
MAX_RETRY_AFTER_SECONDS = 30.0
MAX_PROBLEM_BYTES = 64 * 2**10
_RETRIED = frozenset({408, 425, 429})
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class HttpStatistics:
    """Counts since the source was made; `refused` requests never went out: the circuit was open.

    `failures` are requests without a usable answer, retried or not.
    """

    requests: int
    retries: int
    failures: int
    refused: int
    received_bytes: int
    circuit: CircuitState


@dataclass(frozen=True)
class HubRequest:
    """One request. `subject` is what messages call it: "kernel 0123…".

    The body is `content`, in one piece or in several. An answer has at most `limit` bytes, and
    where `whole` exactly so many. `refusal` makes the error of an answer's status and body where it
    is neither good nor temporary. A `probe` asks how the hub is, once: it goes out whatever the
    circuit breaker says, which learns nothing of it.
    """

    subject: str
    path: str
    refusal: Callable[[int, bytes], EsperError]
    method: str = "GET"
    limit: int = 64 * 2**10
    whole: bool = False
    probe: bool = False
    params: Mapping[str, str | list[str]] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | Sequence[bytes] | None = None
    content_type: str = "application/json"


class _TemporaryError(Exception):
    """A request failed in a way that may heal; `after` is how long the hub asks to be left."""

    def __init__(self, reason: str, *, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class HubRequests:
    """Sends requests to one hub; for one event loop.

    Args:
        config: address, token, time limits and retries.
        transport: what carries the requests, for tests; None means the network.
        clock: seconds that never go back, for the circuit breaker.
        sleep: waits between attempts.
        uniform: a random number between two bounds, for the jitter.

    Raises:
        ConfigError: no address is set, or it is none; or the token's file holds none.
    """

    def __init__(
        self,
        config: HubConfig,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if config.url is None:
            raise ConfigError("hub.url", None, "the hub's address, http:// or https://")
        try:
            httpx.URL(config.url).host  # noqa: B018 - reading it decodes an internationalised name
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(
                "hub.url", config.url, f"an address ({one_line(str(error))})"
            ) from error
        self._config = config
        self._root = config.url.rstrip("/")
        self._sleep = sleep
        self._uniform = uniform
        self._breaker = CircuitBreaker(
            config.breaker_failures, config.breaker_reset_seconds, clock=clock
        )
        self._requests = self._retries = self._failures = self._refused = self._received = 0
        headers = {"Accept-Encoding": "identity"}  # what is counted is what came over the wire
        if config.token_file is None and config.token is not None:
            headers["Authorization"] = f"Bearer {config.token.get_secret_value()}"
        self._client = httpx.AsyncClient(
            headers=headers,
            auth=None if config.token_file is None else _TokenInFile(Path(config.token_file)),
            timeout=httpx.Timeout(
                config.read_timeout_seconds, connect=config.connect_timeout_seconds
            ),
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    def statistics(self) -> HttpStatistics:
        """Counts, and where the circuit breaker stands."""
        return HttpStatistics(
            requests=self._requests,
            retries=self._retries,
            failures=self._failures,
            refused=self._refused,
            received_bytes=self._received,
            circuit=self._breaker.state,
        )

    async def body(self, request: HubRequest) -> bytes:
        """The body of a good answer to `request`.

        Raises:
            HubUnavailable: the hub does not answer, or breaks off every time.
            KernelError: the answer is larger than allowed.
            EsperError: what the request's `refusal` gives.
        """
        attempt, most = 0, 1 if request.probe else self._config.attempts
        while True:
            ticket = None if request.probe else self._breaker.admit()
            if ticket is None and not request.probe:
                self._refused += 1
                raise HubUnavailable(
                    f"{request.subject}: the hub at {self._config.url} failed too often; it is "
                    f"left alone for {self._breaker.seconds_left():.1f} s more"
                )
            try:
                return await self._once(ticket, request)
            except _TemporaryError as error:
                self._failures += 1
                attempt += 1
                if attempt >= most:
                    raise HubUnavailable(
                        f"{request.subject}: the hub at {self._config.url} gave no answer in "
                        f"{attempt} attempts: {error}; see hub.url"
                    ) from error
                self._retries += 1
                await self._sleep(max(error.after, self._backoff(attempt)))

    def _backoff(self, attempt: int) -> float:
        """Seconds to wait after the n-th failed attempt, n from 1."""
        longest = self._config.backoff_seconds * 2.0 ** (attempt - 1)
        return self._uniform(0.0, min(self._config.max_backoff_seconds, longest))

    async def _once(self, ticket: int | None, request: HubRequest) -> bytes:
        self._requests += 1
        outcome: Outcome = "abandoned"
        try:
            async with (
                asyncio.timeout(self._config.timeout_seconds),
                self._client.stream(
                    request.method,
                    self._root + request.path,
                    params=request.params or None,
                    content=None if request.content is None else _pieces(_parts(request.content)),
                    headers=_headers(request),
                ) as response,
            ):
                outcome = "failed" if _broken(response.status_code) else "answered"
                await self._refuse_status(response, request)
                outcome = "abandoned"
                data = await self._read(response, request)
                outcome = "answered"
                return data
        except (httpx.TransportError, TimeoutError) as error:
            outcome = "failed"
            reason = one_line(str(error))
            raise _TemporaryError(
                type(error).__name__ + (f": {reason}" if str(error) else "")
            ) from error
        finally:
            if ticket is not None:
                self._breaker.report(ticket, outcome)

    async def _refuse_status(self, response: httpx.Response, request: HubRequest) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        if status in _RETRIED or _broken(status):
            raise _TemporaryError(f"HTTP {status}", after=_retry_after(response))
        self._failures += 1
        problem = bytearray()
        async for chunk in response.aiter_raw():
            problem += chunk
            if len(problem) > MAX_PROBLEM_BYTES:
                break
        raise request.refusal(status, bytes(problem[:MAX_PROBLEM_BYTES]))

    async def _read(self, response: httpx.Response, request: HubRequest) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            self._failures += 1
            raise KernelError(
                f"{request.subject}: got Content-Encoding {one_line(encoding)} from the hub; "
                "allowed: identity, which was asked for; see hub.url"
            )
        data = bytearray()
        async for chunk in response.aiter_raw():
            self._received += len(chunk)
            if len(data) + len(chunk) > request.limit:
                self._failures += 1
                raise KernelError(
                    f"{request.subject}: got more than {request.limit} bytes; allowed: "
                    f"{request.limit}"
                )
            data += chunk
        if request.whole and len(data) < request.limit:
            raise httpx.ReadError(f"the body ended after {len(data)} of {request.limit} bytes")
        return bytes(data)


class _TokenInFile(httpx.Auth):
    """The token that a file holds at the moment: it is replaced there before it expires."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._token = self._read()

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        with suppress(ConfigError):  # while the file is being replaced, the last one still holds
            self._token = self._read()
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request

    def _read(self) -> str:
        allowed = "a file that holds a token of visible ASCII characters"
        try:
            token = self._file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("hub.token_file", str(self._file), allowed) from error
        if re.fullmatch(r"[\x21-\x7e]+", token) is None:
            raise ConfigError("hub.token_file", str(self._file), allowed)
        return token


def _broken(status: int) -> bool:
    """Whether the hub itself failed; without room it still answers."""
    return status >= 500 and status != httpx.codes.INSUFFICIENT_STORAGE


async def _pieces(content: Sequence[bytes]) -> AsyncIterator[bytes]:
    """A body in pieces, so that a long one leaves the event loop to others."""
    for part in content:
        for start in range(0, len(part), _CHUNK_BYTES):
            yield part[start : start + _CHUNK_BYTES]


def _parts(content: bytes | Sequence[bytes]) -> Sequence[bytes]:
    return (content,) if isinstance(content, bytes) else content


def _headers(request: HubRequest) -> dict[str, str]:
    trace_id = current_trace_id()
    headers = dict(request.headers)
    if trace_id is not None:
        headers[TRACE_HEADER] = trace_id
    if request.content is not None:
        headers["Content-Type"] = request.content_type
        headers["Content-Length"] = str(sum(map(len, _parts(request.content))))
    return headers


def _retry_after(response: httpx.Response, now: Callable[[], datetime] = utc_now) -> float:
    """Seconds that the hub asks to be left alone, capped; 0 where it asks for nothing."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text), MAX_RETRY_AFTER_SECONDS)
    try:
        seconds = (parsedate_to_datetime(text) - now()).total_seconds()
    except (ValueError, TypeError):  # no date, or one without a zone
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
