"""What learns: the host's optimiser, one for every seed on trial, and their state as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper.core.model_wrapper import MorphableModel
from esper.services.tolaria import optimization
from esper.services.tolaria.config import OptimizerConfig

Site = tuple[str, int]


class Learning:
    """The optimisers over a wrapped model and the seeds in it.

    `host` has the model's own parameters and, as a group each, those of fossilised seeds; `seeds`
    has by site the seeds that are in training or grafting.
    """

    def __init__(self, config: OptimizerConfig, model: MorphableModel) -> None:
        self._config = config
        self._model = model
        self._groups: list[list[str]] = [[name for name, _ in model.named_parameters()]]
        self.host = self._made(self._named(self._groups[0]))
        self.seeds: dict[Site, torch.optim.Optimizer] = {}

    def start(self, site: Site) -> None:
        """Give a seed its own optimiser."""
        parameters = self._model.morphology.seed_parameters(*site)
        if parameters:
            self.seeds[site] = self._made(parameters)

    def stop(self, site: Site) -> None:
        """Forget a seed's optimiser."""
        self.seeds.pop(site, None)

    def adopt(self, site: Site) -> None:
        """Move a fossilised seed's parameters and moments into the host's optimiser."""
        optimizer = self.seeds.pop(site, None)
        if optimizer is not None:
            optimization.adopt(self.host, optimizer)
            wanted = {id(p) for p in self._model.morphology.seed_parameters(*site)}
            self._groups.append(
                [name for name, p in self._model.named_parameters() if id(p) in wanted]
            )

    def host_parameters(self) -> list[nn.Parameter]:
        """What the host's optimiser steps."""
        return parameters_of(self.host)

    def seed_parameters(self) -> list[nn.Parameter]:
        """What the seeds' optimisers step, in the order in which they started."""
        return [p for optimizer in self.seeds.values() for p in parameters_of(optimizer)]

    def set_rate(self, rate: float) -> None:
        """Give the host the learning rate `rate`, and seeds theirs in proportion."""
        optimization.set_learning_rate(self.host, rate)
        for optimizer in self.seeds.values():
            optimization.set_learning_rate(optimizer, rate * optimization.SEED_RATE)

    def tensors(self) -> dict[str, Tensor]:
        """The optimisers' state; names tell the host's from the seeds'."""
        names = self._names()
        found = {}
        for name, tensor in optimization.optimizer_tensors(self.host, names).items():
            found[f"host/{name}"] = tensor
        for optimizer in self.seeds.values():
            for name, tensor in optimization.optimizer_tensors(optimizer, names).items():
                found[f"seeds/{name}"] = tensor
        return found

    def to_state(self) -> dict[str, Any]:
        """Which parameters each optimiser has, JSON-ready."""
        return {
            "hostGroups": [list(group) for group in self._groups],
            "seedOptimizers": [list(site) for site in self.seeds],
        }

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from `to_state` and `tensors`; the model has the structure of then."""
        self._groups = [list(group) for group in state["hostGroups"]]
        self.host = self._made(self._named(self._groups[0]))
        for group in self._groups[1:]:
            self.host.add_param_group({"params": self._named(group)})
        names = self._names()
        self._load(self.host, "host/", tensors, names)
        self.seeds = {}
        for layer, slot in state["seedOptimizers"]:
            self.start((layer, slot))
            self._load(self.seeds[layer, slot], "seeds/", tensors, names)

    def _load(
        self,
        optimizer: torch.optim.Optimizer,
        prefix: str,
        tensors: dict[str, Tensor],
        names: dict[int, str],
    ) -> None:
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        optimization.load_optimizer_tensors(optimizer, own, names)

    def _made(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return optimization.make_optimizer(self._config, parameters, self._config.learning_rate)

    def _named(self, names: list[str]) -> list[nn.Parameter]:
        by_name = dict(self._model.named_parameters())
        return [by_name[name] for name in names]

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self._model.named_parameters()}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimiser, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]
