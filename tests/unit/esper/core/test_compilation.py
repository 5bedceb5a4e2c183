"""Compiled blocks, with backends that take milliseconds; inductor has its tests in integration."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from esper.core import compilation
from esper.core.compilation import (
    KEPT_STRUCTURES,
    block_names,
    compile_blocks,
    compiled_blocks,
    decompile,
    uncompiled,
)
from esper.core.model_wrapper import MorphableModel, unwrap, wrap
from esper.errors import ManifestError, WorkFailed, WrapError
from esper.execution.state_layout import SeedLifecycleState as S
from esper.zoo.models import CNN, MLP
from tests.unit.esper.core.growing import FOSSIL, GRAFTING, grow


def eager(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that runs the traced graph as it is."""
    del inputs
    return graph.forward


class Residual(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.1)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.second(self.drop(torch.tanh(self.first(self.norm(x)))))
        return x + added


class Convolutional(nn.Module):
    """As in a ResNet: a block that holds a Sequential of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) + self.downsample(x)


class Classifier(nn.Module):
    """A model around a model, as users write them."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = Residual()
        self.blocks = nn.ModuleList([block, Residual(), block])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def stack(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Residual() for _ in range(count)])


def wrapped_stack(count: int = 3, seeds: int = 1) -> tuple[MorphableModel, Tensor]:
    model = stack(count)
    x = torch.randn(4, 6)
    return wrap(model, x, seeds_per_layer=seeds), x


ENCODER = nn.TransformerEncoder(
    nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, enable_nested_tensor=False
)
BLOCKS = {
    "layers under the root": (MLP(4, [5, 5], 3), ["model"]),
    "a sequence beside a layer": (CNN(1, [2, 2], 3), ["features"]),
    "a sequence of layers": (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["model"]),
    "one layer": (nn.Linear(2, 2), ["model"]),
    "a stack": (stack(), ["0", "1", "2"]),
    "stages": (
        nn.Sequential(nn.Sequential(Convolutional(), Convolutional()), nn.Flatten()),
        ["0.0", "0.1"],
    ),
    "an encoder": (ENCODER, ["layers.0", "layers.1"]),
    "a model in a model": (
        Classifier(Classifier(ENCODER)),
        ["backbone.backbone.layers.0", "backbone.backbone.layers.1"],
    ),
    "a block outside all containers": (Classifier(Residual()), ["backbone"]),
    "a shared block": (Shared(), ["blocks.0", "blocks.1"]),
    "a dictionary of blocks": (nn.ModuleDict({"a": Residual(), "b": nn.ReLU()}), ["a"]),
    "a parametrized layer": (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.ReLU()),
        ["model"],
    ),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_the_members_of_containers(case: str) -> None:
    model, names = BLOCKS[case]
    assert block_names(model) == names


def test_wrapping_and_growing_changes_no_block() -> None:
    model, _ = wrapped_stack()
    grow(model, "1.first", "bottleneck-mlp", FOSSIL)
    assert block_names(model) == ["0", "1", "2"]


def test_every_block_runs_compiled_in_every_mode() -> None:
    model, x = wrapped_stack()
    blocks = compile_blocks(model, eager)
    for training in (True, False):
        model.train(training)
        model(x)
        with torch.no_grad():
            model(x)
    assert list(blocks) == ["0", "1", "2"]
    for block in blocks.values():
        assert (block.calls, block.graph_calls, block.eager_calls) == (4, 4, 0)
        assert block.compilations == 4


def test_compiling_changes_neither_keys_nor_copies_nor_pickles() -> None:
    model, x = wrapped_stack()
    keys, expected = list(model.state_dict()), model.eval()(x)
    compile_blocks(model, eager)
    assert list(model.state_dict()) == keys
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert compiled_blocks(copied) == {}
        assert torch.equal(copied(x), expected)
    assert list(compiled_blocks(model)) == ["0", "1", "2"]


@pytest.mark.parametrize("first", [decompile, lambda _: None], ids=["decompiled", "compiled"])
def test_unwrapped_it_is_the_plain_model(first) -> None:
    model, x = wrapped_stack()
    expected = model.eval()(x)
    blocks = compile_blocks(model, eager)
    first(model)
    assert len(compiled_blocks(model)) == (0 if first is decompile else 3)
    plain = unwrap(model)
    assert compiled_blocks(plain) == {}
    assert torch.equal(plain(x), expected)
    assert [type(part) for part in plain.modules()] == [type(part) for part in stack().modules()]
    assert all(block.calls == 0 for block in blocks.values())


def test_what_cannot_be_compiled_is_refused() -> None:
    model, _ = wrapped_stack()
    compile_blocks(model, eager)
    with pytest.raises(WrapError, match="compiled blocks"):
        compile_blocks(model, eager)
    with pytest.raises(WrapError, match="not yet probed"):
        compile_blocks(wrap(stack()), eager)


def test_what_the_user_compiled_is_left_alone() -> None:
    model = stack(2)
    model[0].compile(backend="eager")
    assert list(compile_blocks(model, eager)) == ["1"]
    decompile(model)
    assert model[0]._compiled_call_impl is not None


# -- growing --------------------------------------------------------------------------------------

LAYERS = ("0.first", "0.second", "1.first", "1.second", "2.first", "2.second")
BLUEPRINTS = ("bottleneck-mlp", "low-rank", "affine", "noop")


def live(model: MorphableModel, x: Tensor) -> Tensor:
    """One training pass, from the same random numbers each time."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    out: Tensor = model.train()(x)
    out.square().mean().backward()
    return out.detach()


def test_after_fifty_transitions_every_block_still_runs_compiled() -> None:
    model, x = wrapped_stack()
    blocks = compile_blocks(model, eager)
    transitions = 0
    for turn in range(10):
        layer, blueprint = LAYERS[turn % 6], BLUEPRINTS[turn % 4]
        grow(model, layer, blueprint, ())
        for state in (S.TRAINING, S.GRAFTING, S.CULLED, S.DORMANT):
            model.morphology.transition(layer, 0, state)
            transitions += 1
            if state is S.GRAFTING:
                model.morphology.set_alpha(layer, 0, 0.5)
            before = {name: block.graph_calls for name, block in blocks.items()}
            found = live(model, x)
            for name, block in blocks.items():
                assert block.graph_calls == before[name] + 1, (name, layer, state)
            with uncompiled(model):
                torch.testing.assert_close(found, live(model, x))
        transitions += 1  # germinated
    assert transitions == 50
    assert all(block.eager_calls == 0 for block in blocks.values())
    # Once without seeds, and once for each seed that was grafted in the block.
    assert [block.compilations for block in blocks.values()] == [1 + 4, 1 + 4, 1 + 2]


class Recurrent(nn.Module):
    """torch can't trace through a GRU and cuts the forward in two there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.memory = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.memory(torch.relu(self.first(x)))[0]
        out: Tensor = self.head(states[:, -1])
        return out


def test_a_block_in_two_graphs_runs_both_however_often_it_grows() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6)
    model = wrap(Recurrent(), x)
    (block,) = compile_blocks(model, eager).values()
    graphs = []
    for turn in range(9):  # one more than torch compiles of a code object
        layer = ("first", "head")[turn % 2]
        grow(model, layer, "low-rank", GRAFTING)
        model.morphology.set_alpha(layer, 0, 0.5)
        for state in (S.CULLED, S.DORMANT):
            before = block.graph_calls
            live(model, x)
            with torch.no_grad():
                model.eval()(x)
            graphs.append(block.graph_calls - before)
            model.morphology.transition(layer, 0, state)
    assert set(graphs) == {4}
    assert block.eager_calls == 0


@torch._dynamo.config.patch(accumulated_recompile_limit=3)
def test_more_structures_than_torch_compiles_of_one_code_object() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6)
    model = wrap(Recurrent(), x)
    (block,) = compile_blocks(model, eager).values()
    for _ in range(5):
        grow(model, "head", "low-rank", GRAFTING)
        model.morphology.set_alpha("head", 0, 0.5)
        live(model, x)
        model.morphology.transition("head", 0, S.CULLED)
        model.morphology.transition("head", 0, S.DORMANT)
    assert (block.calls, block.graph_calls, block.eager_calls) == (5, 10, 0)


def test_a_part_that_torch_gives_up_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Reading(Residual):
        def forward(self, x: Tensor) -> Tensor:
            # torch compiles what follows for each value that it read.
            return super().forward(x * 2 if x.sum().item() > 1e9 else x)

    model = nn.Sequential(Reading(), Residual())
    blocks = compile_blocks(model, eager)
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            model(torch.randn(2, 6))
    assert blocks["0"].eager_calls > 0
    assert blocks["1"].eager_calls == 0
    assert told(caplog) == ["0 runs eager, or a part of it"]


@pytest.mark.parametrize("states", [(S.TRAINING,), GRAFTING, FOSSIL])
def test_checkpointed_blocks_learn_as_those_that_keep_everything(states: tuple[S, ...]) -> None:
    model, x = wrapped_stack()
    blocks = compile_blocks(model, eager)
    grow(model, "1.first", "bottleneck-mlp", states)
    if states is GRAFTING:
        model.morphology.set_alpha("1.first", 0, 0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    live(model, x)
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    checkpoint(model, x, use_reentrant=False).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found, expected)
    assert all(block.eager_calls == 0 for block in blocks.values())


def test_seeds_that_contribute_nothing_compile_nothing() -> None:
    model, x = wrapped_stack()
    blocks = compile_blocks(model, eager)
    expected = live(model, x)
    compilations = [block.compilations for block in blocks.values()]
    for layer in LAYERS:
        grow(model, layer, "bottleneck-mlp", (S.TRAINING,))
    assert torch.equal(live(model, x), expected)
    for layer in LAYERS:
        with model.morphology.trialling(layer, 0):
            model(x)
    assert [block.compilations for block in blocks.values()] == compilations


def test_alpha_moves_without_compiling() -> None:
    model, x = wrapped_stack()
    blocks = compile_blocks(model, eager)
    grow(model, "1.first", "bottleneck-mlp", GRAFTING)
    outputs = []
    for alpha in (0.25, 0.5, 1.0):
        model.morphology.set_alpha("1.first", 0, alpha)
        outputs.append(live(model, x))
        assert [block.compilations for block in blocks.values()] == [1, 1, 1]
    assert not torch.equal(outputs[0], outputs[1])
    with uncompiled(model):
        torch.testing.assert_close(outputs[2], live(model, x))
    model.morphology.transition("1.first", 0, S.FOSSILIZED)
    torch.testing.assert_close(live(model, x), outputs[2])
    assert [block.compilations for block in blocks.values()] == [1, 2, 1]


def test_seeds_of_compiled_blocks_learn() -> None:
    model, x = wrapped_stack()
    compile_blocks(model, eager)
    seed = grow(model, "1.first", "bottleneck-mlp", FOSSIL)
    live(model, x)
    found = [parameter.grad for parameter in seed.parameters()]
    with uncompiled(model):
        live(model, x)
    for gradient, parameter in zip(found, seed.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("apart", [False, True])
def test_a_seed_that_reads_its_producer(apart: bool) -> None:
    """The producer in the block of the consumer, and in another."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    other = nn.Sequential(nn.Linear(8, 6))
    model = nn.Sequential(one, other) if apart else nn.Sequential(nn.Sequential(*one, *other))
    x = torch.randn(4, 6)
    morphable = wrap(model, x)
    (pair,) = morphable.morphology.pairs
    blocks = compile_blocks(morphable, eager)
    assert len(blocks) == (2 if apart else 1)
    plain = live(morphable, x)
    grow(morphable, pair.consumer, "widen", FOSSIL)
    found = live(morphable, x)
    assert not torch.equal(found, plain)
    with uncompiled(morphable):
        torch.testing.assert_close(found, live(morphable, x))
    assert all(block.eager_calls == 0 for block in blocks.values())


def test_a_seed_in_an_encoder_layer_counts_in_eval_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    model = wrap(copy.deepcopy(ENCODER), x)
    blocks = compile_blocks(model, eager)
    with torch.no_grad():
        plain = model.eval()(x)
        grow(model, "layers.0.linear1", "bottleneck-mlp", FOSSIL)
        found = model.eval()(x)
        with uncompiled(model):
            torch.testing.assert_close(found, model(x))
    assert not torch.equal(found, plain)
    assert all(block.eager_calls == 0 for block in blocks.values())


@settings(deadline=None, max_examples=6)
@given(st.lists(st.tuples(st.sampled_from(LAYERS), st.booleans()), min_size=1, max_size=8))
def test_whatever_grows_where_compiled_and_eager_agree(steps: list[tuple[str, bool]]) -> None:
    model, x = wrapped_stack(seeds=len(LAYERS) + 2)
    blocks = compile_blocks(model, eager)
    for slot, (layer, stays) in enumerate(steps):
        grow(model, layer, "bottleneck-mlp", GRAFTING, slot=slot)
        model.morphology.set_alpha(layer, slot, 0.5)
        if stays:
            model.morphology.transition(layer, slot, S.FOSSILIZED)
        found = live(model, x)
        with model.morphology.without(layer, slot):
            without = live(model, x)
            with uncompiled(model):
                torch.testing.assert_close(without, live(model, x))
        with uncompiled(model):
            torch.testing.assert_close(found, live(model, x))
    assert all(block.eager_calls == 0 for block in blocks.values())


def test_code_of_seeds_long_gone_is_let_go() -> None:
    model, x = wrapped_stack(1)
    (block,) = compile_blocks(model, eager).values()
    for _ in range(KEPT_STRUCTURES + 2):
        grow(model, "0.first", "bottleneck-mlp", GRAFTING)
        model.morphology.set_alpha("0.first", 0, 0.5)
        live(model, x)
        model.morphology.transition("0.first", 0, S.CULLED)
        model.morphology.transition("0.first", 0, S.DORMANT)
    assert len(block._structures) == KEPT_STRUCTURES


# -- looking and failing --------------------------------------------------------------------------


def test_hooks_are_seen_where_nothing_runs_compiled() -> None:
    model, x = wrapped_stack()
    blocks = compile_blocks(model, eager)
    live(model, x)
    seen: list[str] = []
    for name, layer in model.morphology.layers.items():
        layer.register_forward_hook(lambda _m, _i, _o, name=name: seen.append(name))
    with uncompiled(model):
        model(x)
    assert seen == list(LAYERS)
    with pytest.raises(RuntimeError), uncompiled(model):
        model(x[:, 1:])
    assert list(compiled_blocks(model)) == list(blocks)
    assert [block.calls for block in blocks.values()] == [1, 1, 1]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What Esper logged, as far as the colon; torch logs through the same root."""
    records = [record for record in caplog.records if record.name.startswith("esper")]
    return [record.getMessage().split(":")[0] for record in records]


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("broken")


def test_a_seed_on_trial_that_raises_is_left_out() -> None:
    model, x = wrapped_stack()
    expected = live(model, x)
    compile_blocks(model, eager)
    model.morphology.germinate("1.first", 0, Broken(), kernel="broken")
    for state in GRAFTING:
        model.morphology.transition("1.first", 0, state)
    model.morphology.set_alpha("1.first", 0, 0.5)
    for strike in (1, 2, 3):
        torch.testing.assert_close(live(model, x), expected)
        assert model.morphology.record("1.first", 0).errors == strike
    assert model.morphology.record("1.first", 0).circuit_open


def test_code_with_seeds_that_fails_is_replaced_by_eager(caplog: pytest.LogCaptureFixture) -> None:
    refused: list[int] = []

    def picky(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if len(inputs) > 7:  # more than the block's own parameters and its input
            refused.append(len(inputs))
            raise NotImplementedError("too large")
        return eager(graph, inputs)

    model, x = wrapped_stack()
    blocks = compile_blocks(model, picky)
    live(model, x)
    grow(model, "1.first", "bottleneck-mlp", FOSSIL)
    with caplog.at_level(logging.WARNING):
        found = [live(model, x) for _ in range(3)]
    with uncompiled(model):
        assert torch.equal(found[0], live(model, x))
    assert len(refused) == 1
    assert [block.eager_calls for block in blocks.values()] == [0, 3, 0]
    assert told(caplog) == ["1 runs eager, or a part of it"]


def test_a_block_that_torch_cannot_compile_ends_the_work() -> None:
    def failing(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        raise NotImplementedError("no such\noperation")

    model, x = wrapped_stack()
    compile_blocks(model, failing)
    with pytest.raises(
        WorkFailed, match=r"^0: torch\.compile failed: .*no such operation"
    ) as found:
        model(x)
    assert "\n" not in str(found.value)
    assert str(found.value).endswith("set spec.training.compile to false")


def test_the_models_own_errors_come_through() -> None:
    class Raising(Residual):
        def forward(self, x: Tensor) -> Tensor:
            raise LookupError("own")

    model = nn.Sequential(Residual(), Raising())
    compile_blocks(model, eager)
    with pytest.raises(LookupError, match="own"):
        model(torch.randn(2, 6))


def test_a_block_that_torch_gives_up_on_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Uncompilable(Residual):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = nn.Sequential(Residual(), Uncompilable())
    blocks = compile_blocks(model, eager)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(torch.randn(2, 6))
    assert [block.eager_calls for block in blocks.values()] == [0, 2]
    assert told(caplog) == ["1 runs eager, or a part of it"]


def test_without_tools_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(compilation, "_inductor", broken)
    model, _ = wrapped_stack()
    with pytest.raises(ManifestError) as found:
        compile_blocks(model)
    assert str(found.value) == (
        "spec.training.compile: got true, and torch.compile does not work here (no C++ compiler); "
        "allowed: false, or a machine with a C++ compiler and Python's headers, and Triton for a "
        "GPU"
    )
    assert compiled_blocks(model) == {}
