"""What a host layer does, to the bit, in every state of its seeds."""

from __future__ import annotations

import copy
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper.core import wrap
from esper.errors import BadInput
from esper.execution.kasmina_layer import KasminaConv2d, KasminaLayer, KasminaLinear
from esper.execution.state_layout import SeedLifecycleState as S
from tests.unit.esper.execution.seeds import (
    DORMANT_TO_GRAFTING,
    TO_FOSSIL,
    Scaling,
    grow,
    linear_pair,
    no_collection,
)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


def python_calls(function) -> Counter:
    calls: Counter = Counter()

    def note(frame, event, argument) -> None:
        if event in {"call", "c_call"}:
            calls[event] += 1

    # A collection of garbage makes calls of its own.
    with no_collection():
        sys.setprofile(note)
        try:
            function()
        finally:
            sys.setprofile(None)
    return calls


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def models() -> list[tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(1)
    return [
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 6)),
        (
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
                nn.Flatten(),
                nn.Linear(64, 2),
            ),
            torch.randn(3, 1, 4, 4),
        ),
    ]


@pytest.mark.parametrize(("bare", "x"), models())
def test_a_dormant_model_makes_the_calls_of_the_bare_one_and_no_more(bare, x) -> None:
    wrapped = wrap(bare, x, copy=True)
    for model in (bare, wrapped):
        model(x)
    assert python_calls(lambda: wrapped(x)) == python_calls(lambda: bare(x))


@pytest.mark.parametrize("states", [(), (S.TRAINING,)])
@pytest.mark.parametrize(("bare", "x"), models())
def test_dormant_or_on_trial_a_model_runs_the_bare_ones_operations(bare, x, states) -> None:
    wrapped = wrap(bare, x, copy=True)
    if states:
        last = list(wrapped.morphology.layers)[-1]
        width = wrapped.morphology.layers[last].in_features
        grow(wrapped, last, Scaling(width, 2), states)
    seen = []
    for model in (bare, wrapped):
        model.zero_grad()
        with Ops() as ops:
            model(x).sum().backward()
        seen.append(ops.seen)
    assert seen[0] == seen[1]


def test_dormant_layers_have_no_hooks_and_no_attribute_of_their_own_but_their_site() -> None:
    bare, wrapped = linear_pair()
    for before, after in zip(bare, wrapped, strict=True):
        assert set(after.__dict__) - set(before.__dict__) <= {"site"}
        assert not after._forward_hooks
        assert not after._forward_pre_hooks


@settings(max_examples=20, deadline=None)
@given(
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    bias=st.booleans(),
    batch=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    state=st.sampled_from(["germinated", "training", "grafting at 0", "culled"]),
)
def test_linear_hosts_do_not_feel_a_seed_before_it_grafts(
    inputs, outputs, bias, batch, dtype, state
) -> None:
    bare = nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype))
    x = torch.randn(*batch, inputs, dtype=dtype, requires_grad=True)
    wrapped = wrap(bare, x, copy=True)
    grow(wrapped, "0", Scaling(inputs, outputs).to(dtype), STATES[state])
    assert_same_step(bare, wrapped, x)


STATES = {
    "germinated": (),
    "training": (S.TRAINING,),
    "grafting at 0": (S.TRAINING, S.GRAFTING),
    "culled": (S.TRAINING, S.CULLED),
}


def assert_same_step(bare: nn.Module, wrapped: nn.Module, x: torch.Tensor) -> None:
    """Same output bits, same gradient bits, the same draws."""
    outcomes = []
    for model in (bare, wrapped):
        torch.manual_seed(7)
        x.grad = None
        out = model(x)
        out.square().sum().backward()
        own = [p.grad for n, p in model.named_parameters() if ".grown." not in n]
        outcomes.append([out, x.grad, torch.get_rng_state(), *model.buffers(), *own])
    for mine, other in zip(*outcomes, strict=True):
        assert same(mine, other)
    for name, parameter in wrapped.named_parameters():
        assert ".grown." not in name or parameter.grad is None


@settings(max_examples=20, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    state=st.sampled_from(sorted(STATES)),
)
def test_conv_hosts_do_not_feel_a_seed_before_it_grafts(
    channels, groups, kernel, stride, padding, dilation, mode, bias, state
) -> None:
    if padding == "same":
        stride = 1
    inputs, outputs = (count * groups for count in channels)
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": mode,
        "bias": bias,
    }
    bare = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options))
    x = torch.randn(2, inputs, 7, 7, requires_grad=True)
    wrapped = wrap(bare, x, copy=True)
    seed = nn.Conv2d(inputs, outputs, kernel, **options)
    grow(wrapped, "0", seed, STATES[state])
    assert_same_step(bare, wrapped, x)
    if state != "culled":
        with wrapped.morphology.trialling("0", 0):
            assert torch.allclose(wrapped(x), bare(x) + seed(x), atol=1e-5)


def test_dropout_draws_the_same_masks_beside_a_seed_in_training() -> None:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
    x = torch.randn(5, 6, requires_grad=True)
    wrapped = wrap(bare, x, copy=True)
    grow(wrapped, "0", nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)), (S.TRAINING,))
    assert_same_step(bare, wrapped, x)


def test_accumulated_and_clipped_updates_are_the_same_bits_beside_a_seed() -> None:
    bare, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4), (S.TRAINING,))
    batches = [torch.randn(3, 5) for _ in range(6)]
    for model in (bare, wrapped):
        own = [p for n, p in model.named_parameters() if ".grown." not in n]
        optimizer = torch.optim.AdamW(own, lr=0.1)
        for number, x in enumerate(batches):
            model(x).square().sum().backward()
            if number % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    after = dict(wrapped.named_parameters())
    for name, parameter in bare.named_parameters():
        assert same(parameter, after[name])


def test_autocast_beside_a_seed_is_the_same_and_a_grafted_one_keeps_its_dtype() -> None:
    bare, wrapped = linear_pair()
    x = torch.randn(3, 5)
    grow(wrapped, "0", Scaling(5, 4), (S.TRAINING,))
    with torch.autocast("cpu", torch.bfloat16):
        assert same(bare(x), wrapped(x))
        with wrapped.morphology.trialling("0", 0):
            grown = wrapped[0](x)
    assert grown.dtype == torch.bfloat16


def test_grafting_adds_alpha_times_the_seed_and_fossilized_adds_it_whole() -> None:
    bare, wrapped = linear_pair()
    x, seed = torch.randn(3, 5), Scaling(5, 4)
    grow(wrapped, "0", seed, DORMANT_TO_GRAFTING)
    layer = wrapped.morphology.layers["0"]
    wrapped.morphology.set_alpha("0", 0, 0.25)
    assert same(layer(x), bare[0](x) + 0.25 * seed(x))
    wrapped.morphology.transition("0", 0, S.FOSSILIZED)
    assert same(layer(x), bare[0](x) + seed(x))
    assert not layer.live[0].scaled


def test_at_alpha_zero_a_seed_that_is_not_finite_does_not_run() -> None:
    bare, wrapped = linear_pair()
    seed = Scaling(5, 4)
    nn.init.constant_(seed.map.weight, float("inf"))
    grow(wrapped, "0", seed, DORMANT_TO_GRAFTING)
    x = torch.randn(3, 5)
    assert same(wrapped(x), bare(x))
    wrapped.morphology.set_alpha("0", 0, 0.5)
    assert not torch.isfinite(wrapped.morphology.layers["0"](x)).all()


def test_gradients_reach_host_and_seed_once_grafted() -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4), DORMANT_TO_GRAFTING)
    wrapped.morphology.set_alpha("0", 0, 0.5)
    wrapped(torch.randn(3, 5)).sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters())


def test_a_trial_shows_one_seed_in_full_and_leaves_the_others_out() -> None:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(5, 4))
    x = torch.randn(3, 5)
    wrapped = wrap(bare, x, seeds_per_layer=2, copy=True)
    first, second = Scaling(5, 4), Scaling(5, 4)
    grow(wrapped, "0", first, (S.TRAINING,), slot=0)
    grow(wrapped, "0", second, (S.TRAINING,), slot=1)
    with wrapped.morphology.trialling("0", 1):
        assert same(wrapped(x), bare(x) + second(x))
        with wrapped.morphology.trialling("0", 0):
            assert same(wrapped(x), bare(x) + first(x) + second(x))
    assert same(wrapped(x), bare(x))


def test_without_leaves_a_grafting_seed_out_and_puts_it_back() -> None:
    bare, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4), DORMANT_TO_GRAFTING)
    wrapped.morphology.set_alpha("0", 0, 0.5)
    x = torch.randn(3, 5)
    with_seed = wrapped(x)
    with wrapped.morphology.without("0", 0):
        assert same(wrapped(x), bare(x))
        with pytest.raises(ZeroDivisionError), wrapped.morphology.trialling("0", 0):
            raise ZeroDivisionError
        assert same(wrapped(x), bare(x))
    assert same(wrapped(x), with_seed)


def test_a_trial_of_an_empty_slot_is_refused() -> None:
    _, wrapped = linear_pair()
    with pytest.raises(BadInput, match=r"0\[0\]"), wrapped.morphology.trialling("0", 0):
        pass


def test_three_faults_put_the_host_back_until_they_are_cleared() -> None:
    bare, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4), TO_FOSSIL)
    x = torch.randn(3, 5)
    grown = wrapped(x)
    layer = wrapped.morphology.layers["0"]
    assert [layer.record_fault(0, "it broke") for _ in range(3)] == [False, False, True]
    assert same(wrapped(x), bare(x))
    wrapped.morphology.clear_faults("0", 0)
    assert same(wrapped(x), grown)
    assert wrapped.statistics()["fallbacks"] == 3


def test_culled_before_grafting_the_model_is_what_it_was() -> None:
    bare, wrapped = linear_pair()
    keys = list(wrapped.state_dict())
    attributes = {name: set(module.__dict__) for name, module in wrapped.named_modules()}
    grow(wrapped, "0", Scaling(5, 4), (S.TRAINING,))
    assert "0.grown.0.map.weight" in wrapped.state_dict()
    wrapped.morphology.transition("0", 0, S.CULLED)
    wrapped.morphology.remove("0", 0)
    assert list(wrapped.state_dict()) == keys
    assert {name: set(module.__dict__) for name, module in wrapped.named_modules()} == attributes
    x = torch.randn(3, 5, requires_grad=True)
    assert_same_step(bare, wrapped, x)


def test_the_embargo_over_the_slot_takes_another_seed() -> None:
    _, wrapped = linear_pair()
    morphology = wrapped.morphology
    for cycle in range(3):
        assert morphology.record("0", 0).cycle == cycle
        grow(wrapped, "0", Scaling(5, 4))
        morphology.transition("0", 0, S.CULLED)
        morphology.transition("0", 0, S.DORMANT)
    assert "grown" not in dict(wrapped[0].named_children())


def test_unload_culls_and_drops() -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4), (S.TRAINING,))
    layer = wrapped.morphology.layers["0"]
    layer.unload_kernel(0)
    assert wrapped.morphology.state("0", 0) is S.CULLED
    assert "0.grown.0.map.weight" not in wrapped.state_dict()
    with pytest.raises(BadInput, match="holds a seed"):
        layer.unload_kernel(0)


def test_a_fossil_is_part_of_the_model_and_cannot_be_unloaded() -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4), TO_FOSSIL)
    with pytest.raises(BadInput, match="nothing"):
        wrapped.morphology.layers["0"].unload_kernel(0)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda m: m.germinate("0", 0, nn.Identity(), kernel="k"), "germinated seed's next state"),
        (lambda m: m.set_alpha("0", 0, 0.5), "a grafting seed"),
        (lambda m: m.remove("0", 0), "a culled seed"),
        (lambda m: m.transition("0", 0, S.FOSSILIZED), "training, culled"),
        (lambda m: m.germinate("0", 1, nn.Identity(), kernel="k"), "0 to 0"),
        (
            lambda m: m.germinate("0", 0, nn.Identity(), kernel="k", source="producer"),
            "no producer was traced",
        ),
    ],
)
def test_what_the_lifecycle_does_not_allow_is_refused_and_changes_nothing(action, message) -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4))
    before = wrapped.morphology.structure()
    with pytest.raises(BadInput, match=message):
        action(wrapped.morphology)
    assert wrapped.morphology.structure() == before


@pytest.mark.parametrize("kind", [KasminaLinear, KasminaConv2d])
def test_classes_are_importable_and_of_their_hosts_kind(kind) -> None:
    assert issubclass(kind, KasminaLayer)
    assert issubclass(kind, kind.host_class)
    assert getattr(sys.modules[kind.__module__], kind.__name__) is kind


def test_a_layer_alone_copies_with_its_seed() -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4), TO_FOSSIL)
    x = torch.randn(3, 5)
    assert same(copy.deepcopy(wrapped[0])(x), wrapped[0](x))
