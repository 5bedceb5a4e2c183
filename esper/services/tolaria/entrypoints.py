"""The user's own code: imported, called, and its result checked, with one clear line on failure."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.errors import BadInput, DataError, EntryPointError, ManifestError, one_line
from esper.execution.isolation import (
    evaluating,
    learning,
    preserved_buffers,
    preserved_parameters,
    preserved_randomness,
    seed_everything,
)
from esper.services.tolaria.config import EntryPointConfig, TolariaConfig, TrainingConfig
from esper.services.tolaria.data import (
    FAILURES,
    Batch,
    Datasets,
    checked_datasets,
    epoch_order,
    forwarded,
    gathered,
    moved_batch,
    ordered_batches,
    wide,
)
from esper.services.tolaria.objective import (
    Classification,
    CustomObjective,
    Objective,
    Regression,
)


def make_importable(folder: Path) -> None:
    """Let entry points name modules that lie beside the manifest; those win over installed ones."""
    path = str(folder.resolve())
    if path in sys.path:
        sys.path.remove(path)
    sys.path.insert(0, path)


def called(field: str, entry: EntryPointConfig) -> Any:
    """What the entry point `module.path:attribute` returns for its arguments.

    Raises:
        EntryPointError: it can't be imported, is not callable, or refuses its arguments.
    """
    target = imported(f"{field}.entrypoint", entry.entrypoint)
    if not callable(target):
        raise EntryPointError(
            f"{field}.entrypoint",
            f"{entry.entrypoint}, a {type(target).__name__}",
            "a callable: a function or a class",
        )
    _check_arguments(field, entry, target)
    try:
        return target(**entry.arguments)
    except BadInput:
        raise
    except FAILURES as error:
        raise EntryPointError(
            f"{field}.arguments",
            f"{entry.entrypoint}({_shown(entry.arguments)}) -> {_told(error)}",
            "arguments with which the entry point returns",
        ) from error


def imported(field: str, reference: str) -> Any:
    """The attribute that `module.path:attribute` names.

    Raises:
        EntryPointError: the module doesn't import, or has no such attribute.
    """
    module_name, _, attribute = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except FAILURES as error:  # a script without a __main__ guard may exit
        raise EntryPointError(
            field,
            f"{reference} ({_told(error)})",
            "module.path:attribute, the module installed or beside the manifest",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = ", ".join(name for name in vars(found) if not name.startswith("_"))
            raise EntryPointError(
                field, reference, f"an attribute of {module_name}: {one_line(public or 'none')}"
            )
        found = getattr(found, part)
    return found


def build_datasets(config: TolariaConfig) -> Datasets:
    """The session's datasets, with every random stream started from the session's seed."""
    seed_everything(config.training.seed)
    return checked_datasets(called("spec.data", config.data))


def build_model(config: TolariaConfig) -> nn.Module:
    """The session's model, its weights drawn from the session's seed.

    Raises:
        EntryPointError: the entry point returns no nn.Module.
    """
    seed_everything(config.training.seed)
    model = called("spec.model", config.model)
    if not isinstance(model, nn.Module):
        raise EntryPointError(
            "spec.model.entrypoint",
            f"{config.model.entrypoint} -> {type(model).__name__}",
            "a callable that returns an nn.Module",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise EntryPointError(
            "spec.model.entrypoint",
            f"{type(model).__name__} without trainable parameters",
            "a model with at least one parameter that requires a gradient",
        )
    return model


def build_objective(config: TolariaConfig, datasets: Datasets) -> Objective:
    """The session's objective."""
    name = config.training.objective
    if name == "classification":
        return Classification()
    if name == "regression":
        targets = torch.cat([batch[1].double() for batch in ordered_batches(datasets.train, 512)])
        return Regression(float(targets.var(correction=0)))
    field = "spec.training.objective"
    target = imported(field, name)
    if isinstance(target, type) or inspect.isfunction(target):
        try:
            target = target()
        except BadInput:
            raise
        except FAILURES as error:
            raise EntryPointError(
                field,
                f"{name}() -> {_told(error)}",
                "an entry point that, called without arguments, returns an object with a method "
                "loss(outputs, targets)",
            ) from error
    return CustomObjective(target, name)


def check_fit(model: nn.Module, datasets: Datasets, objective: Objective) -> Batch:
    """Try the model on two samples of every split; returns those of the first.

    Nothing of the model changes: buffers, gradients and random streams are put back.

    Raises:
        DataError: the model refuses the data's shape, or the objective the model's output.
    """
    examples: list[Batch] = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for split in ("train", "validation", "test"):
        try:
            batch = next(iter(ordered_batches(getattr(datasets, split), 2, limit=2)))
        except BadInput:
            raise
        except Exception as error:
            raise DataError(
                f"data.{split}", _told(error), "samples of equal shapes, which stack to a batch"
            ) from error
        inputs, targets = batch if device.type == "cpu" else moved_batch(batch, device)
        examples.append((inputs, targets))
        came = f"inputs {_shapes(inputs)}, targets {_shapes(targets)}"
        try:
            with (
                preserved_randomness(),
                preserved_buffers(model),
                evaluating(model),
                torch.no_grad(),
            ):
                output = forwarded(model, inputs)
        except BadInput:
            raise
        except Exception as error:
            raise DataError(
                f"data.{split}",
                f"{came}: {_told(error)}",
                f"a shape that {type(model).__name__} takes",
            ) from error
        if not isinstance(output, Tensor):
            raise DataError(
                "spec.model.entrypoint",
                f"a model whose output is a {type(output).__name__}",
                "a model whose output is one tensor",
            )
        try:
            loss = objective.loss(wide(output), targets)
            if loss.dim() != 0:
                raise ValueError(f"a loss of shape {list(loss.shape)} instead of one number")
            objective.metric_sum(output, targets)
            if len(targets) > 1:
                objective.nats(output, targets, slice(0, 1), slice(1, None))
        except BadInput:
            raise
        except Exception as error:
            raise DataError(
                f"data.{split}",
                f"{came} for outputs {_shapes(output)}: {_told(error)}",
                "targets that fit the model's output and the objective",
            ) from error
    return examples[0]


def check_training(
    model: nn.Module, datasets: Datasets, training: TrainingConfig, shards: int
) -> None:
    """Try the model in training mode on as few samples as the session will ever give it at once.

    A normalisation layer refuses a single value of each channel, which what has passed with two
    samples does not show. Nothing of the model changes.

    Raises:
        ManifestError: it takes two samples, and some of the batches' `shards` have one.
        DataError: it takes neither.
    """
    order = epoch_order(
        len(datasets.train), training.batch_size, training.seed, epoch=1, shards=shards
    )
    smallest = min(len(batch) for batch in order) // shards
    error = _refusal_to_train(model, datasets, min(smallest, 2))
    if error is None:
        return
    single = smallest == 1 and len(datasets.train) > 1
    if not single or _refusal_to_train(model, datasets, 2) is not None:
        raise DataError(
            "data.train",
            f"{min(smallest, 2)} samples at once in training mode: {_told(error)}",
            f"what {type(model).__name__} takes in training mode",
        ) from error
    whose = "a sample a shard" if shards > 1 else "a sample a batch"
    allowed = f"at least {2 * shards} with this model"
    if shards > 1:
        allowed += f", two samples for each of {shards} shards"
    raise ManifestError(
        "spec.training.batchSize",
        f"{training.batch_size}, {whose}, and {_told(error)}",
        allowed,
    ) from error


def _refusal_to_train(model: nn.Module, datasets: Datasets, samples: int) -> Exception | None:
    """What the model raises in training mode over the first `samples`."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with (
            preserved_randomness(),
            preserved_buffers(model),
            preserved_parameters(model),
            learning(model),
            torch.no_grad(),
        ):
            batch = gathered(datasets.train, torch.arange(samples))
            inputs, _ = batch if device.type == "cpu" else moved_batch(batch, device)
            forwarded(model, inputs)
    except BadInput:
        raise
    except Exception as error:
        return error
    return None


def _check_arguments(field: str, entry: EntryPointConfig, target: Any) -> None:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return  # a callable without a readable signature says so itself when called
    try:
        signature.bind(**entry.arguments)
    except TypeError as error:
        raise EntryPointError(
            f"{field}.arguments",
            f"{_shown(entry.arguments)} ({error})",
            f"{entry.entrypoint.rpartition(':')[2]}{signature}",
        ) from error


def _shown(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(str(error))}"


def _shapes(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shapes(item)}" for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(_shapes(item) for item in value)
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
