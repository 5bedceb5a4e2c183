"""What only a GPU can show: a dormant model makes the host wait for nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.execution_grafting import COMPARED, grafted_model, host_of, shadow_step
from benchmarks.execution_models import CASES, CLASSES, Case
from benchmarks.execution_running import running, step
from benchmarks.gpu import waits_in
from esper.core import wrap
from esper.core.model_wrapper import MorphableModel
from esper.execution import probes
from esper.execution.staging import Staging, take
from esper.execution.state_layout import KasminaStateLayout
from esper.execution.state_layout import SeedLifecycleState as S

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA device"),
]

BATCH = 8
BUSY_CYCLES = 2_000_000_000
"""About a second of a GPU's time."""

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_way = pytest.mark.parametrize("way", ["forward", "step"])


@pytest.fixture
def waiting_forbidden() -> Iterator[object]:
    """Inside `torch.cuda.set_sync_debug_mode("error")`, once the test asks for it."""

    def forbid() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield forbid
    torch.cuda.set_sync_debug_mode("default")


def pair(case: Case) -> tuple[nn.Module, MorphableModel, Tensor]:
    bare, x = case.seeded().to("cuda"), case.inputs(BATCH).to("cuda")
    return bare, wrap(bare, x, seeds_per_layer=100, copy=True), x


@each_case
@each_way
def test_a_dormant_forward_makes_the_host_wait_for_nothing(case: Case, way: str) -> None:
    _, wrapped, x = pair(case)
    with running(way, {"dormant": wrapped}):
        assert waits_in(lambda: wrapped(x)) == []


def test_the_profiler_sees_a_wait_where_there_is_one() -> None:
    x = torch.ones(3, device="cuda")
    assert waits_in(lambda: x.sum().item())
    assert waits_in(torch.cuda.synchronize)


@each_case
def test_a_dormant_training_step_waits_for_nothing(case: Case, waiting_forbidden) -> None:
    _, wrapped, x = pair(case)
    wrapped.train()
    run = step(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-3), x)
    run()
    waiting_forbidden()
    run()


@pytest.mark.parametrize(("blueprint", "kind"), COMPARED, ids="-".join)
def test_a_grafted_training_step_waits_for_nothing(
    blueprint: str, kind: str, waiting_forbidden
) -> None:
    bare, x = host_of(blueprint, kind, BATCH, "cuda")
    wrapped = grafted_model(bare, x, blueprint)
    wrapped.train()
    run = step(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-3), x)
    run()
    waiting_forbidden()
    run()


@each_case
def test_the_gradients_for_a_probe_are_summed_without_waiting(
    case: Case, waiting_forbidden
) -> None:
    _, wrapped, x = pair(case)
    targets = torch.arange(BATCH, device="cuda") % CLASSES
    F.cross_entropy(wrapped(x).flatten(1), targets).backward()
    layers = wrapped.morphology.layers
    probes.gradient_sums(layers)
    waiting_forbidden()
    sums = probes.gradient_sums(layers)
    assert sums is not None
    assert sums.values.is_cuda


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_outputs_are_the_bare_models_bits(case: Case, dtype: torch.dtype) -> None:
    bare, wrapped, x = pair(case)
    with (
        running("forward", {"bare": bare, "dormant": wrapped}),
        torch.autocast("cuda", dtype, enabled=dtype is not torch.float32),
    ):
        assert torch.equal(bare(x), wrapped(x))


def test_the_layout_goes_where_the_model_goes() -> None:
    case = CASES[0]
    wrapped = wrap(case.seeded(), case.inputs(BATCH))
    layer = next(iter(wrapped.morphology.layers))
    wrapped.morphology.germinate(layer, 0, nn.Identity(), kernel="k")
    for state in (S.TRAINING, S.GRAFTING):
        wrapped.morphology.transition(layer, 0, state)
    wrapped.morphology.set_alpha(layer, 0, 0.5)
    x = case.inputs(BATCH)
    before = wrapped(x)
    wrapped.to("cuda")
    tensors = wrapped.morphology.layout.tensors()
    assert set(tensors) == set(KasminaStateLayout.TENSORS)
    assert all(tensor.is_cuda for tensor in tensors.values())
    torch.testing.assert_close(wrapped(x.to("cuda")).cpu(), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(wrapped.cpu()(x), before)


def test_a_shadow_pass_leaves_the_hosts_random_stream_and_gradients() -> None:
    case = next(case for case in CASES if case.name == "transformer")
    _, wrapped, x = pair(case)
    layer = list(wrapped.morphology.layers)[-1]
    host = wrapped.morphology.layers[layer]
    assert isinstance(host, nn.Linear)
    seed = nn.Linear(host.in_features, host.out_features).to("cuda")
    wrapped.morphology.germinate(layer, 0, seed, kernel="k")
    wrapped.morphology.transition(layer, 0, S.TRAINING)
    wrapped.train()
    before, weights = torch.cuda.get_rng_state(), seed.weight.detach().clone()
    shadow_step(wrapped, layer, x)()
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert not torch.equal(seed.weight, weights)
    assert all(p.grad is None for p in wrapped.parameters())


def test_fixed_weights_arrive_while_the_training_stream_is_busy() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    # Two pieces and a half through the buffers.
    staging, fixed = Staging(device, chunk_bytes=4096), torch.randn(2560)
    staging.copy({"fixed": fixed})[1].synchronize()
    training = torch.cuda.current_stream()
    torch.cuda._sleep(BUSY_CYCLES)
    landed, arrival = staging.copy({"fixed": fixed})
    arrival.synchronize()
    assert not training.query()
    take(landed, arrival)
    assert torch.equal(landed["fixed"].cpu(), fixed)
