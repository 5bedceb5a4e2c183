"""A kernel's artifact: one safetensors file, read without running anything that is in it.

The tensors are those that the blueprint fixes, named as in the built module (often there are
none); the metadata holds the bound graph, the target and the manifest, each as canonical JSON. The
SHA-256 of the bytes is the artifact's identity. Equal kernels give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import fx

from esper.contracts.base import canonical_json
from esper.contracts.blueprints import Graph, KernelTarget, infer, kernel_id, reads_producer
from esper.contracts.kernels import KernelManifest
from esper.errors import BlueprintError, KernelError, one_line
from esper.execution.builders import DTYPES, parameter_shapes, skeleton

MAX_ARTIFACT_BYTES = 512 * 2**20
_PARTS = ("graph", "manifest", "target")

# What the interpreter holds for a template beside its tensors: a few dozen bytes of JSON become
# kilobytes of objects. Measured over the catalogue and long chains of nodes, and rounded up.
_TEMPLATE_BYTES = 24 * 2**10
_NODE_BYTES = 5 * 2**10
_STEP_BYTES = 3 * 2**9


@dataclass(frozen=True, eq=False)
class KernelTemplate:
    """A verified kernel, from which any number of seeds is built. Nothing changes it.

    `skeleton` is its module, the weights on the meta device; `tensors` are the weights that the
    blueprint fixes. `nbytes` is what all of it takes, each tensor counted once. `arrival` is set
    while the tensors may still be on their way to a GPU: whoever reads them waits for it there.
    """

    graph: Graph
    target: KernelTarget
    manifest: KernelManifest
    digest: str
    nbytes: int
    skeleton: fx.GraphModule
    tensors: Mapping[str, torch.Tensor]
    arrival: torch.cuda.Event | None = None


def pack(
    graph: Graph,
    target: KernelTarget,
    manifest: KernelManifest,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> bytes:
    """The artifact of a bound graph, and of the weights that it fixes.

    Raises:
        KernelError: a tensor is no parameter of the graph, or the artifact is too large.
    """
    fixed = dict(tensors or {})
    _refuse_foreign(fixed, graph, target)
    metadata = {
        "graph": canonical_json(graph.to_wire()).decode(),
        "manifest": canonical_json(manifest.to_wire()).decode(),
        "target": canonical_json(target.to_wire()).decode(),
    }
    data = _ordered(safetensors.torch.save(fixed, metadata))
    if len(data) > MAX_ARTIFACT_BYTES:
        raise KernelError(f"artifact: got {len(data)} bytes; allowed: at most {MAX_ARTIFACT_BYTES}")
    return data


def unpack(data: bytes, expected_digest: str) -> KernelTemplate:
    """The kernel in `data`, once its bytes, its parts and its manifest agree.

    Raises:
        KernelError: the bytes don't have the expected SHA-256, are no artifact, or contradict
            themselves.
    """
    found = artifact_digest(data)
    if found != expected_digest:
        raise KernelError(f"artifact: got SHA-256 {found}; allowed: {expected_digest}")
    if len(data) > MAX_ARTIFACT_BYTES:
        raise KernelError(f"artifact: got {len(data)} bytes; allowed: at most {MAX_ARTIFACT_BYTES}")
    try:
        parts = _metadata(data)
        graph = Graph.model_validate_json(parts["graph"])
        target = KernelTarget.model_validate_json(parts["target"])
        manifest = KernelManifest.model_validate_json(parts["manifest"])
        cost = infer(graph, target)
        tensors = safetensors.torch.load(data)
    except KeyError as error:  # safetensors looks the type up in a table of torch's
        raise KernelError(f"artifact {found[:12]}: torch has no type {error}") from error
    except (SafetensorError, ValidationError, BlueprintError, ValueError, RecursionError) as error:
        raise KernelError(f"artifact {found[:12]}: {one_line(str(error))}") from error
    expected = KernelManifest.describing(
        kernel_id(manifest.blueprint_digest, target),
        manifest.blueprint_digest,
        graph,
        target,
        cost,
    )
    if manifest != expected:
        raise KernelError(
            f"artifact {found[:12]}: got a manifest of kernel {manifest.kernel} that does not "
            "describe its graph; allowed: the manifest that the compiler writes"
        )
    _refuse_foreign(tensors, graph, target)
    module = skeleton(graph, target)
    nbytes = _TEMPLATE_BYTES + _NODE_BYTES * len(graph.nodes)
    nbytes += _STEP_BYTES * len(module.graph.nodes)
    nbytes += sum(tensor.nbytes for tensor in tensors.values())
    return KernelTemplate(graph, target, manifest, found, nbytes, module, MappingProxyType(tensors))


def check_target(template: KernelTemplate, target: KernelTarget) -> None:
    """Refuse a kernel that was not compiled for `target`, the layer it is to be loaded into.

    The producer counts for a kernel that reads its input; its name never does.

    Raises:
        KernelError: a shape, the layer's geometry, the dtype, the device or the producer differs.
    """
    left_out = {"producer": {"name"}} if reads_producer(template.graph) else {"producer"}
    came = template.target.model_dump(by_alias=True, exclude=left_out)
    for name, allowed in target.model_dump(by_alias=True, exclude=left_out).items():
        if came[name] != allowed:
            raise KernelError(
                f"kernel {template.manifest.kernel}: {name}: got {one_line(came[name])}; "
                f"allowed: {one_line(allowed)}, the host layer's"
            )


def artifact_digest(data: bytes) -> str:
    """The SHA-256 of an artifact's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def _metadata(data: bytes) -> dict[str, str]:
    """The three JSON parts of a safetensors header.

    Raises:
        ValueError: there is no such header, or parts are missing.
    """
    header, _ = _split(data)
    parts = header.get("__metadata__")
    if not isinstance(parts, dict) or sorted(parts) != sorted(_PARTS):
        came = ", ".join(map(str, parts)) if isinstance(parts, dict) else "none"
        raise ValueError(f"metadata: got {one_line(came, 60)}; allowed: {', '.join(_PARTS)}")
    return {name: str(text) for name, text in parts.items()}


def _split(data: bytes) -> tuple[dict[str, object], bytes]:
    if len(data) < 8:
        raise ValueError(f"header: got {len(data)} bytes; allowed: a safetensors file")
    (length,) = struct.unpack_from("<Q", data)
    if length > len(data) - 8:
        raise ValueError(f"header: got a length of {length}; allowed: at most {len(data) - 8}")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("header: got no JSON object; allowed: a safetensors header")
    return header, data[8 + length :]


def _ordered(data: bytes) -> bytes:
    """The same safetensors file with a canonical header: the library's order is not repeatable."""
    header, tensors = _split(data)
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + tensors


def _refuse_foreign(
    tensors: Mapping[str, torch.Tensor], graph: Graph, target: KernelTarget
) -> None:
    if not tensors:
        return
    allowed = parameter_shapes(graph, target)
    for name, tensor in tensors.items():
        came = (tuple(tensor.shape), tensor.dtype)
        if name not in allowed:
            raise KernelError(f"artifact: got tensor {name!r}; allowed: {', '.join(allowed)}")
        if came != (allowed[name], DTYPES[target.dtype]):
            raise KernelError(
                f"artifact: got tensor {name!r} of {came[0]} {came[1]}; "
                f"allowed: {allowed[name]} {DTYPES[target.dtype]}"
            )
