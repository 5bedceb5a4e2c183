from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from esper.errors import BadInput, DataError, EntryPointError
from esper.services.tolaria.config import EntryPointConfig, TolariaConfig
from esper.services.tolaria.data import Datasets
from esper.services.tolaria.entrypoints import (
    build_datasets,
    build_model,
    build_objective,
    called,
    check_fit,
    imported,
    make_importable,
)
from esper.services.tolaria.objective import Classification, CustomObjective, Regression
from tests.unit.esper.services.tolaria.sessions import config, datasets

USER = """
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    WIDTH = 6

    def model(width: int = WIDTH, *, outputs: int = 3):
        return nn.Linear(width, outputs)

    class Model(nn.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width, 3)

    def raising(depth=1):
        raise ValueError(f"depth {depth} is\\n too much")

    def number():
        return 7

    def frozen():
        return nn.Linear(2, 2).requires_grad_(False)

    def empty_model():
        return nn.Flatten()

    def data(validation=8, classes=3):
        def split(n):
            return TensorDataset(torch.randn(n, WIDTH), torch.arange(n) % classes)
        return {"train": split(8), "validation": split(validation), "test": split(4)}

    def listed():
        return [1, 2]

    class Away:
        def loss(self, outputs, targets):
            return (outputs - targets).abs().mean()

    away = Away()

    def away_function():
        return Away()

    def plain_loss(outputs, targets):
        return (outputs - targets).abs().mean()

    class Unready:
        def __init__(self):
            raise RuntimeError("no weights for the loss")
"""


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """The user's modules, beside the manifest; a test may write more of them."""
    path, modules = list(sys.path), set(sys.modules)

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    write("mine", USER)
    make_importable(tmp_path)
    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def entry(reference: str, **arguments: Any) -> EntryPointConfig:
    return EntryPointConfig(entrypoint=reference, arguments=arguments)


def session(
    model: EntryPointConfig | None = None,
    data: EntryPointConfig | None = None,
    objective: str = "classification",
) -> TolariaConfig:
    found = config()
    return replace(
        found,
        model=model or found.model,
        data=data or found.data,
        training=replace(found.training, objective=objective),
    )


def refused(error: BadInput, field: str, came: str, allowed: str) -> None:
    """The message names the field, what came and what is allowed, on one line."""
    assert error.field == field
    assert came in str(error.came)
    assert allowed in error.allowed
    assert "\n" not in str(error)


# -- importing and calling ----------------------------------------------------------------------


@pytest.mark.usefixtures("user")
def test_a_function_or_a_class_beside_the_manifest_is_called_with_its_arguments() -> None:
    assert called("spec.model", entry("mine:model", width=4, outputs=2)).out_features == 2
    assert called("spec.model", entry("mine:Model", width=5)).in_features == 5
    assert called("spec.model", entry("torch.nn:Linear", in_features=1, out_features=2))
    assert imported("spec.model.entrypoint", "torch:nn.Linear") is nn.Linear


def test_the_manifests_folder_wins_over_installed_modules(tmp_path: Path) -> None:
    path = list(sys.path)
    try:
        make_importable(tmp_path)
        make_importable(tmp_path / ".." / tmp_path.name)
        assert sys.path[0] == str(tmp_path.resolve())
        assert sys.path.count(str(tmp_path.resolve())) == 1
    finally:
        sys.path[:] = path


CALLS = [
    (entry("nowhere.at_all:f"), "entrypoint", "ModuleNotFoundError", "beside the manifest"),
    (entry("mine:absent"), "entrypoint", "mine:absent", "an attribute of mine: torch, nn"),
    (entry("mine:Model.deeper"), "entrypoint", "mine:Model.deeper", "an attribute of mine"),
    (entry("mine:WIDTH"), "entrypoint", "mine:WIDTH, a int", "a function or a class"),
    (entry("mine:model", depth=3), "arguments", "depth=3", "model(width: int = 6"),
    (entry("mine:Model"), "arguments", "missing a required argument: 'width'", "Model(width"),
    (entry("mine:raising", depth=9), "arguments", "ValueError: depth 9 is too much", "returns"),
    (entry("mine:Model", width="wide"), "arguments", "width='wide'", "returns"),
]


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(("point", "field", "came", "allowed"), CALLS)
def test_an_entry_point_that_cannot_be_called_is_refused(
    point: EntryPointConfig, field: str, came: str, allowed: str
) -> None:
    with pytest.raises(EntryPointError) as caught:
        called("spec.model", point)
    refused(caught.value, f"spec.model.{field}", came, allowed)


RAISING = {
    "raises": ("raise RuntimeError('bad\\nday')", "RuntimeError: bad day"),
    "broken": ("def f(:", "SyntaxError"),
    "missing": ("import not_installed_anywhere", "not_installed_anywhere"),
    "exits": ("import sys\nsys.exit(2)", "SystemExit: 2"),
}


@pytest.mark.parametrize("name", RAISING)
def test_a_module_that_does_not_import_is_refused_with_its_reason(
    user: Callable[[str, str], None], name: str
) -> None:
    source, came = RAISING[name]
    user(f"user_{name}", source)
    with pytest.raises(EntryPointError) as caught:
        called("spec.data", entry(f"user_{name}:f"))
    refused(caught.value, "spec.data.entrypoint", came, "module.path:attribute")
    assert caught.value.__cause__ is not None


def test_a_refusal_from_inside_the_entry_point_passes_as_it_is(
    user: Callable[[str, str], None],
) -> None:
    user(
        "refusing", "from esper.errors import DataError\ndef f():\n    raise DataError('a','b','c')"
    )
    with pytest.raises(DataError, match="a: got b; allowed: c"):
        called("spec.data", entry("refusing:f"))


def test_a_callable_without_a_signature_speaks_for_itself() -> None:
    # dict.fromkeys and the like have none that Python can read, or take what comes.
    assert called("spec.data", entry("builtins:dict", a=1)) == {"a": 1}
    with pytest.raises(EntryPointError) as caught:
        called("spec.data", entry("builtins:iter", a=1))
    assert caught.value.field == "spec.data.arguments"


# -- the model ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("user")
def test_the_model_is_drawn_from_the_sessions_seed() -> None:
    one, same = (build_model(session(entry("mine:model"))) for _ in range(2))
    assert torch.equal(one.weight, same.weight)
    other = session(entry("mine:model"))
    other = replace(other, training=replace(other.training, seed=1))
    assert not torch.equal(build_model(other).weight, one.weight)


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(
    ("reference", "came", "allowed"),
    [
        ("mine:number", "mine:number -> int", "returns an nn.Module"),
        ("mine:frozen", "Linear without trainable parameters", "at least one parameter"),
        ("mine:empty_model", "Flatten without trainable parameters", "at least one parameter"),
    ],
)
def test_what_is_no_trainable_model_is_refused(reference: str, came: str, allowed: str) -> None:
    with pytest.raises(EntryPointError) as caught:
        build_model(session(entry(reference)))
    refused(caught.value, "spec.model.entrypoint", came, allowed)


# -- the data -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("user")
def test_the_data_are_drawn_from_the_sessions_seed() -> None:
    one, same = (build_datasets(session(data=entry("mine:data"))) for _ in range(2))
    assert torch.equal(one.train.tensors[0], same.train.tensors[0])
    assert len(one.validation) == 8


@pytest.mark.usefixtures("user")
def test_an_empty_validation_set_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        build_datasets(session(data=entry("mine:data", validation=0)))
    refused(caught.value, "data.validation", "0 samples", "at least 4, not an empty set")


@pytest.mark.usefixtures("user")
def test_something_else_than_datasets_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        build_datasets(session(data=entry("mine:listed")))
    refused(caught.value, "spec.data.entrypoint", "list", "train, validation and test")


# -- the objective ------------------------------------------------------------------------------


def test_the_named_objectives() -> None:
    assert isinstance(build_objective(session(), datasets()), Classification)
    targets = torch.tensor([0.0, 2.0, 4.0, 6.0])
    sets = Datasets(*[TensorDataset(torch.zeros(4, 1), targets)] * 3)
    found = build_objective(session(objective="regression"), sets)
    assert isinstance(found, Regression)
    # The variance of the targets is 5, so an error of 5 squared explains nothing.
    assert found.metric_sum(targets + 5**0.5, targets) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("name", ["Away", "away", "away_function"])
def test_an_objective_of_ones_own_is_an_object_a_class_or_a_function(name: str) -> None:
    found = build_objective(session(objective=f"mine:{name}"), datasets())
    assert isinstance(found, CustomObjective)
    assert float(found.loss(torch.ones(2), torch.zeros(2))) == 1.0


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(
    ("name", "came"),
    [
        ("absent", "mine:absent"),
        ("WIDTH", "mine:WIDTH -> int"),
        ("number", "mine:number -> int"),
        ("plain_loss", "missing 2 required positional arguments"),
        ("Unready", "RuntimeError: no weights for the loss"),
    ],
)
def test_what_is_no_objective_is_refused(name: str, came: str) -> None:
    with pytest.raises(EntryPointError) as caught:
        build_objective(session(objective=f"mine:{name}"), datasets())
    assert caught.value.field == "spec.training.objective"
    assert came in str(caught.value.came)
    assert "\n" not in str(caught.value)


# -- fitting together ---------------------------------------------------------------------------


def sets(inputs: Tensor, targets: Tensor, **other: TensorDataset) -> Datasets:
    same = TensorDataset(inputs, targets)
    return Datasets(**{"train": same, "validation": same, "test": same} | other)


FEATURES, LABELS = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
OTHER = TensorDataset(torch.randn(4, 5), LABELS)


class Listing(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return [super().forward(x)]


def linear() -> nn.Module:
    return nn.Linear(6, 3)


FITS = [
    (linear, sets(torch.randn(4, 7), LABELS), "data.train", "inputs [2, 7]", "that Linear takes"),
    (linear, sets(FEATURES, LABELS, validation=OTHER), "data.validation", "[2, 5]", "a shape"),
    (linear, sets(FEATURES, LABELS, test=OTHER), "data.test", "[2, 5]", "a shape that"),
    (linear, sets(FEATURES.double(), LABELS), "data.train", "RuntimeError", "a shape that"),
    (linear, sets(FEATURES, LABELS + 7), "data.train", "out of bounds", "targets that fit"),
    (linear, sets(FEATURES, LABELS - 9), "data.train", "out of bounds", "targets that fit"),
    (linear, sets(FEATURES, LABELS.float()), "data.train", "outputs [2, 3]", "targets that fit"),
    (linear, sets(FEATURES, torch.rand(4, 3)), "data.train", "targets [2, 3]", "targets that fit"),
    (lambda: Listing(6, 3), sets(FEATURES, LABELS), "spec.model.entrypoint", "a list", "tensor"),
]


@pytest.mark.parametrize(("make", "given", "field", "came", "allowed"), FITS)
def test_data_that_model_or_objective_refuse(
    make: Callable[[], nn.Module], given: Datasets, field: str, came: str, allowed: str
) -> None:
    with pytest.raises(DataError) as caught:
        check_fit(make(), given, Classification())
    refused(caught.value, field, came, allowed)


def test_samples_that_do_not_stack_are_refused() -> None:
    uneven = [(torch.zeros(2), 0), (torch.zeros(3), 1)] * 3
    with pytest.raises(DataError) as caught:
        check_fit(linear(), Datasets(uneven, uneven, uneven), Classification())
    refused(caught.value, "data.train", "RuntimeError", "samples of equal shapes")


def test_regression_targets_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        check_fit(linear(), sets(FEATURES, torch.rand(4)), Regression(1.0))
    refused(caught.value, "data.train", "targets [2] for outputs [2, 3]", "targets that fit")


def test_a_loss_that_is_no_number_or_a_metric_that_fails_is_refused() -> None:
    class PerSample:
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.sum(dim=1)

    class Unmeasured:
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.mean()

        def metric(self, outputs: Tensor, targets: Tensor) -> float:
            raise ZeroDivisionError("nothing to divide by")

    for user, came in ((PerSample(), "[2]"), (Unmeasured(), "nothing to divide by")):
        with pytest.raises(DataError) as caught:
            check_fit(linear(), sets(FEATURES, LABELS), CustomObjective(user, "mine:x"))
        assert came in str(caught.value.came)


def test_a_fit_gives_the_first_batch_and_takes_tuples_and_dicts() -> None:
    inputs, targets = check_fit(linear(), sets(FEATURES, LABELS), Classification())
    assert torch.equal(inputs, FEATURES[:2])
    assert targets.tolist() == [0, 1]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.head(a + b)
            return out

    pairs = [((torch.ones(2), torch.zeros(2)), 1)] * 4
    named = [({"a": torch.ones(2), "b": torch.zeros(2)}, 1)] * 4
    for samples in (pairs, named):
        found, _ = check_fit(Two(), Datasets(samples, samples, samples), Classification())
        assert len(found) == 2
    wrong = [({"c": torch.ones(2)}, 1)] * 4
    with pytest.raises(DataError, match=r"inputs c \[2, 2\]"):
        check_fit(Two(), Datasets(wrong, wrong, wrong), Classification())


def test_nothing_of_the_model_or_the_streams_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = [tensor.clone() for tensor in model.state_dict().values()]
    state = torch.get_rng_state()
    check_fit(model, sets(FEATURES, LABELS), Classification())
    assert [module.training for module in model.modules()] == modes
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
