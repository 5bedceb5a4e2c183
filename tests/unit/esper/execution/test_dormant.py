"""A dormant model is the bare one: the same operations, the same Python calls, the same bits."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks import execution_models
from benchmarks.execution_models import CLASSES, Case, ResNet18, flag_wrapped, twin
from esper.core import unwrap, wrap
from esper.core.model_wrapper import LayerSelection, MorphableModel
from esper.execution.kasmina_layer import KASMINA_CLASSES
from esper.execution.state_layout import SeedLifecycleState as S
from tests.unit.esper.execution.seeds import no_collection

BATCH = 3
# A narrow ResNet has the layers of a wide one, and takes a tenth of the time.
CASES = [
    replace(case, build=partial(ResNet18, 8)) if case.name == "resnet18" else case
    for case in execution_models.CASES
]
EVERY_KIND = LayerSelection(types=[kind.__name__ for kind in KASMINA_CLASSES])
HOOKS = [
    name
    for name, value in vars(nn.Module()).items()
    if "hooks" in name and hasattr(value, "__len__")
]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_mode = pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])


class Operations(TorchDispatchMode):
    """Notes every operation that reaches the dispatcher, in order, with the shapes it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[object]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((str(func), [getattr(part, "shape", None) for part in args]))
        return func(*args, **(kwargs or {}))


def wrapped_copy(bare: nn.Module, x: Tensor, seeds_per_layer: int = 2) -> MorphableModel:
    """`bare` with every layer that can host seeds made a host; it owns its tensors."""
    return wrap(bare, x, layers=EVERY_KIND, seeds_per_layer=seeds_per_layer, copy=True)


def pair(case: Case) -> tuple[nn.Module, MorphableModel, Tensor]:
    """A bare model, the same one wrapped, and inputs for both."""
    bare, x = case.seeded(), case.inputs(BATCH)
    return bare, wrapped_copy(bare, x), x


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(1).float(), torch.arange(len(x)) % CLASSES)


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    """The output, with the gradients of all parameters where the mode has them."""
    torch.manual_seed(11)
    model.train(mode == "train")
    model.zero_grad()
    return passes(model, x, mode)


def passes(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    """A forward pass, and a backward pass where the mode has gradients."""
    with torch.set_grad_enabled(mode != "no_grad"):
        out = model(x)
    if mode != "no_grad":
        out.square().sum().backward()
    return out


def operations(call: Callable[[], object]) -> list[tuple[str, list[object]]]:
    with Operations() as noted:
        call()
    return noted.seen


def python_calls(call: Callable[[], object]) -> Counter[tuple[str, str]]:
    """How often each function is called, Python's and C's, by name."""
    calls: Counter[tuple[str, str]] = Counter()

    def note(frame, event, argument) -> None:
        if event == "call":
            calls[event, frame.f_code.co_qualname] += 1
        elif event == "c_call":
            calls[event, argument.__qualname__] += 1

    call()  # what torch sets up when first called is nobody's cost
    with no_collection():  # others' callbacks at a collection would be counted
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
    return calls


def bits(model: nn.Module, out: Tensor) -> list[Tensor]:
    """All that a run leaves: output, gradients, buffers and the random stream."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [out, *gradients, *model.buffers(), torch.get_rng_state()]


def assert_same_bits(expected: list[Tensor], found: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert other.dtype == one.dtype
        assert other.stride() == one.stride()
        assert torch.equal(one, other)


def assert_exact(bare: nn.Module, dormant: nn.Module, x: Tensor) -> None:
    """In every mode: operations, calls and bits as the bare model's."""
    for mode in ("train", "eval", "no_grad"):
        outcomes = [bits(model, run(model, x, mode)) for model in (bare, dormant)]
        assert_same_bits(*outcomes)
        for noted in (operations, python_calls):
            wanted, found = (noted(partial(passes, m, x, mode)) for m in (bare, dormant))
            assert found == wanted


@each_case
@each_mode
def test_the_operations_are_the_bare_models(case: Case, mode: str) -> None:
    bare, wrapped, x = pair(case)
    wanted = operations(lambda: run(bare, x, mode))
    assert len(wanted) > 4
    assert operations(lambda: run(wrapped, x, mode)) == wanted


@each_case
@each_mode
def test_the_python_calls_are_the_bare_models(case: Case, mode: str) -> None:
    bare, wrapped, x = pair(case)
    wanted = python_calls(lambda: run(bare, x, mode))
    assert wanted["call", "Linear.forward"] >= 1
    assert python_calls(lambda: run(wrapped, x, mode)) == wanted


@each_case
@each_mode
def test_outputs_gradients_buffers_and_draws_are_the_bare_models_bits(
    case: Case, mode: str
) -> None:
    bare, wrapped, x = pair(case)
    assert_same_bits(bits(bare, run(bare, x, mode)), bits(wrapped, run(wrapped, x, mode)))


@each_case
def test_no_module_has_a_hook_or_another_forward_than_its_host(case: Case) -> None:
    bare, wrapped, x = pair(case)
    assert len(HOOKS) >= 8
    for mode in ("train", "eval", "no_grad"):
        run(wrapped, x, mode)
        for module in wrapped.modules():
            assert not any(getattr(module, name) for name in HOOKS)
    for layer in wrapped.morphology.layers.values():
        assert type(layer).forward is layer.host_class.forward
    for before, after in zip(bare.modules(), wrapped.modules(), strict=True):
        assert set(vars(after)) - set(vars(before)) <= {"site", "morphology"}


@each_case
def test_names_and_state_are_the_bare_models(case: Case) -> None:
    bare, wrapped, _ = pair(case)
    wanted, found = bare.state_dict(), wrapped.state_dict()
    assert list(found) == list(wanted)
    assert found._metadata == wanted._metadata
    assert [n for n, _ in wrapped.named_modules()] == [n for n, _ in bare.named_modules()]
    assert bare.load_state_dict(found) == wrapped.load_state_dict(wanted)


@each_case
def test_wrapped_in_place_the_parameters_are_the_same_objects(case: Case) -> None:
    model, x = case.seeded(), case.inputs(BATCH)
    before = dict(model.named_parameters())
    wrapped = wrap(model, x, layers=EVERY_KIND)
    assert wrapped is model
    assert {name: id(p) for name, p in wrapped.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }


def test_the_transformer_takes_its_fused_path_while_it_sleeps() -> None:
    _, wrapped, x = pair(next(case for case in CASES if case.name == "transformer"))
    names = [name for name, _ in operations(lambda: run(wrapped, x, "no_grad"))]
    assert names.count("aten._transformer_encoder_layer_fwd.default") == 4


def test_a_wrapper_module_would_not_pass_for_dormant() -> None:
    bare, wrapped, x = pair(CASES[0])
    names = wrapped.morphology.layers
    boxed = flag_wrapped(twin(bare), names)
    assert_same_bits([run(bare, x, "eval")], [run(boxed, x, "eval")])
    wanted = python_calls(lambda: run(bare, x, "no_grad"))
    found = python_calls(lambda: run(boxed, x, "no_grad"))
    assert (found - wanted)["call", "FlagWrapper.forward"] == len(names) == 6


@each_case
def test_a_whole_training_step_makes_the_bare_models_calls(case: Case) -> None:
    bare, wrapped, x = pair(case)
    counts = []
    for model in (bare, wrapped):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()

        model.train()
        counts.append(python_calls(step))
    assert counts[0] == counts[1]


@each_case
def test_ten_thousand_seeds_are_as_quiet_as_one(case: Case) -> None:
    bare, x = case.seeded(), case.inputs(BATCH)
    hosts = len(wrapped_copy(bare, x).morphology.layers)
    wrapped = wrapped_copy(bare, x, seeds_per_layer=-(-10_000 // hosts))
    assert wrapped.morphology.layout.alpha.numel() >= 10_000
    wanted = python_calls(lambda: run(bare, x, "train"))
    assert python_calls(lambda: run(wrapped, x, "train")) == wanted
    assert list(wrapped.state_dict()) == list(bare.state_dict())


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(case, mode, id=f"{case.name}-{mode}")
        for case in CASES
        for mode in ("train", "eval", "no_grad")
        # Torch's own fused encoder layer can't run under the processor's autocast.
        if (case.name, mode) != ("transformer", "no_grad")
    ],
)
def test_under_autocast_bits_and_operations_are_the_bare_models(case: Case, mode: str) -> None:
    bare, wrapped, x = pair(case)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = operations(lambda: run(bare, x, mode))
        assert operations(lambda: run(wrapped, x, mode)) == wanted
        expected, found = run(bare, x, mode), run(wrapped, x, mode)
    assert_same_bits(bits(bare, expected), bits(wrapped, found))


@pytest.mark.parametrize("case", [c for c in CASES if c.inputs(1).dim() == 4], ids=lambda c: c.name)
@each_mode
def test_channels_last_stays_channels_last(case: Case, mode: str) -> None:
    bare, x = case.seeded(), case.inputs(BATCH).to(memory_format=torch.channels_last)
    wrapped = wrapped_copy(bare, x)
    for model in (bare, wrapped):
        model.to(memory_format=torch.channels_last)
    first = next(p for p in wrapped.parameters() if p.dim() == 4)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(bits(bare, run(bare, x, mode)), bits(wrapped, run(wrapped, x, mode)))
    wanted = operations(lambda: run(bare, x, mode))
    assert operations(lambda: run(wrapped, x, mode)) == wanted


@each_case
def test_accumulated_and_clipped_steps_leave_the_bare_models_weights(case: Case) -> None:
    bare, wrapped, _ = pair(case)
    batches = [case.inputs(BATCH, seed=number) for number in range(4)]
    for model in (bare, wrapped):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for number, x in enumerate(batches, 1):
            (loss_of(model, x) / 2).backward()
            if number % 2 == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    assert_same_bits([*bare.state_dict().values()], [*wrapped.state_dict().values()])


@each_case
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_the_bare_models(case: Case, reentrant: bool) -> None:
    bare, wrapped, x = pair(case)
    x.requires_grad_()  # reentrant checkpoints look at the inputs only
    outcomes, seen = [], []
    for model in (bare, wrapped):
        torch.manual_seed(3)
        x.grad = None
        with Operations() as noted:
            out = checkpoint(model, x, use_reentrant=reentrant)
            out.square().sum().backward()
        outcomes.append([*bits(model, out), x.grad])
        seen.append(noted.seen)
    assert_same_bits(*outcomes)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@each_case
def test_a_copy_of_a_dormant_model_is_exact_too(case: Case, copied) -> None:
    bare, wrapped, x = pair(case)
    again = copied(wrapped)
    assert isinstance(again, MorphableModel)
    assert not {id(p) for p in again.parameters()} & {id(p) for p in wrapped.parameters()}
    assert_exact(bare, again, x)


@each_case
def test_wrapped_without_inputs_it_is_exact_from_the_second_call_on(case: Case) -> None:
    bare, x = case.seeded(), case.inputs(BATCH)
    wrapped = wrap(bare, layers=EVERY_KIND, copy=True)
    assert_same_bits(bits(bare, run(bare, x, "train")), bits(wrapped, run(wrapped, x, "train")))
    assert wrapped.morphology.probed
    assert_exact(bare, wrapped, x)


@each_case
def test_unwrapped_it_is_the_bare_class_and_as_exact(case: Case) -> None:
    bare, wrapped, x = pair(case)
    plain = unwrap(wrapped)
    assert [type(m) for m in plain.modules()] == [type(m) for m in bare.modules()]
    assert_exact(bare, plain, x)


@pytest.mark.parametrize("states", [(), (S.TRAINING,), (S.TRAINING, S.GRAFTING)])
@each_case
def test_a_seed_that_does_not_contribute_costs_the_forward_nothing(
    case: Case, states: tuple[S, ...]
) -> None:
    bare, wrapped, x = pair(case)
    layer = next(iter(wrapped.morphology.layers))
    wrapped.morphology.germinate(layer, 0, nn.Identity(), kernel="k")
    for state in states:
        wrapped.morphology.transition(layer, 0, state)
    assert_exact(bare, wrapped, x)


@each_case
def test_a_slot_that_is_dormant_again_leaves_no_trace(case: Case) -> None:
    bare, wrapped, x = pair(case)
    layer, host = next(iter(wrapped.morphology.layers.items()))
    wrapped.morphology.germinate(layer, 0, nn.Identity(), kernel="k", source="output")
    with wrapped.morphology.trialling(layer, 0):
        assert type(host).forward is not host.host_class.forward
    for state in (S.TRAINING, S.GRAFTING, S.CULLED, S.DORMANT):
        wrapped.morphology.transition(layer, 0, state)
        if state is S.GRAFTING:
            wrapped.morphology.set_alpha(layer, 0, 0.5)
            assert not torch.equal(run(wrapped, x, "eval"), run(bare, x, "eval"))
    assert_exact(bare, wrapped, x)


def test_twins_share_their_tensors_and_nothing_else() -> None:
    for case in CASES:
        bare = case.seeded()
        again = twin(bare)
        shared = [*bare.state_dict(keep_vars=True).values()]
        assert [id(t) for t in again.state_dict(keep_vars=True).values()] == [*map(id, shared)]
        assert not {id(m) for m in bare.modules()} & {id(m) for m in again.modules()}


LAYERS = st.sampled_from(["linear", "relu", "dropout", "norm", "batchnorm"])


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(LAYERS, min_size=1, max_size=6),
    width=st.integers(1, 5),
    modes=st.lists(st.sampled_from(["train", "eval", "no_grad"]), min_size=1, max_size=4),
    batches=st.lists(st.integers(2, 4), min_size=4, max_size=4),
)
def test_whatever_the_layers_and_the_order_of_modes_the_bits_are_the_same(
    kinds: list[str], width: int, modes: list[str], batches: list[int]
) -> None:
    makers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(width, width),
        "relu": nn.ReLU,
        "dropout": lambda: nn.Dropout(0.3),
        "norm": lambda: nn.LayerNorm(width),
        "batchnorm": lambda: nn.BatchNorm1d(width),
    }
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(width, width), *(makers[kind]() for kind in kinds))
    wrapped = wrapped_copy(bare, torch.randn(2, width))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (bare, wrapped)]
    for mode, batch in zip(modes, batches, strict=False):
        x = torch.randn(batch, width)
        outcomes = []
        for model, optimizer in zip((bare, wrapped), optimizers, strict=True):
            outcomes.append(bits(model, run(model, x, mode)))
            optimizer.step()
        assert_same_bits(*outcomes)
    assert_same_bits([*bare.state_dict().values()], [*wrapped.state_dict().values()])
