"""The ranks of a session: what they tell each other, and how rank 0 speaks for all of them.

Every rank runs the same trainer and takes the same steps in the same order. What only rank 0
knows (a decision, a kernel, a file) it tells the others; what each rank finds out alone (a fault,
a signal, the loss on its samples) is brought together. `Alone` is a session in one process,
`process_group.ProcessGroup` one under torchrun; both pass the same tests.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from esper import errors
from esper.errors import EsperError, Unavailable, WorkFailed, one_line

CHECK_SECONDS = 0.25
"""How often ranks ask each other whether one was told to stop, about."""
MOST_BATCHES = 4096
"""Between two such questions, at most."""


class Ranks(Protocol):
    """The processes of one session, numbered from 0. Every method is called by all of them.

    Values are JSON-ready. Methods raise Unavailable where a rank is gone or does not take part in
    time: then this process can only end, and be started again with the others.
    """

    @property
    def rank(self) -> int:
        """This process' number."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def told(self, value: Any = None) -> Any:
        """Rank 0's `value`, on every rank."""
        ...

    def told_bytes(self, data: bytes | None = None) -> bytes:
        """Rank 0's `data`, on every rank."""
        ...

    def exchanged(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of the ranks."""
        ...

    def gathered(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor of one shape and type, stacked in their order: [W, ...]."""
        ...

    def relayed(self, tensor: Tensor | None, owner: int) -> Tensor:
        """The tensor that rank `owner` gives, on every rank; what others give does not count."""
        ...

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place; in what order torch adds is its own choice."""
        ...

    def spread(self, tensor: Tensor) -> None:
        """Give every rank the contents of rank 0's tensor, in place."""
        ...

    async def awaited(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """What `work` comes to on rank 0, told to all; it may take as long as it likes.

        Raises:
            EsperError: `work` raised; on every rank, permanent or temporary as on rank 0.
        """
        ...

    def led(self, work: Callable[[], Any]) -> Any:
        """As `awaited`, for work that does not wait."""
        ...

    def stopping(self) -> bool:
        """Whether a rank was asked to stop, as far as this one knows; asks nobody."""
        ...

    def agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them, now and then."""
        ...


class Alone:
    """A session in one process."""

    rank = 0
    size = 1

    def __init__(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """`stopping` says whether this process was asked to stop."""
        self._stopping = stopping

    def told(self, value: Any = None) -> Any:
        """`value`."""
        return value

    def told_bytes(self, data: bytes | None = None) -> bytes:
        """`data`."""
        return data or b""

    def exchanged(self, value: Any) -> list[Any]:
        """`value` alone."""
        return [value]

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensor alone: [1, ...]."""
        return tensor.unsqueeze(0)

    def relayed(self, tensor: Tensor | None, owner: int) -> Tensor:
        """The tensor."""
        assert tensor is not None
        return tensor

    def summed(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def spread(self, tensor: Tensor) -> None:
        """The tensor has its contents already."""

    async def awaited(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """What `work` comes to."""
        return await work()

    def led(self, work: Callable[[], Any]) -> Any:
        """What `work` comes to."""
        return work()

    def stopping(self) -> bool:
        """Whether this process was asked to stop."""
        return self._stopping()

    def agree_to_stop(self) -> bool:
        """Whether this process was asked to stop."""
        return self._stopping()


class Rhythm:
    """How many batches pass between two questions, so that one comes every CHECK_SECONDS or so.

    Ranks that feed it the same times ask at the same batches.
    """

    def __init__(self) -> None:
        self._every = 1
        self._left = 0
        self._asked = time.monotonic()

    def due(self) -> bool:
        """Whether this batch is one to ask at."""
        self._left -= 1
        return self._left < 0

    @property
    def seconds(self) -> float:
        """Since the last question."""
        return time.monotonic() - self._asked

    def asked(self, seconds: float) -> None:
        """A question was asked; the slowest rank had needed `seconds` since the one before."""
        wanted = self._every * CHECK_SECONDS / max(seconds, 1e-6)
        self._every = int(max(1, min(wanted, 2 * self._every, MOST_BATCHES)))
        self._left = self._every - 1
        self._asked = time.monotonic()


def as_wire(error: BaseException) -> dict[str, Any]:
    """What another rank needs to raise the like of `error`."""
    if isinstance(error, EsperError):
        name, message, permanent = type(error).__name__, str(error), error.permanent
    else:
        name, permanent = "", True
        message = f"unexpected {type(error).__name__}: {one_line(str(error))}"
    return {"error": name, "message": message, "permanent": permanent}


def raised_elsewhere(told: dict[str, Any]) -> EsperError:
    """The error that `as_wire` told of: of its class, where a message alone makes one."""
    kind = getattr(errors, told["error"] or " ", None)
    if isinstance(kind, type) and issubclass(kind, EsperError):
        plain = kind.__init__ is EsperError.__init__
        if plain and kind is not EsperError:
            return kind(told["message"])
    return (WorkFailed if told["permanent"] else Unavailable)(told["message"])


def first_failure(outcomes: Sequence[dict[str, Any]]) -> EsperError | None:
    """The error of the lowest rank that has one, naming the rank; None where all went well."""
    for rank, outcome in enumerate(outcomes):
        if outcome.get("error") is not None:
            named = f"rank {rank}: {outcome['message']}" if len(outcomes) > 1 else None
            return raised_elsewhere(outcome | ({"message": named} if named else {}))
    return None
