"""Layers and classes that can't be served are named with the reason, at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.core import LayerSelection, wrap
from esper.errors import WrapError


def test_an_embedding_of_too_many_rows_is_refused_with_the_reason() -> None:
    layers = LayerSelection(types=("Embedding", "Linear"))
    model = nn.Sequential(nn.Embedding(1_000_001, 1), nn.Linear(1, 2))
    model = wrap(model, torch.zeros(2, 3, dtype=torch.long), layers=layers)
    assert list(model.morphology.layers) == ["1"]
    assert "inputs 1000001" in model.morphology.refused["0"]


def test_a_dtype_that_kernels_do_not_have_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].to(torch.float8_e5m2)
    found = wrap(model).morphology
    assert list(found.layers) == ["0"]
    assert "float8_e5m2" in found.refused["1"]


def test_a_class_that_lets_nobody_extend_it_is_named_whatever_it_raises() -> None:
    class Registry(type):
        def __new__(cls, name, bases, body):
            if any(isinstance(base, Registry) for base in bases):
                raise KeyError(name)
            return super().__new__(cls, name, bases, body)

    class Registered(nn.Module, metaclass=Registry):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

    model = Registered()
    with pytest.raises(WrapError, match="KeyError: 'Registered'"):
        wrap(model)
    assert type(model.layer) is nn.Linear
