from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esper.core import MorphableModel, wrap
from esper.execution.isolation import RandomState
from esper.execution.probes import (
    PROBE_ROWS,
    PROBE_UNITS,
    LayerReading,
    Reading,
    gradient_sums,
    probe,
    rank_share,
    read,
    sampling,
)
from esper.execution.state_layout import SeedLifecycleState as S
from tests.unit.esper.core.growing import GRAFTING, grow


class Emitting(nn.Linear):
    """A layer that gives a fixed output, whatever comes."""

    def __init__(self, output: Tensor) -> None:
        super().__init__(1, 1)
        self.output = output

    def forward(self, input: Tensor) -> Tensor:
        return self.output


class EmittingImage(nn.Conv2d):
    """The same as a convolution."""

    def __init__(self, output: Tensor) -> None:
        super().__init__(1, 1, 1)
        self.output = output

    def forward(self, input: Tensor) -> Tensor:
        return self.output


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reading(layer: nn.Module, x: Tensor | None = None) -> LayerReading:
    """The reading of one layer from one call of it."""
    return probe(layer, {"a": layer}, lambda: layer(torch.zeros(1) if x is None else x)).layers["a"]


def rank_of(output: Tensor) -> float:
    return reading(Emitting(output)).activation_rank


# -- rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deviations", "share"),
    [
        ([1.0] * 16, 1.0),
        ([1.0] * 8 + [0.0] * 8, 0.5),
        ([3.0] + [0.0] * 15, 1 / 16),
        ([4.0, 2.0, 1.0, 1.0] * 4, (4 * 22) ** 2 / (4 * 274) / 16),
    ],
)
def test_the_estimate_is_right_on_average_over_few_rows(
    deviations: list[float], share: float
) -> None:
    turned = torch.linalg.qr(drawn(16, 16)).Q
    spread = torch.diag(torch.tensor(deviations)) @ turned
    found = [rank_of(drawn(PROBE_ROWS, 16, seed=n) @ spread + 5) for n in range(1, 61)]
    assert sum(found) / len(found) == pytest.approx(share, rel=0.12)


@pytest.mark.parametrize(
    ("width", "rank"),
    [(64, 2), (64, None), (100, 12), (100, None), (256, 12), (256, None), (1000, 2), (1000, 12)],
)
def test_the_probed_units_speak_for_all(width: int, rank: int | None) -> None:
    shares = []
    for seed in range(40):
        rows = drawn(PROBE_ROWS, rank or width, seed=seed)
        if rank is not None:
            rows = rows @ torch.linalg.qr(drawn(width, rank, seed=seed + 100)).Q.T
        shares.append(rank_of(rows))
    assert sum(shares) / len(shares) == pytest.approx((rank or width) / width, rel=0.15)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 1000), st.floats(-9, 9))
def test_the_share_lies_between_one_unit_and_all_and_a_scale_changes_nothing(
    rows: int, units: int, seed: int, exponent: float
) -> None:
    output = drawn(rows, units, seed=seed)
    share = rank_of(output)
    if rows == 1:
        assert share == 0.0
    else:
        assert 1 / units - 1e-9 <= share <= 1.0
    assert rank_of(output * 10**exponent) == pytest.approx(share, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e30])
@pytest.mark.parametrize("units", [1, 3, 100])
def test_units_that_never_change_have_no_rank(value: float, units: int) -> None:
    rows = torch.full((7, units), value)
    assert rank_of(rows) == 0.0
    assert rank_of(rows * torch.arange(1.0, units + 1)) == 0.0


def test_two_rows_have_one_direction() -> None:
    assert rank_share(4.0, 16.0, 8.0, rows=2, units=2, width=10) == 0.1


# -- dead units and outputs that are not finite -------------------------------------------------


def test_dead_units_are_those_that_never_rise_above_zero() -> None:
    output = drawn(12, 4).abs()
    output[:, 1] = -1.0
    output[:, 3] = 0.0
    assert reading(Emitting(output)).dead_fraction == 0.5


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 9)), st.integers(0, 7), st.integers(0, 5), st.integers(0, 4))
def test_one_rise_at_one_place_of_one_sample_is_life(
    alive: set[int], sample: int, row: int, column: int
) -> None:
    image = -torch.ones(8, 10, 6, 5)
    image[sample, list(alive), row, column] = 0.01
    assert reading(EmittingImage(image)).dead_fraction == pytest.approx(1 - len(alive) / 10)
    dense = image.movedim(1, -1)
    assert reading(Emitting(dense)).dead_fraction == pytest.approx(1 - len(alive) / 10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(16, 300), (4, 20, 300), (2, 300, 7, 7)])
def test_one_entry_anywhere_that_is_not_finite_shows(bad: float, shape: tuple[int, ...]) -> None:
    for place in (0, 1, math.prod(shape) // 3, math.prod(shape) - 1):
        output = drawn(*shape)
        output.view(-1)[place] = bad
        found = reading((EmittingImage if len(shape) == 4 else Emitting)(output))
        assert math.isnan(found.activation_rank)
        assert math.isnan(found.dead_fraction)


# -- layers of every kind -----------------------------------------------------------------------

KINDS: list[tuple[nn.Module, Tensor, int]] = [
    (nn.Linear(6, 5), drawn(16, 6), -1),
    (nn.Linear(6, 5), drawn(4, 9, 6), -1),
    (nn.Conv1d(3, 5, 3), drawn(8, 3, 9), 1),
    (nn.Conv2d(3, 5, 3), drawn(8, 3, 9, 8), 1),
    (nn.Conv2d(3, 5, 3), drawn(3, 9, 8), 0),
    (nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), drawn(8, 3, 9, 8), 1),  # type: ignore[call-overload]
    (nn.BatchNorm2d(5), drawn(8, 5, 4, 4), 1),
    (nn.LayerNorm(5), drawn(8, 7, 5), -1),
    (nn.Embedding(30, 5), torch.arange(30).view(3, 10), -1),
]


@pytest.mark.parametrize(
    ("layer", "x", "channels"), KINDS, ids=[type(k[0]).__name__ for k in KINDS]
)
def test_units_are_features_or_channels(layer: nn.Module, x: Tensor, channels: int) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(drawn(*parameter.shape))
    layer.eval()
    found = reading(layer, x)
    rows = layer(x).detach().movedim(channels, -1).reshape(-1, 5)
    assert found.dead_fraction == pytest.approx(float((rows.amax(0) <= 0).float().mean()))
    spectrum = torch.linalg.eigvalsh(rows.T.cov())
    ratio = float(spectrum.sum() ** 2 / spectrum.square().sum()) / 5
    assert found.activation_rank == pytest.approx(ratio, rel=0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 5).to(dtype)
    layer(drawn(16, 6).to(dtype)).float().sum().backward()
    found = probe(
        layer, {"a": layer}, lambda: layer(drawn(16, 6).to(dtype)), gradient_sums({"a": layer})
    )
    assert all(math.isfinite(value) for value in found.layers["a"])
    assert found.layers["a"].gradient_norm > 0


def test_what_follows_in_place_does_not_count() -> None:
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.bias.fill_(-50.0)
    model = nn.Sequential(layer, nn.Hardtanh(1.0, 2.0, inplace=True))
    found = probe(model, {"a": layer}, lambda: model(drawn(16, 6))).layers["a"]
    assert found.dead_fraction == 1.0
    assert found.activation_rank > 0


# -- gradients ----------------------------------------------------------------------------------


def gradients_of(layers: dict[str, nn.Module]) -> dict[str, LayerReading]:
    model = nn.ModuleDict(layers)
    return probe(model, layers, lambda: None, gradient_sums(layers)).layers


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_gradients_are_told_by_norm_variance_and_ratio(
    widths: list[int], bias: bool, seed: int
) -> None:
    layers: dict[str, nn.Module] = {
        str(n): nn.Linear(3, w, bias=bias) for n, w in enumerate(widths)
    }
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.grad = drawn(*parameter.shape, seed=seed)
    found = gradients_of(layers)
    for name, layer in layers.items():
        flat = torch.cat([p.grad.reshape(-1).double() for p in layer.parameters()])
        weights = torch.cat([p.detach().reshape(-1).double() for p in layer.parameters()])
        assert found[name].gradient_norm == pytest.approx(float(flat.norm()), rel=1e-4)
        assert found[name].gradient_variance == pytest.approx(
            float(flat.var(correction=0)), rel=1e-3, abs=1e-6
        )
        assert found[name].gradient_to_weight_ratio == pytest.approx(
            float(flat.norm() / weights.norm()), rel=1e-4
        )


def test_layers_without_gradients_give_zeros_and_zero_weights_do_not_divide() -> None:
    frozen, zero, some = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    with torch.no_grad():
        zero.weight.zero_()
    zero.weight.grad = torch.ones(2, 2)
    some.bias.grad = torch.ones(2)
    found = gradients_of({"frozen": frozen, "zero": zero, "some": some})
    assert found["frozen"] == (0.0, 0.0, 0.0, 0.0, 1.0)
    assert math.isfinite(found["zero"].gradient_to_weight_ratio)
    whole = math.hypot(float(some.weight.norm()), float(some.bias.norm()))
    assert found["some"].gradient_to_weight_ratio == pytest.approx(math.sqrt(2) / whole)
    assert gradient_sums({"frozen": frozen}) is None


def test_gradients_that_are_not_finite_show() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.tensor([[1.0, math.inf], [0.0, 0.0]])
    found = gradients_of({"a": layer})["a"]
    assert not math.isfinite(found.gradient_norm)
    assert not math.isfinite(found.gradient_variance)


def test_sparse_gradients_count_what_they_leave_out() -> None:
    sparse, dense = (nn.Embedding(9, 3, sparse=s) for s in (True, False))
    with torch.no_grad():
        dense.weight.copy_(sparse.weight)
    for layer in (sparse, dense):
        layer(torch.tensor([1, 1, 4])).square().sum().backward()
    found = gradients_of({"sparse": sparse, "dense": dense})
    assert found["sparse"] == pytest.approx(found["dense"], rel=1e-5)


def test_grown_parts_are_not_their_hosts_gradients() -> None:
    model = wrap(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    seed = grow(model, "0", "low-rank", rank=1)
    for parameter in seed.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert gradient_sums(model.morphology.layers) is None
    model[0].bias.grad = torch.ones(2)
    found = probe(
        model, model.morphology.layers, lambda: None, gradient_sums(model.morphology.layers)
    )
    assert found.layers["0"].gradient_norm == pytest.approx(math.sqrt(2))


# -- seeds --------------------------------------------------------------------------------------


def pair() -> MorphableModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
    return wrap(model, drawn(2, 6), seeds_per_layer=3)


def seeds_of(model: MorphableModel, x: Tensor) -> dict[tuple[str, int], bool]:
    return probe(model, model.morphology.layers, lambda: model(x)).seeds


@pytest.mark.parametrize("states", [(), (S.TRAINING,), GRAFTING])
@pytest.mark.parametrize(
    ("layer", "blueprint"), [("0", "low-rank"), ("2", "widen"), ("2", "affine")]
)
def test_the_output_of_each_active_seed_is_looked_at(
    states: tuple[S, ...], layer: str, blueprint: str
) -> None:
    model, x = pair(), drawn(8, 6)
    seed = grow(model, layer, blueprint, states)
    if states == GRAFTING:
        model.morphology.set_alpha(layer, 0, 0.5)
    assert seeds_of(model, x) == {(layer, 0): True}
    with torch.no_grad():
        next(seed.parameters()).view(-1)[0] = math.nan
    assert seeds_of(model, x) == {(layer, 0): False}


@pytest.mark.parametrize("blueprint", ["low-rank", "widen", "affine"])
def test_seeds_run_in_the_precision_of_the_forward(blueprint: str) -> None:
    model, x = pair(), drawn(8, 6)
    grow(model, "2", blueprint, (S.TRAINING,))
    with torch.autocast("cpu", torch.bfloat16), sampling(model.morphology.layers) as samples:
        model(x)
    assert read(model.morphology.layers, samples).seeds == {("2", 0): True}


def test_seeds_that_are_dormant_culled_or_fossilized_are_not_asked() -> None:
    model, x = pair(), drawn(8, 6)
    grow(model, "0", "low-rank", slot=0)
    grow(model, "0", "low-rank", (S.CULLED,), slot=1)
    assert seeds_of(model, x) == {}


def test_a_seed_that_raises_is_at_fault_and_not_the_probe() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    model = pair()
    model.morphology.germinate("0", 0, Failing(), kernel="k")
    grow(model, "2", "low-rank", ())
    assert seeds_of(model, drawn(8, 6)) == {("0", 0): False, ("2", 0): True}


def test_a_seed_on_the_output_reads_what_the_host_gives_alone() -> None:
    model, x = pair(), drawn(8, 6)
    spoiling = grow(model, "2", "low-rank", GRAFTING, slot=0)
    model.morphology.set_alpha("2", 0, 1.0)
    with torch.no_grad():
        next(spoiling.parameters()).fill_(math.nan)
    grow(model, "2", "affine", (S.TRAINING,), slot=1)
    assert seeds_of(model, x) == {("2", 0): False, ("2", 1): True}


# -- what stays as it was -----------------------------------------------------------------------


class Restless(nn.Module):
    """Draws from every stream and writes to a buffer in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.layer(x) + torch.rand(3)


def test_a_probe_leaves_no_trace() -> None:
    model = Restless().train()
    before = RandomState.capture()
    probe(model, {"layer": model.layer}, lambda: model(drawn(4, 3)))
    after = RandomState.capture()
    assert torch.equal(before.torch_cpu, after.torch_cpu)
    assert float(model.calls) == 0
    assert model.modes == [(False, False)]
    assert model.training
    assert model.layer.training
    assert not model.layer._forward_hooks


def test_hooks_leave_after_an_error_too() -> None:
    model = pair()
    grow(model, "2", "widen", ())
    with pytest.raises(RuntimeError):
        probe(model, model.morphology.layers, lambda: model(torch.zeros(1, 7)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_was_not_called_reads_as_dead() -> None:
    layer = nn.Linear(2, 2)
    found = probe(layer, {"a": layer}, lambda: None)
    assert found == Reading(layers={"a": LayerReading(0.0, 0.0, 0.0, 0.0, 1.0)}, seeds={})


class Transfers(TorchFunctionMode):
    """Counts what brings values of tensors to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        self.count += name in {"tolist", "item", "__bool__", "__float__", "__int__", "cpu"}
        return func(*args, **(kwargs or {}))


def test_one_transfer_brings_everything() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 70, 3), nn.Flatten(), nn.Linear(70 * 36, 90), nn.Linear(90, 3)
    )
    wrapped = wrap(model, drawn(2, 3, 8, 8))
    grow(wrapped, "0", "low-rank", ())
    layers = wrapped.morphology.layers
    wrapped(drawn(4, 3, 8, 8)).sum().backward()
    with Transfers() as transfers:
        sums = gradient_sums(layers)
        assert transfers.count == 0
        with torch.no_grad():
            found = probe(wrapped, layers, lambda: wrapped(drawn(16, 3, 8, 8)), sums)
    assert transfers.count == 1
    assert len(found.layers) == 3
    assert found.seeds == {("0", 0): True}


def test_few_rows_of_an_image_look_at_many_places() -> None:
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    places = torch.stack([rows, columns], dim=0).expand(PROBE_ROWS, 2, 12, 12)
    found = reading(EmittingImage(places))
    assert found.activation_rank > 0.8  # rows and columns vary independently, and equally


def test_the_work_has_a_bound() -> None:
    seen = []

    class Shapes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if getattr(func, "__name__", "") == "bmm":
                seen.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with Shapes():
        reading(EmittingImage(drawn(20, 130, 6, 6)))
    assert seen == [(1, PROBE_ROWS, 44)]
    assert PROBE_UNITS >= 44
