"""Compiled kernels from a hub elsewhere: what a kernel cache fetches over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import httpx
from pydantic import ValidationError

from esper.configs import HubConfig
from esper.contracts.kernels import KernelMetadata
from esper.errors import EsperError, KernelError, KernelNotFound, one_line
from esper.services.urza.http_requests import (
    MAX_RETRY_AFTER_SECONDS,
    HttpStatistics,
    HubRequest,
    HubRequests,
)

__all__ = ["MAX_RETRY_AFTER_SECONDS", "HttpKernelSource", "HttpStatistics"]

MAX_METADATA_BYTES = 64 * 2**10
_KERNEL_ID = re.compile(r"[0-9a-f]{40}")
_ABSENT = frozenset({404, 410, 422})
_REMEMBERED = 64


class HttpKernelSource:
    """A `KernelSource` over a hub's REST interface; for one event loop, closed by `async with`.

    The arguments are those of `HubRequests`.

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
        self._config = config
        self._requests = HubRequests(
            config, transport=transport, clock=clock, sleep=sleep, uniform=uniform
        )
        self._announced: OrderedDict[str, KernelMetadata] = OrderedDict()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._requests.close()

    async def metadata(self, kernel: str) -> KernelMetadata:
        """What the hub knows of a compiled kernel.

        Raises:
            KernelError: the hub does not have it, refuses the request, or answers something else.
            HubUnavailable: the hub does not answer.
        """
        data = await self._requests.body(
            HubRequest(
                subject=f"kernel {kernel}",
                path=f"{_kernel_path(kernel)}/metadata",
                refusal=lambda status, problem: self._refusal(kernel, status, problem),
                limit=MAX_METADATA_BYTES,
            )
        )
        try:
            found = KernelMetadata.model_validate_json(data)
        except ValidationError as error:
            raise KernelError(
                f"kernel {kernel}: the hub's answer is no kernel's metadata: {one_line(str(error))}"
            ) from error
        if found.kernel != kernel:
            raise KernelError(
                f"kernel {kernel}: the hub answered with kernel {found.kernel} instead"
            )
        if found.artifact_bytes > self._config.max_artifact_bytes:
            raise KernelError(
                f"kernel {kernel}: got {found.artifact_bytes} bytes; allowed: at most "
                f"{self._config.max_artifact_bytes}; see hub.max_artifact_bytes"
            )
        self._announced[kernel] = found
        if len(self._announced) > _REMEMBERED:
            self._announced.popitem(last=False)
        return found

    async def artifact(self, kernel: str) -> bytes:
        """The artifact's bytes, as many as its metadata says and with the digest that it says.

        Bytes of another digest are asked for once more: they may have been changed on the way.

        Raises:
            KernelError: as `metadata`; or the bytes were wrong twice.
            HubUnavailable: the hub does not answer, or breaks off every time.
        """
        expected = self._announced.pop(kernel, None) or await self.metadata(kernel)
        for _ in range(2):
            data = await self._requests.body(
                HubRequest(
                    subject=f"kernel {kernel}",
                    path=f"{_kernel_path(kernel)}/artifact",
                    refusal=lambda status, problem: self._refusal(kernel, status, problem),
                    limit=expected.artifact_bytes,
                    whole=True,
                )
            )
            came = hashlib.sha256(data).hexdigest()
            if came == expected.artifact_digest:
                return data
        raise KernelError(
            f"kernel {kernel}: got an artifact with SHA-256 {came}, twice; allowed: "
            f"{expected.artifact_digest}"
        )

    def statistics(self) -> HttpStatistics:
        """Counts, and where the circuit breaker stands."""
        return self._requests.statistics()

    def _refusal(self, kernel: str, status: int, problem: bytes) -> EsperError:
        del problem
        if status in _ABSENT:
            return KernelError(f"kernel {kernel}: the hub does not have it (HTTP {status})")
        mended = "hub.token" if status in {401, 403} else "hub.url"
        return KernelError(
            f"kernel {kernel}: got HTTP {status} from the hub; allowed: 200; see {mended}"
        )


def checked_kernel(kernel: str) -> str:
    """`kernel`, which may stand in a path: it leads nowhere else.

    Raises:
        KernelNotFound: it is no kernel's id.
    """
    if not _KERNEL_ID.fullmatch(kernel):
        raise KernelNotFound("kernel", kernel, "a kernel's id, 40 hex digits")
    return kernel


def _kernel_path(kernel: str) -> str:
    return f"/api/v1/kernels/{checked_kernel(kernel)}"
