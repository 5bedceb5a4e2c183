"""Unwrapping with every blueprint on every kind of host."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from esper.contracts.blueprints import CATALOGUE
from esper.core import unwrap, wrap
from esper.core.model_wrapper import LayerSelection
from esper.errors import WrapError
from tests.unit.esper.core.growing import grow
from tests.unit.esper.core.hosts import KINDS, LAYERS, EveryKind

ALL_KINDS = LayerSelection(types=KINDS)
FOLDING = [("noop", kind) for kind in KINDS] + [("affine", kind) for kind in KINDS]
FOLDING += [("low-rank", kind) for kind in ("Linear", "Conv1d", "Conv2d", "Embedding")]
KEPT = [
    (entry.name, kind)
    for entry in CATALOGUE
    for kind in entry.hosts
    if entry.name not in ("noop", "affine", "low-rank", "widen")
]


def every_kind(**arguments) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randint(9, (3, 7))
    plain = EveryKind()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.7)
    plain(x)  # gives the running statistics something to say
    return wrap(plain, x, layers=ALL_KINDS, **arguments).eval(), x


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a copy of the model gives in evaluation and in training mode."""
    with torch.no_grad():
        return [copy.deepcopy(model).train(mode)(x) for mode in (False, True)]


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), FOLDING)
def test_what_adds_no_function_class_folds_into_the_layers_own(name: str, kind: str) -> None:
    model, x = every_kind()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    grow(model, LAYERS[kind], name)
    expected = outputs(model, x)
    back = unwrap(model)
    check_same(outputs(back, x), expected)
    assert list(back.state_dict()) == keys
    assert dict(back.named_parameters()).keys() == parameters.keys()
    assert all(parameters[name] is value for name, value in back.named_parameters())
    assert type(back.get_submodule(LAYERS[kind])) is getattr(nn, kind)


def test_an_affine_seed_gives_a_layer_without_bias_one() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5, bias=False), nn.LayerNorm(5, bias=False)]
    x = torch.randn(2, 4)
    model = wrap(nn.Sequential(*layers), x, layers=ALL_KINDS).eval()
    grow(model, "0", "affine")
    grow(model, "1", "affine", slot=0)
    expected = model(x)
    back = unwrap(model)
    torch.testing.assert_close(back(x), expected)
    assert back[0].bias is not None
    assert back[1].bias is not None


@pytest.mark.parametrize(("name", "kind"), KEPT)
def test_what_does_not_fold_stays_beside_the_layer(name: str, kind: str) -> None:
    model, x = every_kind()
    grow(model, LAYERS[kind], name)
    keys, expected = list(model.state_dict()), outputs(model, x)
    back = unwrap(model)
    check_same(outputs(back, x), expected)
    assert sorted(back.state_dict()) == sorted(keys)
    layer = back.get_submodule(LAYERS[kind])
    assert type(layer) is getattr(nn, kind)
    assert "grown" in dict(layer.named_children())
    saved = io.BytesIO()
    torch.save(back, saved)
    saved.seek(0)
    copies = [torch.load(saved, weights_only=False), pickle.loads(pickle.dumps(back))]
    for copied in copies:
        check_same(outputs(copied, x), expected)
    back.train()(x).sum().backward()
    grads = [parameter.grad for parameter in layer.grown.parameters()]
    assert any(grad is not None and grad.count_nonzero() for grad in grads)


def test_nothing_folds_into_an_output_that_a_seed_reads() -> None:
    model, x = every_kind(seeds_per_layer=4)
    grow(model, "second", "low-rank", rank=2)
    grow(model, "second", "squeeze-excitation", slot=1)
    grow(model, "second", "affine", slot=2)
    grow(model, "second", "noop", slot=3)
    expected = outputs(model, x)
    back = unwrap(model)
    check_same(outputs(back, x), expected)
    assert list(back.second.grown) == ["0", "1", "2"]


def test_a_widening_does_not_fold_into_an_output_that_a_seed_reads() -> None:
    model, _ = every_kind(seeds_per_layer=2)
    grow(model, "second", "widen", units=2)
    grow(model, "second", "attention", slot=1)
    with pytest.raises(WrapError, match=r"second\[0\]"):
        unwrap(model)


def test_a_widened_layer_shows_a_seed_its_old_outputs() -> None:
    model, x = every_kind(seeds_per_layer=2)
    grow(model, "second", "widen", units=2)
    grow(model, "first", "squeeze-excitation")
    grow(model, "first", "depthwise-separable-conv", slot=1)
    expected = outputs(model, x)
    back = unwrap(model)
    check_same(outputs(back, x), expected)
    assert (back.first.out_channels, back.second.in_channels) == (8, 8)


def test_a_widened_1d_convolution_is_a_larger_one() -> None:
    model, x = every_kind()
    grow(model, "second", "widen", units=3)
    expected = outputs(model, x)
    back = unwrap(model)
    check_same(outputs(back, x), expected)
    assert back.first.weight.shape == (9, 4, 3)
    assert back.second.weight.shape == (5, 9, 3)
    assert not hasattr(back.second, "grown")


def test_a_larger_batch_of_larger_images_goes_through_what_stays() -> None:
    model, _ = every_kind()
    for kind in ("Conv2d", "BatchNorm2d", "Conv1d"):
        grow(model, LAYERS[kind], "attention")
    x = torch.randint(9, (5, 12))
    expected = outputs(model, x)
    check_same(outputs(unwrap(model), x), expected)


class Hooked(nn.Module):
    """Calls its layer by keyword, and doubles what the layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.layer.register_forward_hook(doubled)
        self.layer.register_forward_pre_hook(halved, with_kwargs=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


def doubled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 2


def halved(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]):
    return inputs, {"input": named["input"] / 2}


@pytest.mark.parametrize("name", ["bottleneck-mlp", "low-rank"])
def test_a_layers_hooks_outlast_saving_the_whole_model(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = wrap(Hooked(), x).eval()
    grow(model, "layer", name)
    expected = model(x)
    back = unwrap(model)
    saved = io.BytesIO()
    torch.save(back, saved)
    saved.seek(0)
    for one in (back, torch.load(saved, weights_only=False), copy.deepcopy(back)):
        torch.testing.assert_close(one(x), expected)
