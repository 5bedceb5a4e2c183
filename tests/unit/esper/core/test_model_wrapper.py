"""wrap gives a model that is still what it was; unwrap gives back what it was."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from esper.core import LayerSelection, MorphableModel, unwrap, wrap
from esper.core.model_wrapper import HOST_KINDS
from esper.errors import WrapError
from esper.execution.kasmina_layer import KASMINA_CLASSES, KasminaConv2d, KasminaLinear
from esper.execution.state_layout import SeedLifecycleState as S
from tests.unit.esper.core.growing import grow


class Net(nn.Module):
    """A model of the user's: a constructor with arguments, a method, a class attribute."""

    kind = "net"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.body = nn.ModuleDict({"a": nn.Linear(12, width), "b": nn.Linear(width, 2)})
        self.width = width

    def forward(self, x):
        return self.body["b"](torch.tanh(self.body["a"](self.stem(x).flatten(1))))

    def statistics(self) -> str:
        return "the user's own"


class WithSuper(Net):
    def forward(self, x):
        return super().forward(x) + 1


def images() -> torch.Tensor:
    return torch.randn(3, 1, 4, 4)


def seed() -> nn.Module:
    layer = nn.Linear(12, 5)
    nn.init.normal_(layer.weight)
    return layer


def grown(states=()) -> MorphableModel:
    model = wrap(Net(5), images())
    model.morphology.germinate("body.a", 0, seed(), kernel="k")
    for state in states:
        model.morphology.transition("body.a", 0, state)
    return model


def dicts_of(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("kind", [Net, WithSuper])
def test_the_same_object_comes_back_and_is_still_of_its_class(kind) -> None:
    model = kind(5)
    keys, weight = list(model.state_dict()), model.stem.weight
    wrapped = wrap(model, images())
    assert wrapped is model
    assert isinstance(wrapped, kind)
    assert isinstance(wrapped, MorphableModel)
    assert type(wrapped).__name__ == kind.__name__
    assert type(wrapped).__module__ == kind.__module__
    assert wrapped.kind == "net"
    assert wrapped.statistics() == "the user's own"
    assert list(wrapped.state_dict()) == keys
    assert wrapped.stem.weight is weight
    assert type(wrapped.stem) is KasminaConv2d
    assert type(wrapped.body["a"]) is KasminaLinear


def test_only_the_morphology_is_added_to_the_model() -> None:
    model = Net(5)
    before = dicts_of(model)
    after = dicts_of(wrap(model, images()))
    assert after[""] - before[""] == {"morphology"}
    public = set(dir(type(model))) - set(dir(Net))
    assert {name for name in public if not name.startswith("_")} == {"host_class"}


def test_unwrap_restores_types_keys_attributes_and_bits() -> None:
    bare = Net(5)
    model = copy.deepcopy(bare)
    wrap(model, images())
    model.morphology.germinate("body.a", 0, seed(), kernel="k")
    for state in (S.TRAINING, S.GRAFTING):
        model.morphology.transition("body.a", 0, state)
    model.morphology.set_alpha("body.a", 0, 0.5)
    back = unwrap(model)
    assert back is model
    assert [type(m) for m in back.modules()] == [type(m) for m in bare.modules()]
    assert dicts_of(back) == dicts_of(bare)
    assert list(back.state_dict()) == list(bare.state_dict())
    for mine, other in zip(back.state_dict().values(), bare.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    x = images()
    assert torch.equal(back(x), bare(x))
    wrap(back, x)


def test_a_copy_leaves_the_original_alone() -> None:
    model = Net(5)
    wrapped = wrap(model, images(), copy=True)
    assert type(model) is Net
    assert type(model.stem) is nn.Conv2d
    assert wrapped.stem.weight is not model.stem.weight


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(1, 2, 3)])
def test_a_model_that_is_itself_a_layer_hosts(make) -> None:
    bare = make()
    x = torch.randn(2, 4) if isinstance(bare, nn.Linear) else images()
    model = wrap(copy.deepcopy(bare), x)
    assert isinstance(model, type(bare))
    assert list(model.morphology.layers) == ["model"]
    assert list(model.state_dict()) == list(bare.state_dict())
    grower = copy.deepcopy(bare)
    model.morphology.germinate("model", 0, grower, kernel="k")
    assert "grown.0.weight" in model.state_dict()
    assert torch.equal(model(x), bare(x))
    with model.morphology.trialling("model", 0):
        assert torch.equal(model(x), bare(x) + grower(x))
    copied = pickle.loads(pickle.dumps(model))
    with copied.morphology.trialling("model", 0):
        assert torch.equal(copied(x), bare(x) + grower(x))
    back = unwrap(model)
    assert type(back) is type(bare)
    assert set(back.__dict__) == set(bare.__dict__)


def test_a_slice_of_a_wrapped_sequential_works_alone() -> None:
    for inputs in (torch.randn(2, 4), None):
        model = wrap(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), inputs)
        x = torch.randn(2, 4)
        part = model[:2]
        assert torch.equal(part(x), model[1](model[0](x)))
        assert part.double()(x.double()).dtype == torch.float64


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x, mask=None):
        return self.head(self.encoder(x, src_key_padding_mask=mask))


def test_attention_projections_are_refused_with_the_reason() -> None:
    model = wrap(Encoder(), torch.randn(2, 5, 8))
    refused = model.morphology.refused
    names = [f"encoder.layers.{n}.self_attn.out_proj" for n in range(2)]
    assert list(refused) == names
    assert "never called" in refused[names[0]]
    assert "encoder.layers.0.linear1" in model.morphology.layers


@pytest.mark.parametrize("padded", [False, True])
def test_a_seed_in_an_encoder_layer_counts_in_evaluation_too(padded: bool) -> None:
    torch.manual_seed(0)
    bare = Encoder()
    x = torch.randn(2, 5, 8)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    inputs = (x, mask) if padded else (x,)
    model = wrap(bare, inputs, copy=True).eval()
    bare.eval()
    name = "encoder.layers.1.linear2"
    grower = nn.Linear(16, 8)
    model.morphology.germinate(name, 0, grower, kernel="k")
    real = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(model(*inputs), bare(*inputs))
        with model.morphology.trialling(name, 0):
            changed = model(*inputs)
            assert model.encoder.use_nested_tensor is False
        assert not torch.allclose(changed[real], bare(*inputs)[real], atol=1e-3)
        assert torch.equal(model(*inputs), bare(*inputs))
    with model.morphology.trialling(name, 0):
        expected = model(*inputs)
    assert torch.allclose(changed[real], expected[real], atol=1e-5)
    assert model.encoder.use_nested_tensor is True
    assert not any(module._forward_hooks for module in model.modules())


def test_the_first_wrapper_is_the_only_one() -> None:
    model = wrap(Net(5), images())
    with pytest.raises(WrapError, match="wrapped already"):
        wrap(model)
    with pytest.raises(WrapError, match="wrapped already"):
        wrap(nn.Sequential(model))
    with pytest.raises(WrapError, match="allowed: a model that wrap has returned"):
        unwrap(Net(5))


def spectral() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(4, 4))


class Linear2(nn.Linear):
    pass


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.nn.quantized.Linear(4, 4)


def replaced_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Linear2(4, 4), "a Linear2, a subclass"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
        (weight_norm(nn.Linear(4, 4)), "computed"),
        (spectral(), "computed"),
        (replaced_forward(), "replaced on the instance"),
        (nn.Linear(4, 4, dtype=torch.complex64), "not real"),
    ],
)
def test_layers_that_cannot_host_are_named_with_the_reason(layer, reason) -> None:
    model = nn.Sequential(layer, nn.Linear(4, 2))
    kind = type(layer)
    morphology = wrap(model).morphology
    assert list(morphology.layers) == ["1"]
    assert reason in morphology.refused["0"]
    assert type(layer) is kind
    with pytest.raises(WrapError, match="layers: 0"):
        wrap(nn.Sequential(layer, nn.Linear(4, 2)), layers=["0"])


def scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(4, 4))


class Norm2(nn.LayerNorm):
    pass


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LayerNorm(4, elementwise_affine=False), "no weight"),
        (nn.LayerNorm((3, 4)), "over 2 dimensions"),
        (Norm2(4), "a Norm2, a subclass"),
        (nn.BatchNorm2d(4, affine=False), "no weight"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), "parametrized"),
        (weight_norm(nn.Conv1d(4, 4, 1)), "computed"),
        (scripted(), "scripted"),
        (quantised(), "quantised"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_layers_of_the_other_kinds_that_cannot_host_are_named_too(layer, reason) -> None:
    every = LayerSelection(types=HOST_KINDS)
    kind = type(layer)
    morphology = wrap(nn.ModuleList([layer, nn.Linear(4, 2)]), layers=every).morphology
    assert list(morphology.layers) == ["1"]
    assert reason in morphology.refused["0"]
    assert type(layer) is kind
    if kind in KASMINA_CLASSES and kind is not nn.Linear:
        plain = wrap(nn.ModuleList([layer, nn.Linear(4, 2)])).morphology
        assert plain.refused == {}, "a kind that was not asked for is no finding"


def test_what_an_earlier_wrap_has_grown_is_no_place_to_grow_at() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 4))
    grow(model, "0", "bottleneck-mlp", units=3)
    again = wrap(unwrap(model))
    assert list(again.morphology.layers) == ["1"]
    assert again.morphology.refused == {"0": "seeds of an earlier wrap stay beside it"}


def test_a_model_with_nothing_to_grow_at_is_refused() -> None:
    with pytest.raises(WrapError, match="at least one layer that `layers` chooses: Linear, Conv2d"):
        wrap(nn.Sequential(nn.ReLU()))
    with pytest.raises(WrapError, match="a subclass"):
        wrap(nn.Sequential(Linear2(2, 2)))

    class Bypassing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight)

    model = Bypassing()
    with pytest.raises(WrapError, match="never called"):
        wrap(model, torch.randn(1, 2))
    assert type(model) is Bypassing


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LazyLinear(3)), "run once"),
        (nn.DataParallel(nn.Linear(2, 2)), "wrap it first"),
        (torch.jit.script(nn.Sequential(nn.Linear(2, 2))), "wrap it first"),
        ("model", "an nn.Module"),
    ],
)
def test_models_that_cannot_be_wrapped_say_why(model, message) -> None:
    with pytest.raises(WrapError, match=message):
        wrap(model)


def test_an_attribute_named_morphology_is_not_overwritten() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.morphology = 1
    with pytest.raises(WrapError, match="attribute named morphology"):
        wrap(model)


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (None, ["stem", "body.a", "body.b"]),
        (LayerSelection(), ["stem", "body.a", "body.b"]),
        (LayerSelection(types=["Linear"]), ["body.a", "body.b"]),
        (LayerSelection(include=["body.*"], exclude=["*.b"]), ["body.a"]),
        (["body.b", "stem"], ["stem", "body.b"]),
    ],
)
def test_layers_are_chosen_by_kind_and_name(selection, chosen) -> None:
    assert list(wrap(Net(5), images(), layers=selection).morphology.layers) == chosen


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["nowhere"], "got nowhere; allowed: stem, body.a, body.b"),
        (["body"], "got body"),
        ("stem", "a list of layer names"),
        (LayerSelection(include=["nothing*"]), "at least one"),
    ],
)
def test_a_choice_that_fits_nothing_is_refused(layers, message) -> None:
    with pytest.raises(WrapError, match=message):
        wrap(Net(5), layers=layers)


def test_an_unknown_kind_of_layer_is_refused() -> None:
    with pytest.raises(
        WrapError, match="allowed: Linear, Conv1d, Conv2d, LayerNorm, BatchNorm2d, Embedding"
    ):
        LayerSelection(types=["Conv3d"])


@pytest.mark.parametrize("count", [0, -1, True])
def test_slots_are_counted_from_one(count) -> None:
    with pytest.raises(WrapError, match="seeds_per_layer"):
        wrap(Net(5), seeds_per_layer=count)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES["torch.save"] = saved


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("states", [(), (S.TRAINING, S.GRAFTING), "unprobed"])
def test_copies_are_whole_and_apart(copied, states) -> None:
    if states == "unprobed":
        model = wrap(Net(5))
    else:
        model = grown(states)
        if states:
            model.morphology.set_alpha("body.a", 0, 0.5)
    other = copied(model)
    assert type(other) is type(model)
    assert isinstance(other, Net)
    x = images()
    assert torch.equal(other(x), model(x))
    assert other.morphology.structure() == model.morphology.structure()
    if states == (S.TRAINING, S.GRAFTING):
        before = model(x)
        other.morphology.set_alpha("body.a", 0, 1.0)
        assert torch.equal(model(x), before)
        assert not torch.equal(other(x), before)
        assert other.morphology.layout is other.body["a"].site.layout
    assert type(unwrap(other)) is Net


def test_a_state_dict_goes_round() -> None:
    model, other = grown((S.TRAINING,)), grown((S.TRAINING,))
    assert "body.a.grown.0.weight" in model.state_dict()
    other.load_state_dict(model.state_dict())
    for mine, copied in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, copied)
    Net(5).load_state_dict({k: v for k, v in model.state_dict().items() if ".grown." not in k})


def test_the_layout_moves_with_the_model() -> None:
    model = grown((S.TRAINING, S.GRAFTING))
    model.morphology.set_alpha("body.a", 0, 0.5)
    model.double()
    assert model.morphology.layout.alpha.dtype == torch.float32
    assert model(images().double()).dtype == torch.float64
    model.to("meta")
    assert model.morphology.layout.device == torch.device("meta")
    assert model(images().to("meta").double()).device.type == "meta"


def test_a_class_that_cannot_be_extended_is_refused_and_left_alone() -> None:
    class Final(type):
        def __new__(cls, name, bases, namespace):
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("no subclasses")
            return super().__new__(cls, name, bases, namespace)

    class Sealed(nn.Module, metaclass=Final):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    model = Sealed()
    with pytest.raises(WrapError, match="can be extended"):
        wrap(model)
    assert type(model.layer) is nn.Linear


def test_parametrizing_after_wrapping_still_computes_the_same() -> None:
    bare = Net(5)
    model = wrap(bare, images(), copy=True)
    parametrize.register_parametrization(model.body["a"], "weight", nn.Identity())
    x = images()
    assert torch.equal(model(x), bare(x))


def test_importing_the_package_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import esper, sys; assert 'torch' not in sys.modules; esper.wrap; print(dir(esper))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "MorphableModel" in done.stdout


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    import esper

    assert set(esper.__all__) == {
        "EsperConfig",
        "KasminaLayer",
        "MorphableModel",
        "SeedLifecycleState",
        "__version__",
        "unwrap",
        "wrap",
    }
    assert all(getattr(esper, name) for name in esper.__all__)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = esper.nothing_such


def test_a_registry_of_subclasses_does_not_hear_of_wrapping() -> None:
    registry: dict[str, type] = {}

    class Registered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def __init_subclass__(cls, **options: object) -> None:
            registry[cls.__name__] = cls

        def forward(self, x):
            return self.layer(x)

    class Known(Registered):
        pass

    wrap(Known(), torch.zeros(1, 2))
    assert registry == {"Known": Known}


@pytest.mark.parametrize("name", ["statistics", "host_class"])
def test_a_part_that_would_hide_behind_the_wrappers_names_is_refused(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(2, 2))
    with pytest.raises(WrapError, match=f"named {name}"):
        wrap(model)
