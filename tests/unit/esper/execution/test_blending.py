from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import BadInput
from esper.execution.blending import blend, ramped_alpha


def test_the_seed_is_added_and_takes_nothing_from_the_host() -> None:
    host, seed = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(blend(host, seed), host + seed)
    assert torch.equal(blend(host, seed, torch.tensor(0.25)), host + 0.25 * seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_output_keeps_the_hosts_dtype(dtype: torch.dtype) -> None:
    host = torch.randn(3, dtype=dtype)
    assert blend(host, torch.randn(3)).dtype == dtype
    assert blend(host, torch.randn(3), torch.tensor(0.5)).dtype == dtype


@given(st.integers(0, 50))
def test_the_ramp_rises_in_equal_steps_and_then_holds(ramp: int) -> None:
    alphas = [ramped_alpha(age, ramp) for age in range(ramp + 3)]
    assert alphas[0] > 0.0
    assert all(later > earlier for earlier, later in pairwise(alphas[: ramp + 1]))
    assert alphas[ramp:] == [1.0, 1.0, 1.0]
    assert alphas[:ramp] == pytest.approx([(n + 1) / (ramp + 1) for n in range(ramp)])


@pytest.mark.parametrize(("age", "ramp"), [(-1, 3), (0, -1)])
def test_negative_times_are_refused(age: int, ramp: int) -> None:
    with pytest.raises(BadInput, match="0 or more"):
        ramped_alpha(age, ramp)
