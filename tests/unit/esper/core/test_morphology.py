"""The door through which structure changes: targets, lifecycle, structure that goes round."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from esper.contracts.blueprints import Graph
from esper.core import wrap
from esper.errors import BadInput, WrapError
from esper.execution.builders import build
from esper.execution.state_layout import SeedLifecycleState as S
from tests.unit.esper.core.growing import FOSSIL, GRAFTING, grow


def mlp(**arguments) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    return wrap(layers, torch.randn(3, 4), **arguments)


def test_a_target_describes_the_layer_and_what_feeds_it() -> None:
    target = mlp().morphology.target("2")
    assert target.layer.kind == "Linear"
    assert (target.layer.inputs, target.layer.outputs, target.layer.bias) == (6, 5, True)
    assert (target.input_shape, target.output_shape) == ((6,), (5,))
    assert (target.dtype, target.device) == ("float32", "cpu")
    assert target.producer.name == "0"
    assert target.producer.input_shape == (4,)
    assert [op.kind for op in target.producer.chain] == ["relu"]
    assert mlp().morphology.target("0").producer is None


@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
def test_a_convolution_is_described_in_full(padding) -> None:
    layer = nn.Conv2d(
        2, 4, (3, 2), padding=padding, dilation=2, groups=2, bias=False, padding_mode="circular"
    )
    morphology = wrap(nn.Sequential(layer), torch.randn(1, 2, 9, 9)).morphology
    described = morphology.target("0").layer
    assert described.kernel_size == (3, 2)
    assert described.dilation == (2, 2)
    assert described.groups == 2
    assert described.padding_mode == "circular"
    assert not described.bias
    expected = {1: (1, 1), (2, 1): (2, 1), "same": "same", "valid": (0, 0)}[padding]
    assert described.padding == expected


def test_a_dtype_without_kernels_is_refused_by_name() -> None:
    model = mlp().to(torch.float8_e4m3fn)
    with pytest.raises(WrapError, match="layer 2: dtype: got float8"):
        model.morphology.target("2")


def test_before_the_first_call_there_is_nothing_to_aim_at() -> None:
    morphology = wrap(nn.Sequential(nn.Linear(2, 2))).morphology
    with pytest.raises(WrapError, match="one call of the model"):
        morphology.target("0")
    with pytest.raises(WrapError, match="one call of the model"):
        morphology.germinate("0", 0, nn.Identity(), kernel="k")


def test_an_unknown_layer_is_named_with_those_there_are() -> None:
    with pytest.raises(WrapError, match=r"got 1; allowed: 0, 2, 4"):
        mlp().morphology.state("1", 0)


def test_a_refused_layer_is_named_with_its_reason() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    morphology = wrap(Bypass(), torch.randn(1, 2)).morphology
    with pytest.raises(WrapError, match="never called"):
        morphology.target("idle")


def test_a_life_from_germination_to_fossil() -> None:
    model = mlp(seeds_per_layer=2)
    morphology = model.morphology
    assert morphology.active == 0
    seed = grow(model, "2", "bottleneck-mlp", (), slot=1, units=3)
    assert morphology.seed_module("2", 1) is seed
    assert morphology.seed_parameters("2", 1) == list(seed.parameters())
    assert morphology.state("2", 1) is S.GERMINATED
    assert morphology.active == 1
    for state in GRAFTING:
        morphology.transition("2", 1, state)
    assert morphology.record("2", 1).alpha == 0.0
    morphology.set_alpha("2", 1, 0.5)
    assert model[2].site.layout.alpha[1, 1] == 0.5
    morphology.transition("2", 1, S.FOSSILIZED, alpha=0.5)
    assert morphology.record("2", 1).alpha == 1.0
    assert morphology.active == 0
    with pytest.raises(BadInput, match="a slot that holds a seed"):
        morphology.seed_module("2", 0)


def test_grafting_may_begin_above_zero() -> None:
    model = mlp()
    grow(model, "2", "low-rank", (S.TRAINING,), rank=2)
    model.morphology.transition("2", 0, S.GRAFTING, alpha=0.25)
    assert model.morphology.record("2", 0).alpha == 0.25
    assert model[2].live


def test_host_parameters_are_the_models_without_the_seeds() -> None:
    model = mlp()
    hosts = list(model.parameters())
    seed = grow(model, "2", "bottleneck-mlp", units=3)
    own = model.morphology.host_parameters()
    assert [id(p) for p in own] == [id(p) for p in hosts]
    assert len(list(model.parameters())) == len(own) + len(list(seed.parameters()))


def test_statistics_count_states_and_parameters() -> None:
    model = mlp(seeds_per_layer=2)
    base = sum(p.numel() for p in model.parameters())
    seed = grow(model, "2", "bottleneck-mlp", units=3)
    grow(model, "0", "low-rank", (), rank=1)
    model.morphology.record_fault("0", 0, "it broke")
    statistics = model.statistics()
    assert statistics["states"]["fossilized"] == 1
    assert statistics["states"]["germinated"] == 1
    assert statistics["states"]["dormant"] == 4
    assert statistics["parametersBase"] == base
    added = sum(p.numel() for p in seed.parameters())
    assert statistics["parameters"] == base + added + 4 + 6
    assert statistics["seedBytes"] == 4 * (added + 4 + 6)
    assert statistics["layoutBytes"] <= 6 * 64, "at most 64 bytes a slot"
    assert statistics["transitions"] == 1 + 3 + 1
    assert statistics["fallbacks"] == 1
    assert statistics["kernelLoads"]["count"] == 0
    json.dumps(statistics)


def test_health_is_folded_in_by_name() -> None:
    morphology = mlp().morphology
    assert morphology.observe("2", 0, 0.5) == 0.5
    assert morphology.layout.health[1, 0] == 0.5


def lived() -> nn.Module:
    """A model with seeds in every state a checkpoint can meet."""
    model = mlp(seeds_per_layer=2)
    grow(model, "0", "bottleneck-mlp", (S.TRAINING,), units=3)
    grow(model, "0", "low-rank", GRAFTING, slot=1, rank=2)
    model.morphology.set_alpha("0", 1, 0.375)
    grow(model, "2", "widen", FOSSIL, units=3)
    grow(model, "2", "low-rank", (S.CULLED,), slot=1, rank=1)
    model.morphology.remove("2", 1)
    grow(model, "4", "low-rank", (S.CULLED, S.DORMANT), rank=1)
    model.morphology.observe("0", 0, 0.5)
    model.morphology.record_fault("0", 0, "it broke")
    model.morphology.layout.advance()
    return model


def test_structure_goes_through_json_and_gives_the_same_model() -> None:
    model = lived()
    structure = json.loads(json.dumps(model.morphology.structure()))
    other = mlp(seeds_per_layer=2)

    def rebuilt(entry) -> nn.Module:
        graph = Graph.model_validate(entry["graph"])
        return build(graph, other.morphology.target(entry["layer"]), generator_seed=99)

    other.morphology.restore(structure, rebuilt)
    other.load_state_dict(model.state_dict())
    assert other.morphology.structure() == model.morphology.structure()
    for name, tensor in model.morphology.layout.tensors().items():
        again = other.morphology.layout.tensors()[name]
        assert torch.equal(tensor.nan_to_num(), again.nan_to_num())
    assert other.morphology.active == model.morphology.active
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))
    with model.morphology.trialling("0", 0), other.morphology.trialling("0", 0):
        assert torch.equal(other(x), model(x))


def test_structure_lists_what_a_checkpoint_needs() -> None:
    entries = {(e["layer"], e["slot"]): e for e in lived().morphology.structure()}
    assert {site: entry["state"] for site, entry in entries.items()} == {
        ("0", 0): "training",
        ("0", 1): "grafting",
        ("2", 0): "fossilized",
        ("2", 1): "culled",
        ("4", 0): "dormant",
    }
    assert entries["0", 1]["alpha"] == 0.375
    assert entries["2", 0]["source"] == "producer"
    assert entries["2", 0]["kernel"] == "kernel-0"
    assert entries["2", 1]["graph"] is None
    assert entries["4", 0]["cycle"] == 1
    assert entries["0", 0]["errors"] == 1
    assert mlp().morphology.structure() == []


def test_structure_is_restored_onto_dormant_slots_of_hosts_only() -> None:
    structure = lived().morphology.structure()
    model = mlp(seeds_per_layer=2)
    grow(model, "0", "low-rank", rank=1)
    with pytest.raises(WrapError, match=r"0\[0\]: got fossilized; allowed: a dormant slot"):
        model.morphology.restore(structure, lambda entry: nn.Identity())
    with pytest.raises(WrapError, match="layer: got 9"):
        mlp().morphology.restore([{**structure[0], "layer": "9"}], lambda entry: nn.Identity())
