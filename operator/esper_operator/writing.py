"""The one place that changes anything in the API server.

Every write asks the lease first, and once more when there is a connection to send it on: one that
could still be under way when another operator may work is not sent at all.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from esper_operator.api import APPLY, ClusterApi, Fence
from esper_operator.errors import ApiConflict, ApiNotFound, LeaseLost
from esper_operator.kinds import BY_NAME, EVENT, MANAGER, Kind
from esper_operator.metrics import OperatorMetrics

_NO_VERSION = "1"
"""No object has this version, which is the store's own before it held any; to apply one that has it
makes the object, and conflicts where there is one."""
Object = Mapping[str, Any]
MAX_EVENT_MESSAGE = 1024


class Writer:
    """Applies, deletes and tells, while the lease lasts.

    Every method raises LeaseLost where the lease would not outlast the write, and the errors of
    `ClusterApi.send`.
    """

    def __init__(
        self,
        api: ClusterApi,
        remaining: Callable[[], float],
        metrics: OperatorMetrics,
        *,
        seconds: float,
        background_rate: float,
    ) -> None:
        """`remaining` gives the lease's seconds; `seconds` limit a write.

        `background_rate` is how many writes a second may be made in the background.
        """
        self._api = api
        self._remaining = remaining
        self._metrics = metrics
        self._seconds = seconds
        self._pace = Pace(background_rate)

    async def apply(self, manifest: Object, uid: str | None = None) -> Object:
        """Make the object; with `uid` bring that one's fields to those that `manifest` names.

        Raises:
            ApiConflict: there is one of that name already, or it is another one.
        """
        held = {"resourceVersion": _NO_VERSION} if uid is None else {"uid": uid}
        checked = {**manifest, "metadata": {**manifest["metadata"], **held}}
        return await self._applied(checked, "", "apply")

    async def there(self, manifest: Object) -> Object | None:
        """The metadata of the object that has the name of `manifest`, whoever has made it."""
        kind, meta = BY_NAME[manifest["kind"]], manifest["metadata"]
        named = {"fieldSelector": f"metadata.name={meta['name']}"}
        async for found, _ in self._api.chunks(kind, meta["namespace"], named, metadata_only=True):
            for item in found:
                metadata: Object = item["metadata"]
                return metadata
        return None

    def background_wait(self) -> float:
        """Seconds until one more write may be made in the background; 0: now, and it is counted."""
        return self._pace.wait()

    async def apply_status(self, manifest: Object) -> Object:
        """Bring the status of an object to that of `manifest`, which names its uid."""
        return await self._applied(manifest, "status", "status")

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        uid: str,
        *,
        grace_seconds: int | None = None,
    ) -> bool:
        """Delete that object, and what it owns; False: there is none of that uid any more."""
        body: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            await self._send("delete", kind, "DELETE", kind.path(namespace, name), body)
        except (ApiNotFound, ApiConflict):
            return False  # it is gone, or another stands in its place: both are what was wanted
        return True

    async def tell(
        self,
        about: Object,
        severity: str,
        reason: str,
        message: str,
    ) -> None:
        """A Kubernetes Event about an object; the same one is told once.

        `severity` is Normal or Warning; `about` has apiVersion, kind, namespace, name and uid.
        """
        told = message[:MAX_EVENT_MESSAGE]
        content = f"{about['uid']}/{severity}/{reason}/{told}"
        name = f"{about['name']}.{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"name": name, "namespace": about["namespace"]},
            "involvedObject": dict(about),
            "type": severity,
            "reason": reason,
            "message": told,
            "source": {"component": MANAGER},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._send("create", EVENT, "POST", EVENT.path(about["namespace"]), body)
        except ApiConflict:
            """It was told before this process came to work."""

    async def _applied(self, manifest: Object, subresource: str, verb: str) -> Object:
        kind = BY_NAME[manifest["kind"]]
        meta = manifest["metadata"]
        path = kind.path(meta["namespace"], meta["name"], subresource)
        query = {"fieldManager": MANAGER, "force": "true"}
        return await self._send(verb, kind, "PATCH", path, manifest, query, APPLY)

    async def _send(
        self,
        verb: str,
        kind: Kind,
        method: str,
        path: str,
        body: Object,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        fence = self._fence(f"{verb} {path}")
        fence()
        started = time.perf_counter()
        outcome = "failed"
        try:
            answer = await self._api.send(
                method, path, query=query, body=body, content_type=content_type,
                seconds=self._seconds, fence=fence,
            )  # fmt: skip
            outcome = "done"
        finally:
            self._metrics.wrote(verb, kind.name, outcome, time.perf_counter() - started)
        return answer

    def _fence(self, what: str) -> Fence:
        def ask() -> None:
            left = self._remaining()
            if left <= self._seconds:
                raise LeaseLost(
                    f"{what}: the lease lasts for {left:.1f} s more; allowed: more than the "
                    f"{self._seconds:g} s of operator.write_seconds"
                )

        return ask


class Pace:
    """So many turns a second, as many of them at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate` is in turns a second, `clock` in seconds."""
        self._rate = rate
        self._most = max(1.0, rate)
        self._clock = clock
        self._left = self._most
        self._at = clock()

    def wait(self) -> float:
        """Seconds until there is a turn; 0: there is one, and it is taken."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1.0:
            return (1.0 - self._left) / self._rate
        self._left -= 1.0
        return 0.0
