"""FLOPs as executed: 2 per multiply-add of matrix products and convolutions, both directions.

What a piece of work costs depends on the model's structure and the shape of its batch, so it is
counted by torch's own counter the first time that pair comes up and remembered from then on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from torch.utils.flop_counter import FlopCounterMode


class FlopMeter:
    """Adds up the FLOPs of a session.

    `trials` is the part spent on evidence and culled work, `monitoring` the part spent on the
    validation metrics of every epoch, which anyone who trains looks at, growing or not.
    """

    def __init__(self) -> None:
        self.total = 0
        self.trials = 0
        self.monitoring = 0
        self._known: dict[Hashable, int] = {}

    @contextmanager
    def counting(
        self, *key: Hashable, trial: bool = False, monitoring: bool = False
    ) -> Iterator[None]:
        """Count the work inside; `key` names the kind of work, the structure and the shapes."""
        known = self._known.get(key)
        if known is None:
            with FlopCounterMode(display=False) as counter:
                yield
            known = self._known[key] = int(counter.get_total_flops())
        else:
            yield
        self.total += known
        if trial:
            self.trials += known
        if monitoring:
            self.monitoring += known
