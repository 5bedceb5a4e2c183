"""Reading an object over connections that may break."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError

from esper.errors import StoreUnavailable, one_line

if TYPE_CHECKING:
    from botocore.response import StreamingBody

_PAUSE_SECONDS = 0.1
_MAX_PAUSE_SECONDS = 2.0


def pause(attempt: int) -> None:
    """Wait before the n-th further attempt, n from 1: full jitter under a doubling bound."""
    longest = min(_MAX_PAUSE_SECONDS, _PAUSE_SECONDS * 2.0 ** (attempt - 1))
    time.sleep(random.uniform(0.0, longest))


class ResumingBody:
    """The bytes of one object; where a connection breaks, another goes on from there.

    Args:
        key: the object's, for errors.
        num_bytes: the object's size.
        body: what the service has begun to send.
        again: asks for the same object from that byte on.
        attempts: how often in a row reading may fail.
        received: is told how many bytes came.
    """

    def __init__(
        self,
        key: str,
        num_bytes: int,
        body: StreamingBody,
        again: Callable[[int], StreamingBody],
        *,
        attempts: int,
        received: Callable[[int], None],
    ) -> None:
        self.num_bytes = num_bytes
        self._key = key
        self._body = body
        self._again = again
        self._attempts = attempts
        self._received = received
        self._offset = 0

    def read(self, limit: int) -> bytes:
        """The next bytes, at most `limit`, none at the end.

        Raises:
            StoreUnavailable: the connection broke at every attempt.
        """
        limit = min(limit, self.num_bytes - self._offset)
        failures = 0
        while limit:
            try:
                chunk = self._body.read(limit)
            except BotoCoreError as error:
                failures += 1
                self._body.close()
                if failures >= self._attempts:
                    raise StoreUnavailable(
                        f"object {self._key}: its bytes broke off {failures} times at "
                        f"{self._offset} of {self.num_bytes}: {one_line(str(error))}"
                    ) from error
                pause(failures)
                self._body = self._again(self._offset)
            else:
                self._offset += len(chunk)
                self._received(len(chunk))
                return chunk
        return b""

    def close(self) -> None:
        """Let go of the connection."""
        self._body.close()
