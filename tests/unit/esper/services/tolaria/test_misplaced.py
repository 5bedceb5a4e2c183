"""Blueprints that would mix samples, or show a model what it predicts, are no candidates."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from esper.contracts.blueprints import lower
from esper.core import wrap
from esper.errors import BlueprintError
from esper.execution.builders import build
from esper.services.tolaria.data import Datasets
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.growth import Growth, refuse_misfit
from esper.services.tolaria.objective import Classification
from esper.services.tolaria.seeds import SeedBook
from tests.unit.esper.services.tolaria.sessions import BuiltHere, config, documents

NAMES = ("bottleneck-mlp", "squeeze-excitation", "attention")


class TimeFirst(nn.Module):
    """A classifier whose first layer reads sequences time first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(x.transpose(0, 1))).mean(0))


def test_they_are_no_candidates_and_the_reason_is_told() -> None:
    data = TensorDataset(torch.randn(12, 5, 6), torch.arange(12) % 3)
    model = wrap(TimeFirst(), data.tensors[0][:2])
    settings = config()
    engine = Engine(settings, model, Datasets(data, data, data), Classification(), SeedBook())
    growth = Growth(
        settings, engine, documents(*NAMES), BuiltHere(), lambda _: None, lambda *_: None
    )
    found = {(one.layer, one.blueprint) for one in growth.candidates}
    assert found == {("layer", "bottleneck-mlp"), ("head", "bottleneck-mlp")}
    (mixer,) = documents("attention")
    with pytest.raises(BlueprintError, match="another dimension than the batch in front"):
        refuse_misfit(mixer, model.morphology, builtin=False)
    refuse_misfit(mixer, model.morphology, builtin=True)


def test_the_layer_itself_refuses_them_too() -> None:
    model = wrap(TimeFirst(), torch.randn(2, 5, 6))
    layer = model.morphology.layers["layer"]
    for document in documents("attention", "bottleneck-mlp"):
        graph = lower(document, model.morphology.target("layer"))
        module = build(graph, model.morphology.target("layer"), generator_seed=0)
        if document.name == "attention":
            with pytest.raises(BlueprintError, match="another dimension than the batch in front"):
                layer.germinate(0, module, kernel="k", graph=graph)
        else:
            layer.germinate(0, module, kernel="k", graph=graph)
    again = pickle.loads(pickle.dumps(model)).morphology.layers["layer"]
    with pytest.raises(BlueprintError):
        again.site.admit(lower(documents("attention")[0], model.morphology.target("layer")))
