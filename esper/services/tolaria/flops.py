"""FLOPs as executed: 2 per multiply-add of matrix products and convolutions, both directions.

What a piece of work costs depends on the model's structure and the shape of its batch, so it is
counted by torch's own counter the first time that pair comes up and remembered from then on.
Compiled code hides its operations from the counter, so that first time runs eager. So do torch's
fused transformer layers, which also fill padded positions otherwise: no metered work takes them,
the first time or later, so that all that is compared is computed in one way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

from torch.utils.flop_counter import FlopCounterMode

from esper.execution.calls import unfused
from esper.services.tolaria.distribution import Ranks


class FlopMeter:
    """Adds up the FLOPs of a session.

    `trials` is the part spent on evidence and culled work, `monitoring` the part spent on the
    validation metrics of every epoch, which anyone who trains looks at, growing or not. `known`
    is what each kind of work costs, JSON-ready: whoever goes on with a run takes it along, and
    then runs the same work eager as the run itself would have.
    """

    def __init__(
        self,
        eager: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        shared: bool = False,
    ) -> None:
        """`eager` makes contexts in which nothing runs compiled.

        `shared`: several ranks may do a kind of work, or one in turn. Then it runs eager until
        `settle`, for who comes first differs with their number.
        """
        self.total = 0
        self.trials = 0
        self.monitoring = 0
        self.known: dict[str, int] = {}
        self._own = [0, 0, 0]
        self._new: set[str] = set()
        self._eager = eager
        self._shared = shared

    @contextmanager
    def counting(
        self, *key: Hashable, trial: bool = False, monitoring: bool = False
    ) -> Iterator[None]:
        """Count the work inside; `key` names the kind of work, the structure and the shapes."""
        name = _digest(key)
        known = self.known.get(name)
        if known is None:
            with self._eager(), unfused(), FlopCounterMode(display=False) as counter:
                yield
            known = self.known[name] = int(counter.get_total_flops())
            self._new.add(name)
        else:
            eager = self._shared and name in self._new
            with self._eager() if eager else nullcontext(), unfused():
                yield
        self._add(known, known if trial else 0, known if monitoring else 0)

    def settle(self, ranks: Ranks) -> None:
        """Add what the other ranks have worked since this was last called, and what it costs."""
        if ranks.size > 1:
            own = self._own
            told = ranks.exchanged([own, {name: self.known[name] for name in sorted(self._new)}])
            self._add(*(sum(one[0][place] for one in told) - own[place] for place in range(3)))
            for _, known in told:
                self.known |= known
        self._own, self._new = [0, 0, 0], set()

    def restart(self, total: int, trials: int, monitoring: int, known: Mapping[str, int]) -> None:
        """Go on from what a snapshot says was spent."""
        self.total, self.trials, self.monitoring = total, trials, monitoring
        self.known = dict(known)
        self._own, self._new = [0, 0, 0], set()

    def _add(self, total: int, trials: int, monitoring: int) -> None:
        self.total += total
        self.trials += trials
        self.monitoring += monitoring
        self._own = [a + b for a, b in zip(self._own, (total, trials, monitoring), strict=True)]


@lru_cache(maxsize=4096)
def _digest(key: Hashable) -> str:
    return hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest()
