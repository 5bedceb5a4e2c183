"""A session's objects at the hub, over HTTP: where its checkpoints and results lie.

A hub that is away is waited for: this works beside training, which goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from typing import TypeVar

from esper.configs import HubConfig
from esper.errors import HubUnavailable, KernelError, NotFound, StoreUnavailable
from esper.services.urza.http_answers import checked_uid, hub_error, read_answer
from esper.services.urza.http_requests import HubRequest, HubRequests
from esper.services.urza.wire import SessionObjects
from esper.utils.object_store import require_key
from esper.utils.transfers import Receipt

PATIENCE_SECONDS = 300.0
"""For one object: then the hub counts as away, and its caller as failed."""
PAUSE_SECONDS = (0.5, 10.0)
MAX_LIST_BYTES = 16 * 2**20
MAX_OBJECT_BYTES = 2**40

Result = TypeVar("Result")


class HubObjects:
    """The objects that a session keeps at the hub, by their names.

    Every call may come from another event loop, and has connections of its own. All of them raise
    BadInput for a name that is none and where the hub refuses the token, and StoreUnavailable where
    it does not answer for `PATIENCE_SECONDS`.

    Args:
        config: the hub's address, token, time limits and retries.
        uid: the session's.
        sleep: waits between tries.
        clock: seconds that never go back.

    Raises:
        ConfigError: no address is set.
        BadInput: `uid` is none of a session.
    """

    def __init__(
        self,
        config: HubConfig,
        uid: str,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        HubRequests(config)  # refuses an address that is none
        self._config = config
        self._root = f"/api/v1/sessions/{checked_uid(uid)}/objects"
        self._sleep = sleep
        self._clock = clock
        self._sizes: dict[str, int] = {}

    async def put(self, key: str, data: bytes) -> bool:
        """Keep `data` unless there is an object of that name; whether the hub has it now."""
        return await self._put(key, (data,), hashlib.sha256(data).hexdigest(), len(data))

    async def put_stream(
        self, key: str, chunks: AsyncIterable[bytes], *, sha256: str, max_bytes: int
    ) -> bool:
        """Keep what `chunks` gives, if it has that digest; all of it is held until it is kept.

        Raises:
            BadInput: another digest, or more than `max_bytes` bytes.
        """
        receipt, pieces = Receipt(key, sha256, max_bytes), []
        async for chunk in chunks:
            receipt.count(len(chunk))
            receipt.digest(bytearray(chunk))
            pieces.append(chunk)
        receipt.close()
        return await self._put(key, pieces, sha256, receipt.num_bytes)

    async def get(self, key: str) -> bytes | None:
        """The bytes of an object, None where there is none."""
        require_key(key)
        size = self._sizes.get(key)
        request = HubRequest(
            subject=f"object {key}",
            path=f"{self._root}/{key}",
            refusal=hub_error,
            limit=MAX_OBJECT_BYTES if size is None else size,
            whole=size is not None,
        )
        try:
            return await self._asked(request)
        except (NotFound, KernelError):  # it is gone, or another one of that name is larger
            return None

    async def listed(self, place: str) -> dict[str, int]:
        """The objects below `place` with their sizes in bytes, in the order of their names."""
        require_key(place)
        request = HubRequest(
            subject="objects", path=self._root, refusal=hub_error, limit=MAX_LIST_BYTES
        )
        found = read_answer(SessionObjects, await self._asked(request), self._root)
        self._sizes = {one.name: one.size for one in found.objects}
        return {name: size for name, size in self._sizes.items() if name.startswith(f"{place}/")}

    async def delete(self, key: str) -> bool:
        """Remove an object; whether the hub says that there is none now."""
        require_key(key)
        self._sizes.pop(key, None)
        await self._asked(
            HubRequest(
                subject=f"object {key}",
                path=f"{self._root}/{key}",
                refusal=hub_error,
                method="DELETE",
            )
        )
        return True

    async def check(self) -> None:
        """Return if the hub answers and takes the token."""
        await self.listed("checkpoints")

    async def close(self) -> None:
        """Nothing is held open."""

    async def _put(self, key: str, pieces: Sequence[bytes], sha256: str, num_bytes: int) -> bool:
        require_key(key)
        await self._asked(
            HubRequest(
                subject=f"object {key}",
                path=f"{self._root}/{key}",
                refusal=hub_error,
                method="PUT",
                params={"digest": sha256, "bytes": str(num_bytes)},
                content=tuple(pieces),
                content_type="application/octet-stream",
            )
        )
        return True

    async def _asked(self, request: HubRequest) -> bytes:
        """What the hub answers, once it does."""
        end = self._clock() + PATIENCE_SECONDS
        pause, most = PAUSE_SECONDS
        while True:
            requests = HubRequests(self._config)
            try:
                return await requests.body(request)
            except HubUnavailable as error:
                if self._clock() + pause > end:
                    raise StoreUnavailable(str(error)) from error
            finally:
                await requests.close()
            await self._sleep(pause)
            pause = min(2 * pause, most)
