"""Questions to a container: is it alive, is it ready, has it started?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx

Object = Mapping[str, Any]
Run = Callable[[Sequence[str], float], Awaitable[int | None]]
"""Runs a command in the container; its exit code, or None if it took too long."""


class Probe:
    """One probe of a container, asked until it is cancelled.

    Args:
        spec: a v1.Probe; one of kind grpc always fails.
        address: the pod's.
        ports: the container's, by name.
        run: runs a command in the container.
        told: gets each verdict that its thresholds allow, and what the last answer was.
        first: the verdict before the first answer.
    """

    def __init__(
        self,
        spec: Object,
        *,
        address: str,
        ports: Mapping[str, int],
        run: Run,
        told: Callable[[bool, str], None],
        first: bool,
    ) -> None:
        self._spec = spec
        self._address = address
        self._ports = ports
        self._run = run
        self._told = told
        self._verdict = first

    async def ask_on(self) -> None:
        """Ask, and tell each change; a verdict of failure is told again at each further failure."""
        await asyncio.sleep(self._spec.get("initialDelaySeconds", 0))
        period = self._spec.get("periodSeconds", 10)
        needed = {
            True: self._spec.get("successThreshold", 1),
            False: self._spec.get("failureThreshold", 3),
        }
        last, in_a_row = None, 0
        while True:
            answer, said = await self.asked()
            in_a_row = in_a_row + 1 if answer == last else 1
            last = answer
            if in_a_row >= needed[answer] and (answer != self._verdict or not answer):
                self._verdict = answer
                self._told(answer, said)
            await asyncio.sleep(period)

    async def asked(self) -> tuple[bool, str]:
        """One question, and its answer."""
        seconds = float(self._spec.get("timeoutSeconds", 1))
        if "exec" in self._spec:
            code = await self._run(self._spec["exec"]["command"], seconds)
            said = "command timed out" if code is None else f"command ended with {code}"
            return code == 0, said
        if "httpGet" in self._spec:
            return await self._http(self._spec["httpGet"], seconds)
        if "tcpSocket" in self._spec:
            return await self._tcp(self._spec["tcpSocket"], seconds)
        return False, f"a node of processes can't ask {sorted(self._spec)}"

    async def _http(self, wanted: Object, seconds: float) -> tuple[bool, str]:
        scheme = wanted.get("scheme", "HTTP").lower()
        host = wanted.get("host") or self._address
        path = wanted.get("path", "/")
        url = f"{scheme}://{host}:{self._port(wanted['port'])}/{path.lstrip('/')}"
        headers = {header["name"]: header["value"] for header in wanted.get("httpHeaders", ())}
        try:
            # A kubelet doesn't look at certificates either.
            async with httpx.AsyncClient(verify=False, trust_env=False, timeout=seconds) as client:
                answer = await client.get(url, headers=headers)
        except httpx.HTTPError as error:
            return False, f"Get {url!r}: {error!r}"
        return answer.status_code < 400, f"HTTP probe failed with statuscode: {answer.status_code}"

    async def _tcp(self, wanted: Object, seconds: float) -> tuple[bool, str]:
        host, port = wanted.get("host") or self._address, self._port(wanted["port"])
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), seconds)
        except (OSError, TimeoutError) as error:
            return False, f"dial tcp {host}:{port}: {error!r}"
        writer.close()
        return True, ""

    def _port(self, wanted: int | str) -> int:
        return self._ports.get(wanted, 0) if isinstance(wanted, str) else wanted
