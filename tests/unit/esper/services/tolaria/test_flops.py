from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from esper.services.tolaria.distribution import Alone, Ranks
from esper.services.tolaria.flops import FlopMeter
from tests.ranks import run_ranks


def test_two_per_multiply_add_forward_and_backward() -> None:
    meter = FlopMeter()
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    with meter.counting("forward"):
        out = layer(x)
    assert meter.total == 2 * 3 * 5 * 7
    with meter.counting("backward"):
        out.sum().backward()
    # One product for the weight's gradient, one for the input's.
    assert meter.total == 3 * (2 * 3 * 5 * 7)
    assert meter.trials == 0


def test_convolutions_count_and_elementwise_work_does_not() -> None:
    meter = FlopMeter()
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 6, 6)
    with meter.counting("convolution"):
        layer(x).relu() + 1
    assert meter.total == 2 * 4 * (3 * 4 * 4) * (2 * 3 * 3)


def test_a_known_kind_of_work_is_counted_without_looking() -> None:
    meter = FlopMeter()
    layer = nn.Linear(2, 2)
    for key in ("a", "a", "b"):
        with meter.counting(key, (1, 2)):
            layer(torch.randn(1, 2))
    assert meter.total == 3 * 8
    with meter.counting("a", (1, 2)):
        pass
    assert meter.total == 4 * 8


def test_work_without_products_is_remembered_as_free() -> None:
    meter = FlopMeter()
    for work in (lambda: None, lambda: nn.Linear(2, 2)(torch.randn(1, 2))):
        with meter.counting("free"):
            work()
    assert meter.total == 0


def test_trials_are_part_of_the_total_and_stand_apart() -> None:
    meter = FlopMeter()
    layer = nn.Linear(2, 2)
    for trial in (False, True, True):
        with meter.counting("work", trial=trial):
            layer(torch.randn(1, 2))
    assert (meter.total, meter.trials) == (24, 16)


def test_what_is_known_goes_on_in_another_meter() -> None:
    first, second = FlopMeter(), FlopMeter()
    with first.counting("a", (1, 2), None):
        nn.Linear(2, 2)(torch.randn(1, 2))
    second.known = json.loads(json.dumps(first.known))
    with second.counting("a", (1, 2), None):
        pass
    assert second.total == first.total == 8
    with second.counting("a", (1, 3), None):
        pass
    assert second.total == 8


def test_only_what_is_counted_anew_runs_eager() -> None:
    entered: list[str] = []

    @contextmanager
    def eager() -> Iterator[None]:
        entered.append("eager")
        yield

    meter = FlopMeter(eager)
    for key in ("a", "a", "b", "a"):
        with meter.counting(key):
            nn.Linear(2, 2)(torch.randn(1, 2))
    assert meter.total == 4 * 8
    assert len(entered) == 2


def test_among_ranks_it_does_not_matter_who_does_a_kind_of_work_first() -> None:
    entered: list[str] = []

    @contextmanager
    def eager() -> Iterator[None]:
        entered.append("eager")
        yield

    meter = FlopMeter(eager, shared=True)
    for _ in range(2):
        for _ in range(3):
            with meter.counting("a"):
                nn.Linear(2, 2)(torch.randn(1, 2))
        assert len(entered) == 3
        meter.settle(Alone())


def works_alone(ranks: Ranks) -> tuple[int, dict[str, int]]:
    """Each rank does a kind of work of its own."""
    meter = FlopMeter(shared=True)
    with meter.counting("work", ranks.rank):
        nn.Linear(2, 2 + ranks.rank)(torch.randn(1, 2))
    meter.settle(ranks)
    meter.settle(ranks)
    return meter.total, meter.known


def test_ranks_know_what_each_others_work_costs() -> None:
    first, second = run_ranks(2, works_alone)
    assert first == second
    assert first[0] == 8 + 12
    assert sorted(first[1].values()) == [8, 12]


def test_work_that_fails_is_neither_counted_nor_remembered() -> None:
    meter = FlopMeter()
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), meter.counting("work"):
        layer(torch.randn(1, 3))
    assert meter.total == 0
    with meter.counting("work"):
        layer(torch.randn(1, 2))
    assert meter.total == 8


NETS = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)), (5, 4)),
    "convolutional": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)),
        (2, 2, 5, 5),
    ),
    "attentive": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4)),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_counting_does_not_change_a_bit_of_the_work(net: str, training: bool) -> None:
    # A resumed run counts afresh what an uninterrupted one remembers.
    def work(meter: FlopMeter) -> list[Tensor]:
        torch.manual_seed(0)
        make, shape = NETS[net]
        model = make().train(training)
        x = torch.randn(*shape)
        with meter.counting("work"):
            if training:
                out = model(x)
                out.square().mean().backward()
            else:
                with torch.no_grad():
                    out = model(x)
        found = [out.detach(), torch.rand(2), *model.buffers()]
        return found + [p.grad for p in model.parameters() if p.grad is not None]

    meter = FlopMeter()
    counted, remembered = work(meter), work(meter)
    # torch has no count for its fused encoder layer, which runs in eval mode without gradients.
    assert meter.total > 0 or (net, training) == ("attentive", False)
    assert len(counted) == len(remembered)
    assert all(map(torch.equal, counted, remembered))


def test_fused_transformer_layers_are_counted_whole_and_padding_is_filled_as_when_watched() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    x, padding = torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    padding[0, 3:] = True
    meter, outputs = FlopMeter(), []
    for _ in range(2):
        with torch.no_grad(), meter.counting("evaluation"):
            outputs.append(encoder(x, src_key_padding_mask=padding))
    # Four projections, the two products of attention, the two layers of 16 units.
    weights, scores = 4 * 8 * 8 + 2 * 8 * 16, 2 * 5 * 8
    assert meter.total == 2 * 2 * 4 * 5 * (weights + scores)
    assert torch.equal(*outputs)
    assert torch.backends.mha.get_fastpath_enabled()
