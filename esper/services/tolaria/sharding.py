"""A model whose parameters and optimiser state are shared out among the ranks: FSDP2.

`fully_shard` (Zhao et al. 2023, "PyTorch FSDP") is given the model's blocks one by one and then the
rest. It knows the parameters it was made with, so seeds stay outside of it, whole on every rank,
and their gradients are averaged beside it. Once a seed has become part of the model, the model is
built anew around it, from a skeleton without weights, and shared out again.

Every forward is a collective: each rank must take part in all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from esper.core.compilation import block_names
from esper.core.model_wrapper import MorphableModel
from esper.core.morphology import ROOT
from esper.errors import ManifestError, one_line
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.state_layout import ACTIVE_STATES
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.model_state import rebuild_seeds
from esper.services.tolaria.parallel import OwnStatistics, Shard, average_gradients


class FullySharded(OwnStatistics):
    """One shard a rank, or logical ones, over a model that FSDP2 shares out.

    Logical shards are cut, and draw, as everywhere; their gradients are reduced by FSDP2, in an
    order of its own.
    """

    joint = True

    def __init__(self, ranks: Ranks, seed: int, count: int) -> None:
        """`count` is a multiple of the number of ranks."""
        super().__init__(ranks, seed, count)
        self._mesh: DeviceMesh | None = None
        self._skeleton: Skeleton | None = None

    def place(self, model: MorphableModel) -> MorphableModel:
        """Share the model out, in place; it has no seeds yet.

        Raises:
            ManifestError: it can't be.
        """
        _refuse_unfit(model)
        super().place(model)
        try:
            self._skeleton = Skeleton(model)
        except Exception as error:
            raise ManifestError(
                "spec.training.sharding",
                f"full with a model that can't be copied: {type(error).__name__}: "
                f"{one_line(str(error))}",
                "none or data, or a model that copy.deepcopy copies",
            ) from error
        self._share_out(model)
        return model

    def placed_anew(self, structure: Sequence[Mapping[str, Any]]) -> MorphableModel:
        """The model with the seeds of `structure`, shared out; its weights mean nothing yet."""
        model = self.whole_model(structure)
        model.morphology.layout.noted = {}
        self._share_out(model)
        return model

    def whole_model(self, structure: Sequence[Mapping[str, Any]]) -> MorphableModel:
        """The model with the seeds of `structure`, not shared out; its weights mean nothing yet."""
        assert self._skeleton is not None, "place comes first"
        model = self._skeleton.revived()
        rebuild_seeds(model, structure)
        return model

    @contextmanager
    def weights_at_hand(self, model: nn.Module) -> Iterator[None]:
        """Inside, every rank has all weights of `model`; all ranks must ask for it together."""
        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()

    @contextmanager
    def computing(self, shard: Shard, number: int, *, final: bool) -> Iterator[None]:
        """Inside, the shard is computed; gradients are reduced with the last before a step."""
        assert self.trained is not None
        last = shard.number % self.own == self.own - 1
        assert isinstance(self.trained.model, FSDPModule)
        self.trained.model.set_requires_gradient_sync(final and last)
        with super().computing(shard, number, final=final):
            yield

    def finish_batch(self, *, final: bool) -> None:
        """Merge the shards' statistics; before a step, average the seeds' gradients."""
        super().finish_batch(final=final)
        if final and self.trained is not None and self.trained.seeds:
            average_gradients(self.ranks, self.trained.seeds)

    def scale(self, shard: Shard) -> float:
        """What a shard's loss counts: FSDP2 takes the mean over ranks, whatever their samples."""
        return shard.share * self.ranks.size

    def _share_out(self, model: MorphableModel) -> None:
        if self._mesh is None:
            device = next(model.parameters()).device
            self._mesh = init_device_mesh(device.type, (self.ranks.size,))
        ignored = set(_parameters_on_trial(model))
        for block in (*_lone_blocks(model), model):
            fully_shard(block, mesh=self._mesh, reshard_after_forward=True, ignored_params=ignored)


class Skeleton:
    """A wrapped model without weights and seeds, from which it can be built anew."""

    def __init__(self, model: MorphableModel) -> None:
        self._device = next(model.parameters()).device
        self._model = copy.deepcopy(model)
        _apply(self._model, lambda tensor: tensor.to("meta"))

    def revived(self) -> MorphableModel:
        """The model, on its device, with room for its weights."""
        model = copy.deepcopy(self._model)
        _apply(model, lambda tensor: torch.empty_like(tensor, device=self._device))
        return model


def _apply(model: nn.Module, change: Any) -> None:
    """Change every parameter and buffer; those that lie at several places stay one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append((module, key))
    # Past the model's own method, which would move its state layout as well.
    nn.Module._apply(model, change)
    for (module, key), *others in places.values():
        for other, name in others:
            setattr(other, name, getattr(module, key))


def _lone_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that share no parameter with the rest of the model, and are no host layers."""
    blocks = []
    for name in block_names(model):
        if name == ROOT:
            continue
        block = model.get_submodule(name)
        inside = {id(module) for module in block.modules()}
        rest = {
            id(parameter)
            for module in model.modules()
            if id(module) not in inside
            for parameter in module.parameters(recurse=False)
        }
        own = {id(parameter) for parameter in block.parameters()}
        if own and not own & rest and not isinstance(block, KasminaLayer):
            blocks.append(block)
    return blocks


def _parameters_on_trial(model: MorphableModel) -> list[nn.Parameter]:
    morphology = model.morphology
    return [
        parameter
        for name, layer in morphology.layers.items()
        for slot in layer.site.branches
        if morphology.state(name, slot) in ACTIVE_STATES
        for parameter in morphology.seed_parameters(name, slot)
    ]


def _refuse_unfit(model: MorphableModel) -> None:
    if isinstance(model, KasminaLayer):
        raise ManifestError(
            "spec.training.sharding", "full", "none or data for a model that is a single layer"
        )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ManifestError(
                "spec.training.sharding",
                f"full with {name}, a scalar",
                "none or data, or parameters of at least one dimension",
            )
        if not parameter.is_contiguous():
            raise ManifestError(
                "spec.training.sharding",
                f"full with {name} in strides {list(parameter.stride())}, channels last say",
                "none or data, or contiguous parameters",
            )
