from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esper.services.tolaria.config import OptimizerConfig, ScheduleConfig
from esper.services.tolaria.optimization import (
    adopt,
    learning_rate_share,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
    step,
)
from tests.unit.esper.services.tolaria.sessions import config

OPTIMIZERS = [("adamw", 0.0), ("adam", 0.0), ("rmsprop", 0.0), ("rmsprop", 0.9)]
OPTIMIZERS += [("sgd", 0.0), ("sgd", 0.9)]
every_optimizer = pytest.mark.parametrize(("name", "momentum"), OPTIMIZERS)


def optimizer_config(name: str = "adamw", momentum: float = 0.0, **rest: Any) -> OptimizerConfig:
    return replace(config().training.optimizer, name=name, momentum=momentum, **rest)


def schedule(name: str, **rest: Any) -> ScheduleConfig:
    return replace(config().training.schedule, name=name, **rest)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0
) -> list[Tensor]:
    """The parameters after `steps` steps on batches that depend on their number alone."""
    for number in range(first, first + steps):
        inputs = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(number))
        model(inputs).square().mean().backward()
        step(optimizer, list(model.parameters()), 1.0)
    return [parameter.detach().clone() for parameter in model.parameters()]


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


# -- making -------------------------------------------------------------------------------------


@every_optimizer
def test_the_optimizer_is_the_configured_one_and_fused_where_torch_can(
    name: str, momentum: float
) -> None:
    settings = optimizer_config(name, momentum, weight_decay=0.01, betas=(0.8, 0.99))
    made = make_optimizer(settings, network().parameters(), 0.3)
    classes = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "rmsprop": torch.optim.RMSprop,
        "sgd": torch.optim.SGD,
    }
    assert type(made) is classes[name]
    group = made.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.01)
    # RMSprop has no fused form in torch.
    assert group.get("fused") is (None if name == "rmsprop" else True)
    if name.startswith("adam"):
        assert group["betas"] == (0.8, 0.99)
    else:
        assert group["momentum"] == momentum


@every_optimizer
def test_the_optimizer_lowers_a_loss(name: str, momentum: float) -> None:
    model = network()
    inputs = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    optimizer = make_optimizer(optimizer_config(name, momentum), model.parameters(), 0.001)
    before = float(model(inputs).square().mean().detach())
    trained(model, optimizer, 20)
    assert float(model(inputs).square().mean().detach()) < before


@every_optimizer
def test_the_fused_form_agrees_with_the_plain_one(name: str, momentum: float) -> None:
    settings = optimizer_config(name, momentum, weight_decay=0.1)
    model, twin = network(), network()
    fused = make_optimizer(settings, model.parameters(), 0.05)
    plain_settings = {k: v for k, v in fused.defaults.items() if k not in ("fused", "foreach")}
    plain_settings.pop("decoupled_weight_decay", None)
    plain = type(fused)(twin.parameters(), **plain_settings, foreach=False)
    for ours, theirs in zip(trained(model, fused, 5), trained(twin, plain, 5), strict=True):
        torch.testing.assert_close(ours, theirs)


# -- the learning rate --------------------------------------------------------------------------

COSINE = schedule("cosine", final_share=0.1)
SHARES = [
    (schedule("constant"), 10, [1.0] * 10),
    (schedule("constant", warmup_epochs=3), 5, [0.25, 0.5, 0.75, 1.0, 1.0]),
    (schedule("linear", final_share=0.2), 5, [1.0, 0.8, 0.6, 0.4, 0.2]),
    (schedule("linear", final_share=0.0, warmup_epochs=1), 4, [0.5, 1.0, 0.5, 0.0]),
    (COSINE, 3, [1.0, 0.55, 0.1]),
    (COSINE, 1, [1.0]),
    (schedule("cosine", final_share=0.5, warmup_epochs=2), 3, [1 / 3, 2 / 3, 1.0]),
    (schedule("cosine", warmup_epochs=2), 2, [1 / 3, 2 / 3]),
    (
        schedule("step", step_epochs=2, step_factor=0.1, warmup_epochs=1),
        6,
        [0.5, 1.0, 1.0, 0.1, 0.1, 0.01],
    ),
]


@pytest.mark.parametrize(("course", "epochs", "expected"), SHARES)
def test_schedules(course: ScheduleConfig, epochs: int, expected: list[float]) -> None:
    shares = [learning_rate_share(course, epoch, epochs) for epoch in range(1, epochs + 1)]
    assert shares == pytest.approx(expected)


@given(
    st.sampled_from(["constant", "cosine", "linear", "step"]),
    st.integers(1, 60),
    st.integers(0, 10),
    st.floats(0, 1),
    st.integers(1, 20),
    st.floats(0.01, 1),
)
def test_a_share_lies_between_zero_and_one_and_falls_after_the_warm_up(
    name: str, epochs: int, warmup: int, final: float, step_epochs: int, factor: float
) -> None:
    course = ScheduleConfig(
        name=name,
        warmup_epochs=warmup,
        final_share=final,
        step_epochs=step_epochs,
        step_factor=factor,
    )
    shares = [learning_rate_share(course, epoch, epochs) for epoch in range(1, epochs + 1)]
    assert all(0 <= share <= 1 + 1e-12 for share in shares)
    warm, rest = shares[:warmup], shares[warmup:]
    assert warm == sorted(warm)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rest))
    if rest:
        assert rest[0] == pytest.approx(1.0)
    if len(rest) > 1 and name in ("cosine", "linear"):
        assert rest[-1] == pytest.approx(final)


def test_the_rate_is_set_in_every_group() -> None:
    model = network()
    optimizer = make_optimizer(optimizer_config(), model[0].parameters(), 0.1)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    set_learning_rate(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]


# -- a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "moved"), [(None, 5.0), (1.0, 1.0), (50.0, 5.0)])
def test_a_step_clips_to_the_norm_and_drops_the_gradients(
    limit: float | None, moved: float
) -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = make_optimizer(optimizer_config("sgd"), parameters, 1.0)
    for parameter, slope in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([slope])
    step(optimizer, parameters, limit)
    assert math.hypot(*(float(p.detach()) for p in parameters)) == pytest.approx(moved, rel=1e-5)
    assert all(parameter.grad is None for parameter in parameters)


# -- adopting -----------------------------------------------------------------------------------


@every_optimizer
def test_adoption_keeps_every_moment_to_the_bit_and_the_course_of_training(
    name: str, momentum: float
) -> None:
    settings = optimizer_config(name, momentum)
    host_model, seed_model = network(), network()
    host = make_optimizer(settings, host_model.parameters(), 0.01)
    seed = make_optimizer(settings, seed_model.parameters(), 0.01)
    trained(host_model, host, 2)
    trained(seed_model, seed, 3)
    alone_model = copy.deepcopy(seed_model)
    alone = make_optimizer(settings, alone_model.parameters(), 0.01)
    names = names_of(seed_model)
    load_optimizer_tensors(alone, optimizer_tensors(seed, names), names_of(alone_model))
    before = {key: value.clone() for key, value in optimizer_tensors(seed, names).items()}

    adopt(host, seed)

    assert len(host.param_groups) == 2
    moved = {id(p): name for name, p in seed_model.named_parameters()}
    after = optimizer_tensors(host, moved | {id(p): f"host.{n}" for n, p in _named(host_model)})
    assert all(torch.equal(after[key], value) for key, value in before.items())
    set_learning_rate(host, 0.01)
    continued = trained(seed_model, host, 3, first=3)
    alone_continued = trained(alone_model, alone, 3, first=3)
    for ours, theirs in zip(continued, alone_continued, strict=True):
        assert torch.equal(ours, theirs)


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def test_a_seed_that_never_stepped_is_adopted_without_moments() -> None:
    host_model, seed_model = network(), network()
    host = make_optimizer(optimizer_config(), host_model.parameters(), 0.01)
    adopt(host, make_optimizer(optimizer_config(), seed_model.parameters(), 0.02))
    assert len(host.param_groups) == 2
    assert not host.state
    assert len(trained(seed_model, host, 1)) == 4


def test_a_seed_without_parameters_leaves_the_host_alone() -> None:
    host = make_optimizer(optimizer_config(), network().parameters(), 0.01)
    seed = make_optimizer(optimizer_config(), network().parameters(), 0.01)
    seed.param_groups[0]["params"] = []
    adopt(host, seed)
    assert len(host.param_groups) == 1


# -- state as tensors ---------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_state_round_trips_and_training_goes_on_to_the_bit(
    name: str, momentum: float, layout: torch.memory_format
) -> None:
    settings = optimizer_config(name, momentum, weight_decay=0.01)
    model = network().to(memory_format=layout)
    optimizer = make_optimizer(settings, model.parameters(), 0.01)
    trained(model, optimizer, 3)
    kept = copy.deepcopy(model)
    # What a file gives back is contiguous, whatever the parameter's own layout is.
    tensors = {
        key: value.clone().contiguous()
        for key, value in optimizer_tensors(optimizer, names_of(model)).items()
    }
    restored = make_optimizer(settings, kept.parameters(), 0.01)
    load_optimizer_tensors(restored, tensors, names_of(kept))
    again = optimizer_tensors(restored, names_of(kept))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    for ours, theirs in zip(
        trained(kept, restored, 3, first=3), trained(model, optimizer, 3, first=3), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_loading_copies_and_forgets_what_was_there() -> None:
    model = network()
    optimizer = make_optimizer(optimizer_config(), model.parameters(), 0.01)
    trained(model, optimizer, 1)
    tensors = optimizer_tensors(optimizer, names_of(model))
    kept = {key: value.clone() for key, value in tensors.items()}
    load_optimizer_tensors(optimizer, dict(kept), names_of(model))
    trained(model, optimizer, 1)
    fresh = optimizer_tensors(optimizer, names_of(model))
    assert not torch.equal(fresh["0.weight::exp_avg"], kept["0.weight::exp_avg"])
    load_optimizer_tensors(optimizer, {}, names_of(model))
    assert not optimizer.state


def test_names_with_dots_and_colons_keep_their_state() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(optimizer_config(), [parameter], 0.1)
    parameter.grad = torch.ones(2)
    step(optimizer, [parameter], None)
    names = {id(parameter): "blocks.0.grown.1::odd.weight"}
    tensors = optimizer_tensors(optimizer, names)
    load_optimizer_tensors(optimizer, tensors, names)
    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
