"""Parts of a wrapped model, copied and pickled without it; and where and when one is wrapped."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from esper.core import MorphableModel, unwrap, wrap
from esper.core.model_wrapper import LayerSelection
from esper.core.morphology import release
from esper.errors import WrapError
from esper.execution.kasmina_layer import KASMINA_CLASSES, KasminaLayer
from esper.execution.state_layout import SeedLifecycleState as S
from tests.unit.esper.core.growing import FOSSIL, GRAFTING, grow
from tests.unit.esper.core.hosts import EveryKind


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "pickle protocol 2": lambda module: pickle.loads(pickle.dumps(module, protocol=2)),
    "torch.save": saved,
}
ways = pytest.mark.parametrize("way", COPIES)


class Parts(nn.Module):
    """A small encoder, a producer with its consumer, and a large rest."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.rest = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.encoder(x))


def parts() -> tuple[Parts, MorphableModel, torch.Tensor]:
    torch.manual_seed(0)
    bare, x = Parts(), torch.randn(4, 8)
    return bare, wrap(bare, x, copy=True), x


# -- a part alone -------------------------------------------------------------------------------


@ways
def test_a_part_copied_alone_is_an_ordinary_module(way: str) -> None:
    bare, model, x = parts()
    found = COPIES[way](model.encoder)
    assert type(found[0]) is nn.Linear
    assert set(found[0].__dict__) == set(bare.encoder[0].__dict__)
    assert torch.equal(found(x), bare.encoder(x))
    again = wrap(found, x)
    grow(again, "0", "bottleneck-mlp", FOSSIL)
    unwrap(again)
    assert isinstance(model.encoder[0], KasminaLayer), "the model's own layer stays a host"
    assert model.morphology.target("encoder.0").input_shape == (8,)


def test_a_part_is_pickled_without_its_model() -> None:
    bare, model, _ = parts()
    assert len(pickle.dumps(model.encoder)) < len(pickle.dumps(bare.encoder)) + 100
    grow(model, "encoder.0", "bottleneck-mlp", (S.TRAINING,))
    assert len(pickle.dumps(model.encoder)) < 20_000


@ways
@pytest.mark.parametrize("kind", list(KASMINA_CLASSES), ids=lambda kind: kind.__name__)
def test_a_layer_of_every_kind_copied_alone_is_of_its_own_class(kind, way: str) -> None:
    model = wrap(
        EveryKind(),
        torch.randint(9, (2, 5)),
        layers=LayerSelection(types=[host.__name__ for host in KASMINA_CLASSES]),
    )
    for layer in model.morphology.layers.values():
        if isinstance(layer, kind):
            assert type(COPIES[way](layer)) is kind


@ways
def test_the_producer_of_a_grown_consumer_copied_alone_keeps_nothing_for_it(way: str) -> None:
    _, model, x = parts()
    grow(model, "rest.2", "widen", GRAFTING)
    model.morphology.set_alpha("rest.2", 0, 0.5)
    assert model.rest[0].live
    found = COPIES[way](model.rest[0])
    assert type(found) is nn.Linear
    assert "live" not in found.__dict__
    both = COPIES[way](model)
    assert torch.equal(both(x), model(x))
    assert both.rest[0].live[0] is both.rest[2].site.branches[0].tap


@ways
@pytest.mark.parametrize("states", [(), (S.TRAINING,), GRAFTING, FOSSIL])
def test_a_layer_with_a_seed_copied_alone_computes_the_same_and_can_be_made_plain(
    states: tuple[S, ...], way: str
) -> None:
    bare, model, x = parts()
    grow(model, "encoder.0", "bottleneck-mlp", states)
    if states == GRAFTING:
        model.morphology.set_alpha("encoder.0", 0, 0.5)
    found = COPIES[way](model.encoder[0])
    assert torch.equal(found(x), model.encoder[0](x))
    with pytest.raises(WrapError, match="without its model"):
        found.site.target()
    found.shed()
    release(found)
    assert torch.equal(found(x), bare.encoder[0](x))
    wrap(found, x)


# -- the whole ----------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("states", [(), (S.TRAINING,), GRAFTING, FOSSIL])
@pytest.mark.parametrize(("layer", "blueprint"), [("encoder.0", "low-rank"), ("rest.2", "widen")])
def test_a_copied_model_can_grow_on_its_own(
    layer: str, blueprint: str, states: tuple[S, ...], way: str
) -> None:
    _, model, x = parts()
    grow(model, layer, blueprint, states)
    found = COPIES[way](model)
    morphology = found.morphology
    assert torch.equal(found(x), model(x))
    for name, host in morphology.layers.items():
        assert type(host) is type(model.morphology.layers[name])
        assert found.get_submodule(name) is host
        assert host.site.layout is morphology.layout
        assert host.site.target.func.__self__ is morphology
        assert host.site.target() == model.morphology.target(name)
        producer = model.morphology.layers[name].site.producer
        mine = None if producer is None else morphology.layers[producer.site.name]
        assert host.site.producer is mine
    if states == GRAFTING:
        morphology.set_alpha(layer, 0, 0.7)
        assert not torch.equal(found(x), model(x))
        morphology.set_alpha(layer, 0, 0.0)
    free = "rest.0"
    grow(found, free, "bottleneck-mlp", FOSSIL)
    after = found(x)
    assert torch.allclose(unwrap(found)(x), after, atol=1e-5)
    assert model.morphology.state(free, 0) is S.DORMANT


@ways
def test_a_part_and_its_model_copied_together_stay_one(way: str) -> None:
    _, model, _ = parts()
    both = nn.ModuleList([model.encoder, model])
    encoder, whole = COPIES[way](both)
    assert whole.encoder is encoder
    assert encoder[0] is whole.morphology.layers["encoder.0"]
    grow(whole, "encoder.0", "bottleneck-mlp", FOSSIL)


@ways
def test_a_copied_encoder_takes_no_fused_path_around_its_seed(way: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, padded = torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    padded[0, 3:] = True
    model = wrap(nn.TransformerEncoder(layer, 2), x).eval()
    found = COPIES[way](model)
    for each in (model, found):
        grow(each, "layers.1.linear2", "bottleneck-mlp", FOSSIL)
    with torch.no_grad():
        outputs = [each(x, src_key_padding_mask=padded) for each in (model, found)]
    assert torch.equal(*outputs)


# -- inference mode -----------------------------------------------------------------------------


@pytest.mark.parametrize("example", [True, False])
def test_a_model_wrapped_or_first_called_in_inference_mode_can_grow_and_learn(
    example: bool,
) -> None:
    bare, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(2, 5)
    if not example:
        model = wrap(bare)
    with torch.inference_mode():
        if example:
            model = wrap(bare, x)
        model(x)
    assert not any(t.is_inference() for t in model.morphology.layout.tensors().values())
    grow(model, "0", "bottleneck-mlp", GRAFTING)
    with torch.inference_mode():
        model.morphology.set_alpha("0", 0, 0.5)
        model(x)
        model.morphology.move(torch.device("cpu"))
    model(x).sum().backward()
    model.morphology.set_alpha("0", 0, 0.75)
    model.morphology.transition("0", 0, S.FOSSILIZED)
    unwrap(model)


# -- between a forward and its backward ---------------------------------------------------------


def test_a_step_of_one_seed_leaves_the_gradients_of_a_forward_before_it() -> None:
    _, model, x = parts()
    for layer in ("encoder.0", "rest.2"):
        grow(model, layer, "bottleneck-mlp", GRAFTING)
        model.morphology.set_alpha(layer, 0, 0.5)

    def gradients(between: Callable[[], object]) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(x).square().sum()
        between()
        loss.backward()
        return [p.grad.clone() for p in seeds]

    seeds = [p for layer in model.morphology.layers for p in seed_parameters(model, layer)]
    expected = gradients(lambda: None)
    steps = [
        lambda: model.morphology.set_alpha("encoder.0", 0, 0.9),
        lambda: model.morphology.transition("rest.2", 0, S.CULLED),
    ]
    for step in steps:
        assert all(map(torch.equal, gradients(step), expected))
        model.morphology.set_alpha("encoder.0", 0, 0.5)


def seed_parameters(model: MorphableModel, layer: str) -> list[nn.Parameter]:
    held = model.morphology.layers[layer].site.branches
    return model.morphology.seed_parameters(layer, 0) if held else []


# -- names that hosts need ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["site", "live", "transition", "grown_up", "_set_live"])
def test_a_layer_with_an_attribute_that_hosts_need_is_no_host_and_keeps_it(name: str) -> None:
    bare, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), torch.randn(2, 6)
    setattr(bare[0], name, "stem")
    model = wrap(bare, x)
    taken = name != "grown_up"
    assert ("0" in model.morphology.refused) == taken
    if taken:
        reason = f"it has attributes that hosts need: {name}"
        assert model.morphology.refused["0"] == reason
        assert type(model[0]) is nn.Linear
        with pytest.raises(WrapError, match=name):
            wrap(unwrap(model), x, layers=["0"])
    else:
        unwrap(model)
    assert getattr(bare[0], name) == "stem"


def test_parameters_and_buffers_of_such_names_count_too() -> None:
    x = torch.randn(2, 6)
    bare = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    bare[0].register_buffer("site", torch.ones(2))
    bare[1].live = nn.Parameter(torch.ones(2))
    model = wrap(bare, x)
    assert list(model.morphology.layers) == ["2"]
    assert set(model.state_dict()) == set(unwrap(model).state_dict())


def test_a_model_that_is_itself_such_a_layer_is_refused_and_keeps_it() -> None:
    layer = nn.Linear(6, 4)
    layer.site = "here"
    with pytest.raises(WrapError, match="hosts need: site"):
        wrap(layer, torch.randn(2, 6))
    assert type(layer) is nn.Linear
    assert layer.site == "here"
