"""Seeds that read the producer's input, and kernels that come from the cache."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from torch import nn

from esper.contracts.blueprints import BlueprintDocument, Graph
from esper.contracts.kernels import KernelMetadata
from esper.core import wrap
from esper.errors import KernelError
from esper.execution.kasmina_layer import Tap
from esper.execution.kernel_cache import KernelCache
from esper.execution.state_layout import SeedLifecycleState as S
from esper.services.tezzeret.compiler import compile_kernel

GRAFTING = (S.TRAINING, S.GRAFTING)
FOSSIL = (S.TRAINING, S.GRAFTING, S.FOSSILIZED)


def linear_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return bare, wrap(bare, torch.randn(2, 5), copy=True)


def grow(wrapped, layer: str, seed: nn.Module, states=(), **arguments) -> None:
    wrapped.morphology.germinate(layer, 0, seed, kernel="test", **arguments)
    for state in states:
        wrapped.morphology.transition(layer, 0, state)


class ReadsProducer(nn.Module):
    """A widening by `units`: like the producer, its activation, like the consumer."""

    def __init__(self, inputs: int, units: int, outputs: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(inputs, units), nn.Linear(units, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.columns(torch.relu(self.rows(x)))


@pytest.mark.parametrize("states", [GRAFTING, FOSSIL])
def test_a_widening_seed_reads_the_producers_input(states) -> None:
    bare, wrapped = linear_pair()
    seed = ReadsProducer(5, 7, 3)
    grow(wrapped, "2", seed, states, source="producer")
    if states == GRAFTING:
        wrapped.morphology.set_alpha("2", 0, 1.0)
    x = torch.randn(4, 5)
    assert torch.equal(wrapped(x), bare(x) + seed(x))
    tap = wrapped[0].live[0]
    assert isinstance(tap, Tap)
    assert tap.kept is x, "until the next forward: checkpointing runs the consumer twice"


def test_the_producer_keeps_nothing_unless_a_consumer_asks() -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "2", ReadsProducer(5, 7, 3), (S.TRAINING,), source="producer")
    assert wrapped[0].live == ()
    with wrapped.morphology.trialling("2", 0):
        assert len(wrapped[0].live) == 1
    assert wrapped[0].live == ()
    with wrapped.morphology.trialling("2", 0), wrapped.morphology.without("2", 0):
        assert wrapped[0].live == ()


def test_a_producer_with_a_seed_of_its_own_still_feeds_its_consumer() -> None:
    bare, wrapped = linear_pair()
    own, widening = nn.Linear(5, 4), ReadsProducer(5, 7, 3)
    grow(wrapped, "2", widening, FOSSIL, source="producer")
    grow(wrapped, "0", own, FOSSIL)
    x = torch.randn(4, 5)
    hidden = torch.relu(bare[0](x) + own(x))
    assert torch.equal(wrapped(x), bare[2](hidden) + widening(x))
    with wrapped.morphology.without("0", 0):
        assert torch.equal(wrapped(x), bare(x) + widening(x))


def test_a_consumer_that_runs_before_its_producer_says_so() -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "2", ReadsProducer(5, 7, 3), FOSSIL, source="producer")
    with pytest.raises(KernelError, match="before the producer"):
        wrapped[2](torch.randn(4, 4))


def test_loading_a_kernel_takes_it_from_the_cache_with_the_seeds_own_weights() -> None:
    bare, wrapped = linear_pair()
    artifact, metadata, kernel = compiled(wrapped.morphology.target("0"))

    class Shelf:
        async def metadata(self, kernel_id: str) -> KernelMetadata:
            return metadata

        async def artifact(self, kernel_id: str) -> bytes:
            return artifact

    layer = wrapped.morphology.layers["0"]
    asyncio.run(layer.load_kernel(0, kernel, KernelCache(Shelf()), generator_seed=3))
    assert wrapped.morphology.record("0", 0).kernel == kernel
    assert isinstance(wrapped.morphology.seed_graph("0", 0), Graph)
    x = torch.randn(3, 5)
    with wrapped.morphology.trialling("0", 0):
        assert torch.equal(wrapped(x), bare(x))


def compiled(target):
    """A kernel that is zero at birth, compiled for `target`, as (bytes, metadata, id)."""
    document = BlueprintDocument.model_validate(
        {
            "name": "double",
            "hosts": ["Linear"],
            "graph": {
                "nodes": [
                    {"op": "input", "id": "x"},
                    {"op": "linear", "id": "y", "input": "x", "features": "out", "init": "zero"},
                ],
                "output": "y",
            },
        }
    )
    artifact = compile_kernel(document, target)
    return artifact.data, artifact.metadata, artifact.metadata.kernel


def test_an_input_kept_from_a_forward_cut_short_does_not_travel_with_copies() -> None:
    _, wrapped = linear_pair()
    seed = ReadsProducer(5, 7, 3)
    names = list(wrapped.morphology.layers)
    grow(wrapped, names[-1], seed, FOSSIL, source="producer")
    x = torch.randn(2, 5, requires_grad=True)
    wrapped.morphology.layers[names[0]](x * 2)
    again = copy.deepcopy(wrapped)
    assert torch.equal(again(x), wrapped(x))
