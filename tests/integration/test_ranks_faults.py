"""What goes wrong on one rank, or on some samples only: every rank takes the same way on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.services.tolaria.distribution import Alone, Ranks
from tests.integration.rank_sessions import lives, of_type, session, train
from tests.ranks import run_ranks


def fail_on_some(ranks: Ranks) -> None:
    """Seeds at one layer raise, and those at another are not finite, where samples are so."""
    del ranks
    from esper.execution.branches import Branch

    own = Branch.join

    def joined(branch: Any, out: Tensor, source: Tensor, host: Tensor) -> Tensor:
        if host.shape[-1] == 12 and source.shape[-1] == 64 and float(source[:, 20].sum()) > 35:
            raise RuntimeError(f"no way with {float(source[0].sum()):.6f}")
        found = own(branch, out, source, host)
        if host.shape[-1] == 10 and source.shape[-1] == 12:
            return found / (out[:, :1] < 2.5)
        return found

    Branch.join = joined  # type: ignore[method-assign]


def test_a_seed_that_fails_on_some_samples_is_culled_alike_by_any_number_of_ranks() -> None:
    made = session(logicalShards=4, epochs=8)
    whole = train(Alone(), made, fail_on_some)
    told = [message for _, reason, message in whole["events"] if reason == "CircuitOpened"]
    assert any("no way with" in message for message in told), whole["events"]
    for size in (2, 4):
        found = run_ranks(size, train, made, fail_on_some)
        assert {one["digest"] for one in found} == {whole["digest"]}
        assert found[0] == whole
