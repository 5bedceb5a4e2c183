"""What a run leaves: `model.safetensors`, and `grown.py` that rebuilds the model without Esper."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

import esper
from esper.core.folding import LayerPlan, plan
from esper.core.model_wrapper import MorphableModel
from esper.core.source import Origin, render
from esper.errors import EntryPointError, OutputError, StorageFull, WrapError
from esper.execution.kasmina_layer import GROWN, KasminaLayer

WEIGHTS_FILE = "model.safetensors"
SOURCE_FILE = "grown.py"


def export_grown(
    model: nn.Module,
    entrypoint: str,
    arguments: Mapping[str, Any],
    path: Path,
    metadata: Mapping[str, Any],
) -> None:
    """Write `model.safetensors` and `grown.py` into the folder `path`; the model stays as it is.

    `entrypoint` ("module:attribute") with `arguments` made the model that was wrapped. Fossilized
    seeds go with it, folded where that is exact; others stay behind. A module that is one file of
    the user's, or of Esper's zoo, is copied beside, so that the folder needs torch and nothing
    else. `metadata` goes into the file's header, as JSON; its entry "grown" tells of each seed
    ({layer, slot, blueprint, epoch, contribution: {mean, lower}}).

    Raises:
        WrapError: a seed has no source, or the state holds what is no tensor.
        EntryPointError: the entry point's module can't be found.
        OutputError: the folder can't be written.
        StorageFull: there is no room left in it.
    """
    plans = plan(model.morphology) if isinstance(model, MorphableModel) else {}
    tensors, shared = _tensors(model, plans)
    module, _, attribute = entrypoint.partition(":")
    beside = _file_beside(module)
    imported = beside[0].removesuffix(".py") if beside else module
    source = render(
        Origin(imported, attribute, arguments),
        plans,
        _fused_around(model, plans),
        metadata,
        esper.__version__,
    )
    header = {name: json.dumps(value) for name, value in metadata.items()}
    header |= {"shared": json.dumps(shared), "entrypoint": entrypoint, "esper": esper.__version__}
    try:
        path.mkdir(parents=True, exist_ok=True)
        if beside:
            write_atomically(path / beside[0], beside[1])
        weights = in_one_order(safetensors.torch.save(tensors, header))
        write_atomically(path / WEIGHTS_FILE, weights)
        write_atomically(path / SOURCE_FILE, source.encode())
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull(f"{path}: no room left for {WEIGHTS_FILE}") from error
        raise OutputError("output", f"{path} ({error.strerror})", "a writable folder") from error


def in_one_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes them in any order.

    Offsets count from the end of the header, so the tensors stay where they are.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds all of it or what it held before.

    Raises:
        OSError: as the system says.
    """
    # One name for every try, so that a process killed here leaves nothing that stays.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _tensors(
    model: nn.Module, plans: Mapping[str, LayerPlan]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state by name, each tensor once, and for the other names of one the name it is under."""
    state = model.state_dict()
    changed = {id(one.layer): one for one in plans.values()}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, KasminaLayer):
            _settle(state, f"{path}." if path else "", changed.get(id(layer)))
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    stored: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise WrapError(f"state_dict: {name}", type(value).__name__, "tensors")
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in stored:
            shared[name] = stored[place]
            continue
        stored[place] = name
        # A copy of its own: safetensors refuses tensors that overlap without being one.
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, shared


def _settle(state: dict[str, Any], prefix: str, one: LayerPlan | None) -> None:
    """Bring one layer's entries from what they are while it lives to what they are in the end."""
    kept = tuple(f"{prefix}{GROWN}.{slot}." for slot in one.kept) if one is not None else ()
    for name in list(state):
        if name.startswith(f"{prefix}{GROWN}.") and not name.startswith(kept):
            del state[name]
    if one is not None:
        state[f"{prefix}weight"] = one.weight
        if one.bias is not None:
            state[f"{prefix}bias"] = one.bias


def _file_beside(module: str) -> tuple[str, bytes] | None:
    """The file to copy beside, as (name, contents): the zoo's, or the user's one-file module.

    Raises:
        EntryPointError: the module can't be found.
    """
    try:
        loaded = sys.modules.get(module) or importlib.import_module(module)
    except ImportError as error:
        raise EntryPointError("spec.model.entrypoint", module, "an importable module") from error
    file = getattr(loaded, "__file__", None)
    if file is None or not file.endswith(".py") or hasattr(loaded, "__path__"):
        return None
    if module.startswith("esper.zoo."):
        return f"zoo_{Path(file).name}", Path(file).read_bytes()
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    if "." in module or installed or module in sys.stdlib_module_names:
        return None
    name = f"user_{module}.py" if f"{module}.py" == SOURCE_FILE else f"{module}.py"
    return name, Path(file).read_bytes()


def _fused_around(model: nn.Module, plans: Mapping[str, LayerPlan]) -> dict[str, list[str]]:
    """The containers whose fused path would read a layer's weight and pass over its seeds."""
    layers = [one.layer for one in plans.values() if one.kept or one.feeds]
    fused: dict[str, list[str]] = {"layers": [], "encoders": []}
    for name, module in model.named_modules():
        inner = {id(part) for part in module.modules()}
        if not any(id(layer) in inner for layer in layers):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            fused["layers"].append(name)
        elif isinstance(module, nn.TransformerEncoder):
            fused["encoders"].append(name)
    return fused
