"""Where the pieces of a batch lie."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.services.tolaria.parallel import piece_of


@given(st.integers(1, 200), st.integers(1, 40))
def test_pieces_are_those_of_tensor_split(size: int, count: int) -> None:
    indices = torch.arange(size)
    own = [indices[piece_of(size, count, number)] for number in range(count)]
    assert all(map(torch.equal, own, indices.tensor_split(count)))
