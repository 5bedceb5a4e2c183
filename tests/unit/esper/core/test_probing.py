"""A probe learns what a model does, and leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from esper.core import wrap
from esper.core.probing import EVALUATION_ONLY, NEVER_CALLED, TRAINING_ONLY
from esper.errors import WrapError


class Restless(nn.Module):
    """Changes everything a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("absent", None)
        self.generator = torch.Generator().manual_seed(3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.replaced = torch.randn(3)
        self.absent = torch.ones(2)
        self.new = x
        random.random()
        np.random.rand()
        torch.randn(2, generator=self.generator)
        x += 1.0
        return self.second(nn.functional.dropout(self.norm(self.first(x)), 0.5))


def state_of(model: nn.Module) -> list:
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        model.generator.get_state().tolist(),
        {name: buffer.tolist() for name, buffer in model.named_buffers()},
        {name: parameter.tolist() for name, parameter in model.named_parameters()},
        [module.training for module in model.modules()],
        [parameter.grad for parameter in model.parameters()],
        sorted(model._buffers),
        model.calls,
        hasattr(model, "new"),
    ]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_probe_stays(training: bool) -> None:
    model = Restless().train(training)
    model.norm.eval()
    replaced, x = model.replaced, torch.randn(5, 4)
    before, inputs = state_of(model), x.clone()
    wrap(model, x)
    assert state_of(model) == before
    assert model.replaced is replaced
    assert torch.equal(x, inputs)
    assert set(model.morphology.layers) == {"first", "second"}


def test_the_first_call_probes_and_computes_what_the_bare_model_would() -> None:
    outcomes = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model, x = Restless(), torch.ones(5, 4)
        if wrapped:
            wrap(model)
            assert not model.morphology.probed
        out = model(x)
        out.sum().backward()
        grads = [p.grad.tolist() for p in model.parameters()]
        model.zero_grad()
        outcomes.append([out.tolist(), grads, *state_of(model), x.tolist()])
    assert outcomes[0] == outcomes[1]
    assert model.morphology.probed
    assert "forward" not in model.__dict__


def test_gradients_that_are_there_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    model(torch.ones(1, 4)).sum().backward()
    grad = model[0].weight.grad
    wrap(model, torch.ones(1, 4))
    assert model[0].weight.grad is grad


class Partial(nn.Module):
    """Layers that are called always, never, or in one mode."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.always = nn.Linear(4, 4), nn.Linear(4, 4)
        self.training_only, self.evaluation_only = nn.Linear(4, 4), nn.Linear(4, 4)
        self.later = nn.Linear(4, 4)

    def forward(self, x):
        x = self.later(x)
        x = self.always(self.always(x))
        return self.training_only(x) if self.training else self.evaluation_only(x)


def test_layers_are_told_apart_by_when_they_are_called() -> None:
    model = Partial()
    classes = {name: type(layer) for name, layer in model.named_children()}
    morphology = wrap(model, torch.randn(2, 4)).morphology
    assert list(morphology.layers) == ["later", "always"]
    assert morphology.refused == {
        "never": NEVER_CALLED,
        "training_only": TRAINING_ONLY,
        "evaluation_only": EVALUATION_ONLY,
    }
    assert {type(getattr(model, name)) for name in morphology.refused} == {nn.Linear}
    assert classes["later"] is nn.Linear
    assert morphology.layout.layers == 2


def test_shapes_are_without_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Flatten(2), nn.Linear(9, 7))
    morphology = wrap(model, torch.randn(2, 3, 7, 7)).morphology
    first, last = morphology.target("0"), morphology.target("2")
    assert (first.input_shape, first.output_shape) == ((3, 7, 7), (5, 3, 3))
    assert (last.input_shape, last.output_shape) == ((5, 9), (5, 7))


def test_a_training_batch_of_one_that_batch_norm_refuses_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert list(wrap(model, torch.randn(1, 4)).morphology.layers) == ["0", "2"]


def test_inputs_that_the_model_refuses_are_named_and_the_model_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(WrapError, match="example_inputs") as caught:
        wrap(model, torch.randn(2, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert type(model) is nn.Sequential
    assert type(model[0]) is nn.Linear
    assert "morphology" not in model.__dict__


def test_a_first_call_that_the_model_refuses_raises_the_models_own_error() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 5))
    assert not model.morphology.probed
    model(torch.randn(2, 4))
    assert model.morphology.probed


def test_inputs_come_as_a_tensor_a_tuple_or_a_dict() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, left, right=None):
            return self.layer(input=left + (0 if right is None else right))

    x = torch.randn(3, 4)
    for inputs in (x, (x, x), [x], {"left": x, "right": x}):
        assert list(wrap(Two(), inputs).morphology.layers) == ["layer"]


def test_autocast_keeps_gradients_after_a_first_call_inside_it() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 4)).float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Counted(nn.Module):
    """Writes to a buffer, and replaces another, when scripted too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + x.mean(0)
        return self.layer(self.norm(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("probed", [True, False])
def test_a_scripted_part_is_refused_and_left_alone_and_the_rest_served(
    how: str, probed: bool
) -> None:
    x = torch.randn(5, 4)
    part = torch.jit.script(Counted()) if how == "script" else torch.jit.trace(nn.Linear(4, 4), x)
    model = nn.Sequential(part, nn.Linear(4, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrap(model, x if probed else None)
    if not probed:
        with torch.no_grad():
            model(x)
    else:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.morphology.layers) == ["1"]
    # A traced layer shows no kind that could have been a host's.
    assert model.morphology.refused == (
        {"0.layer": "it is scripted"} if how == "script" else {"0": "it is scripted"}
    )
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("way", ["renormalised", "data"])
def test_weights_that_a_forward_writes_to_are_as_before_the_probe(way: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 4, max_norm=0.5 if way == "renormalised" else None)
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            if way == "data":
                self.words.weight.data.mul_(0.5)
            return self.layer(self.words(x))

    model = Writes()
    weight, version = model.words.weight.detach().clone(), model.layer.weight._version
    wrap(model, torch.arange(9)[None])
    assert torch.equal(model.words.weight, weight)
    assert model.layer.weight._version == version
