"""Which of several operators works: one Lease, renewed every second, valid for eight.

What counts is what the holder can know. Its time begins when it *sends* the renewal that succeeds,
by a clock that never stands still; whoever waits begins to count when it has *seen* the renewal,
which is later. So the holder's time is over before another's begins, however long a request hangs
or a process is stopped in between.

    sent ───── seen by the other ─────────── holder ends ── validity over ── the other takes it
    0          at least 0                    5              8                seen + 8
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NoReturn, Protocol

from esper.configs import OperatorConfig
from esper.errors import ConfigError, EsperError
from esper_operator.api import ClusterApi
from esper_operator.errors import ApiConflict, ApiNotFound, ApiUnavailable, LeaseLost
from esper_operator.kinds import LEASE

_log = logging.getLogger(__name__)


def lasting_clock() -> float:
    """Seconds that never go back, and go on while the machine sleeps."""
    return time.clock_gettime(_CLOCK)


_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True)
class LeaseRecord:
    """What a Lease says; `version` is that of the object, empty before it is there."""

    holder: str = ""
    seconds: int = 8
    renewed: str = ""
    acquired: str = ""
    transitions: int = 0
    version: str = ""


class Leases(Protocol):
    """Where the lease lies. Every method gives what lies there afterwards.

    All raise ApiUnavailable where there is no answer in time.
    """

    async def read(self) -> LeaseRecord | None:
        """What it says; None where there is none."""
        ...

    async def write(self, record: LeaseRecord) -> LeaseRecord:
        """Replace that of `record.version`, or make it where that is empty.

        Raises:
            ApiConflict: it was changed, or made, meanwhile.
        """
        ...


class MemoryLeases:
    """The lease of processes that are one: for tests of what is built on it.

    `cut` makes it give no answer.
    """

    def __init__(self) -> None:
        self.record: LeaseRecord | None = None
        self.cut = False

    async def read(self) -> LeaseRecord | None:
        """What it says; None where there is none."""
        await self._reach()
        return self.record

    async def write(self, record: LeaseRecord) -> LeaseRecord:
        """Replace that of `record.version`, or make it where that is empty."""
        await self._reach()
        current = "" if self.record is None else self.record.version
        if record.version != current:
            raise ApiConflict("PUT lease", 409, "Conflict", f"it is at {current}")
        self.record = replace(record, version=str(int(current or 0) + 1))
        return self.record

    async def _reach(self) -> None:
        await asyncio.sleep(0)
        if self.cut:
            raise ApiUnavailable("the lease: no answer")


class ApiLeases:
    """The Lease of that name in the API server."""

    def __init__(self, api: ClusterApi, config: OperatorConfig) -> None:
        """`config` names it."""
        self._api = api
        self._namespace, self._name = config.lease_namespace, config.lease_name
        self._seconds = config.lease_request_seconds

    async def read(self) -> LeaseRecord | None:
        """What it says; None where there is none."""
        path = LEASE.path(self._namespace, self._name)
        try:
            found = await self._api.send("GET", path, seconds=self._seconds)
        except ApiNotFound:
            return None
        return _record(found)

    async def write(self, record: LeaseRecord) -> LeaseRecord:
        """Replace that of `record.version`, or make it where that is empty."""
        meta = {"name": self._name, "namespace": self._namespace}
        body = {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": meta,
            "spec": {
                "holderIdentity": record.holder,
                "leaseDurationSeconds": record.seconds,
                "leaseTransitions": record.transitions,
                "renewTime": record.renewed,
                "acquireTime": record.acquired,
            },
        }
        if record.version:
            meta["resourceVersion"] = record.version
            method, path = "PUT", LEASE.path(self._namespace, self._name)
        else:
            method, path = "POST", LEASE.path(self._namespace)
        return _record(await self._api.send(method, path, body=body, seconds=self._seconds))


def _record(found: dict[str, dict[str, object]]) -> LeaseRecord:
    spec = found.get("spec") or {}
    return LeaseRecord(
        holder=str(spec.get("holderIdentity") or ""),
        seconds=int(str(spec.get("leaseDurationSeconds") or 0)),
        renewed=str(spec.get("renewTime") or ""),
        acquired=str(spec.get("acquireTime") or ""),
        transitions=int(str(spec.get("leaseTransitions") or 0)),
        version=str(found["metadata"]["resourceVersion"]),
    )


class Election:
    """One candidate. `acquire`, then `keep` beside the work, then `release` after the work."""

    def __init__(
        self,
        leases: Leases,
        config: OperatorConfig,
        identity: str,
        *,
        clock: Callable[[], float] = lasting_clock,
    ) -> None:
        """`identity` is like no other candidate's; `config` says how long a lease lasts.

        Raises:
            ConfigError: the holder would not end before its lease does.
        """
        longest = config.lease_seconds - config.retry_seconds
        if config.renew_seconds > longest or config.write_seconds > longest:
            raise ConfigError(
                "operator.renew_seconds, operator.write_seconds",
                f"{config.renew_seconds:g}, {config.write_seconds:g}",
                f"at most {longest:g}: operator.lease_seconds less operator.retry_seconds",
            )
        self.identity = identity
        self._leases = leases
        self._config = config
        self._clock = clock
        self._held: LeaseRecord | None = None
        self._since = 0.0

    def remaining(self) -> float:
        """Seconds for which nobody else can hold the lease; none where this process does not."""
        if self._held is None:
            return 0.0
        return max(0.0, self._since + self._config.lease_seconds - self._clock())

    async def acquire(self) -> None:
        """Wait until the lease is free or has run out, and take it."""
        seen: LeaseRecord | None = None
        seen_at, said = self._clock(), ""
        while self._held is None:
            try:
                found = await self._leases.read()
                if found is not None and found != seen:
                    seen, seen_at = found, self._clock()
                if found is None or self._free(found, seen_at):
                    await self._take(found)
                    break
            except ApiConflict:
                _log.debug("another operator was faster")
            except EsperError as error:
                if str(error) != said:
                    _log.warning("the lease can't be had at the moment: %s", error)
                said = str(error)
            await asyncio.sleep(self._config.retry_seconds)

    def _free(self, found: LeaseRecord, seen_at: float) -> bool:
        return not found.holder or self._clock() - seen_at > max(found.seconds, 1)

    async def _take(self, found: LeaseRecord | None) -> None:
        now = _now()
        record = LeaseRecord(
            holder=self.identity,
            seconds=self._config.lease_seconds,
            renewed=now,
            acquired=now,
            transitions=0 if found is None else found.transitions + 1,
            version="" if found is None else found.version,
        )
        sent = self._clock()
        self._held = await self._leases.write(record)
        self._since = sent
        _log.info("this operator works now", extra={"lease": self.identity})

    async def keep(self) -> NoReturn:
        """Renew the lease for ever.

        Raises:
            LeaseLost: another holds it, or no renewal has succeeded for `renew_seconds`.
        """
        while True:
            await asyncio.sleep(self._config.retry_seconds)
            silent = self._clock() - self._since
            if silent > self._config.renew_seconds:
                self._held = None
                raise LeaseLost(
                    f"the lease: not renewed for {silent:.1f} s; allowed: "
                    f"{self._config.renew_seconds:g} s; see operator.renew_seconds"
                )
            try:
                await self._renew()
            except ApiConflict:
                await self._look()
            except EsperError as error:
                _log.warning("the lease was not renewed: %s", error)

    async def _renew(self) -> None:
        if self._held is None:
            raise LeaseLost("the lease: given back")
        sent = self._clock()
        held = await self._leases.write(replace(self._held, renewed=_now()))
        if self._held is not None:
            self._held, self._since = held, sent

    async def _look(self) -> None:
        """Find out who has written: perhaps this process, by a request whose answer was lost."""
        try:
            found = await self._leases.read()
        except EsperError as error:
            _log.warning("the lease was changed, and can't be read: %s", error)
            return
        if found is None or found.holder != self.identity:
            self._held = None
            holder = "nobody" if found is None else found.holder or "nobody"
            raise LeaseLost(f"the lease: held by {holder}; allowed: {self.identity}")
        self._held = found

    async def release(self) -> None:
        """Give the lease back, so that another need not wait for its end.

        Nothing may be written from now on.
        """
        held, self._held = self._held, None
        if held is None or self._clock() - self._since > self._config.lease_seconds:
            return
        try:
            await self._leases.write(replace(held, holder="", seconds=1, renewed=_now()))
        except EsperError as error:
            _log.warning("the lease could not be given back; it ends by itself: %s", error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
