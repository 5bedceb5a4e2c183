"""Compiled kernels from a hub elsewhere, over asynchronous HTTP.

The hub's address comes from the settings alone: no default, no proxy from the environment, no
redirect followed. What may heal is tried again, with full jitter (M. Brooker, Exponential Backoff
And Jitter, 2015); a hub that stays away is left alone by a circuit breaker, so that asking it
costs microseconds and not time limits.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Self

import httpx
from pydantic import ValidationError

from esper.configs import HubConfig
from esper.contracts.base import utc_now
from esper.contracts.kernels import KernelMetadata
from esper.errors import ConfigError, HubUnavailable, KernelError, one_line
from esper.utils.circuit_breaker import CircuitBreaker, CircuitState, Outcome

MAX_METADATA_BYTES = 64 * 2**10
MAX_RETRY_AFTER_SECONDS = 30.0
_KERNEL_ID = re.compile(r"[0-9a-f]{40}")
_RETRIED = frozenset({408, 425, 429, *range(500, 600)})
_ABSENT = frozenset({404, 410, 422})
_REMEMBERED = 64


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


class _TemporaryError(Exception):
    """A request failed in a way that may heal; `after` is how long the hub asks to be left."""

    def __init__(self, reason: str, *, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class HttpKernelSource:
    """A `KernelSource` over a hub's REST interface; for one event loop, closed by `async with`.

    Args:
        config: address, token, time limits and retries.
        transport: what carries the requests, for tests; None means the network.
        clock: seconds that never go back, for the circuit breaker.
        sleep: waits between attempts.
        uniform: a random number between two bounds, for the jitter.

    Raises:
        ConfigError: no address is set, or it is none.
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
            root = httpx.URL(config.url.rstrip("/") + "/api/v1/kernels")
            root.host  # noqa: B018 - reading it decodes an internationalised name
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(
                "hub.url", config.url, f"an address ({one_line(str(error))})"
            ) from error
        self._config = config
        self._root = str(root)
        self._sleep = sleep
        self._uniform = uniform
        self._breaker = CircuitBreaker(
            config.breaker_failures, config.breaker_reset_seconds, clock=clock
        )
        self._announced: OrderedDict[str, KernelMetadata] = OrderedDict()
        self._requests = self._retries = self._failures = self._refused = self._received = 0
        headers = {"Accept-Encoding": "identity"}  # what is counted is what came over the wire
        if config.token is not None:
            headers["Authorization"] = f"Bearer {config.token.get_secret_value()}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(
                config.read_timeout_seconds, connect=config.connect_timeout_seconds
            ),
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def metadata(self, kernel_id: str) -> KernelMetadata:
        """What the hub knows of a compiled kernel.

        Raises:
            KernelError: the hub does not have it, refuses the request, or answers something else.
            HubUnavailable: the hub does not answer.
        """
        _refuse_malformed(kernel_id)
        data = await self._persistently(kernel_id, "", MAX_METADATA_BYTES)
        try:
            found = KernelMetadata.model_validate_json(data)
        except ValidationError as error:
            raise KernelError(
                f"kernel {kernel_id}: the hub's answer is no kernel's metadata: "
                f"{one_line(str(error))}"
            ) from error
        if found.kernel != kernel_id:
            raise KernelError(
                f"kernel {kernel_id}: the hub answered with kernel {found.kernel} instead"
            )
        if found.artifact_bytes > self._config.max_artifact_bytes:
            raise KernelError(
                f"kernel {kernel_id}: got {found.artifact_bytes} bytes; allowed: at most "
                f"{self._config.max_artifact_bytes}; see hub.max_artifact_bytes"
            )
        self._announced[kernel_id] = found
        if len(self._announced) > _REMEMBERED:
            self._announced.popitem(last=False)
        return found

    async def artifact(self, kernel_id: str) -> bytes:
        """The artifact's bytes, as many as its metadata says and with the digest that it says.

        Bytes of another digest are asked for once more: they may have been changed on the way.

        Raises:
            KernelError: as `metadata`; or the bytes were wrong twice.
            HubUnavailable: the hub does not answer, or breaks off every time.
        """
        expected = self._announced.pop(kernel_id, None) or await self.metadata(kernel_id)
        for _ in range(2):
            data = await self._persistently(
                kernel_id, "/artifact", expected.artifact_bytes, whole=True
            )
            came = hashlib.sha256(data).hexdigest()
            if came == expected.artifact_digest:
                return data
        raise KernelError(
            f"kernel {kernel_id}: got an artifact with SHA-256 {came}, twice; allowed: "
            f"{expected.artifact_digest}"
        )

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

    async def _persistently(
        self, kernel_id: str, part: str, limit: int, *, whole: bool = False
    ) -> bytes:
        """The body of an answer of at most `limit` bytes, exactly so many where it is `whole`."""
        attempt = 0
        while True:
            ticket = self._breaker.admit()
            if ticket is None:
                self._refused += 1
                raise HubUnavailable(
                    f"kernel {kernel_id}: the hub at {self._config.url} failed too often; it is "
                    f"left alone for {self._breaker.seconds_left():.1f} s more"
                )
            try:
                return await self._once(ticket, kernel_id, part, limit, whole)
            except _TemporaryError as error:
                self._failures += 1
                attempt += 1
                if attempt >= self._config.attempts:
                    raise HubUnavailable(
                        f"kernel {kernel_id}: the hub at {self._config.url} gave no answer in "
                        f"{attempt} attempts: {error}; see hub.url"
                    ) from error
                self._retries += 1
                await self._sleep(max(error.after, self._backoff(attempt)))

    def _backoff(self, attempt: int) -> float:
        """Seconds to wait after the n-th failed attempt, n from 1."""
        longest = self._config.backoff_seconds * 2.0 ** (attempt - 1)
        return self._uniform(0.0, min(self._config.max_backoff_seconds, longest))

    async def _once(self, ticket: int, kernel_id: str, part: str, limit: int, whole: bool) -> bytes:
        self._requests += 1
        outcome: Outcome = "abandoned"
        try:
            async with (
                asyncio.timeout(self._config.timeout_seconds),
                self._client.stream("GET", f"{self._root}/{kernel_id}{part}") as response,
            ):
                outcome = "failed" if response.status_code >= 500 else "answered"
                self._refuse_status(response, kernel_id)
                outcome = "abandoned"
                data = await self._body(response, kernel_id, limit, whole)
                outcome = "answered"
                return data
        except (httpx.TransportError, TimeoutError) as error:
            outcome = "failed"
            reason = one_line(str(error))
            raise _TemporaryError(
                type(error).__name__ + (f": {reason}" if str(error) else "")
            ) from error
        finally:
            self._breaker.report(ticket, outcome)

    def _refuse_status(self, response: httpx.Response, kernel_id: str) -> None:
        status = response.status_code
        if status == 200:
            return
        if status in _RETRIED:
            raise _TemporaryError(f"HTTP {status}", after=_retry_after(response))
        self._failures += 1
        if status in _ABSENT:
            raise KernelError(f"kernel {kernel_id}: the hub does not have it (HTTP {status})")
        mended = {401: "hub.token", 403: "hub.token"}.get(status, "hub.url")
        raise KernelError(
            f"kernel {kernel_id}: got HTTP {status} from the hub; allowed: 200; see {mended}"
        )

    async def _body(
        self, response: httpx.Response, kernel_id: str, limit: int, whole: bool
    ) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            self._failures += 1
            raise KernelError(
                f"kernel {kernel_id}: got Content-Encoding {one_line(encoding)} from the hub; "
                "allowed: identity, which was asked for; see hub.url"
            )
        data = bytearray()
        async for chunk in response.aiter_raw():
            self._received += len(chunk)
            if len(data) + len(chunk) > limit:
                self._failures += 1
                raise KernelError(
                    f"kernel {kernel_id}: got more than {limit} bytes; allowed: {limit}"
                )
            data += chunk
        if whole and len(data) < limit:
            raise httpx.ReadError(f"the body ended after {len(data)} of {limit} bytes")
        return bytes(data)


def _refuse_malformed(kernel_id: str) -> None:
    if not _KERNEL_ID.fullmatch(kernel_id):
        raise KernelError(f"kernel id: got {one_line(kernel_id)}; allowed: 40 hex digits")


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
