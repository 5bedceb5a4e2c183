"""An artifact's header, read without torch and before the bytes are kept.

What is uploaded as an artifact must be a safetensors file that says of itself what the compiler
writes: the bound graph, the target and the manifest of the kernel that it is uploaded for, and
tensors that fill the file without a gap. So a pickle, an archive or a file with something hidden
in it is refused, and nothing of it is stored. `esper.execution.artifact` checks the tensors against
the graph once more when a kernel is loaded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Mapping
from math import prod

from pydantic import ValidationError

from esper.contracts.assets import CompiledKernel
from esper.contracts.blueprints import Graph, KernelTarget, infer, kernel_id
from esper.contracts.kernels import KernelManifest
from esper.errors import BlueprintError, KernelError, one_line

MAX_HEADER_BYTES = 512 * 2**10
_LENGTH_BYTES = 8
_PARTS = ("graph", "manifest", "target")
_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_MAX_DIMENSIONS = 8


async def checked(
    chunks: AsyncIterator[bytes], kernel: CompiledKernel, size: int
) -> AsyncIterator[bytes]:
    """`chunks` of an artifact of `size` bytes for `kernel`, the first only once the header holds.

    Raises:
        KernelError: the header is not that of an artifact of this kernel, or the bytes are fewer
            or more than `size`.
    """
    head = b""
    seen = 0
    awaited: int | None = _LENGTH_BYTES
    async for chunk in chunks:
        seen += len(chunk)
        if seen > size:
            raise _refusal(f"more than {size} bytes", "as many as announced")
        if awaited is None:
            yield chunk
            continue
        head += chunk
        if awaited == _LENGTH_BYTES and len(head) >= _LENGTH_BYTES:
            awaited += _header_bytes(head, size)
        if awaited > _LENGTH_BYTES and len(head) >= awaited:
            check_header(head[_LENGTH_BYTES:awaited], size - awaited, kernel)
            awaited = None
            yield head
    if awaited is not None or seen != size:
        raise _refusal(f"{seen} bytes", f"{size}, as announced")


async def read_manifest(
    chunks: AsyncIterator[bytes], kernel: CompiledKernel, size: int
) -> KernelManifest:
    """The manifest of an artifact of `size` bytes for `kernel`; reads no further than its header.

    Raises:
        KernelError: the header is not that of an artifact of this kernel.
    """
    head, end = b"", None
    async for chunk in chunks:
        head += chunk
        if end is None and len(head) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + _header_bytes(head, size)
        if end is not None and len(head) >= end:
            return check_header(head[_LENGTH_BYTES:end], size - end, kernel)
    raise _refusal(f"{len(head)} bytes", "a safetensors file")


def check_header(header: bytes, tensor_bytes: int, kernel: CompiledKernel) -> KernelManifest:
    """The manifest in a header, if that is of an artifact of `kernel` with `tensor_bytes` behind.

    Raises:
        KernelError: it is none.
    """
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _refusal(one_line(str(error)), "a safetensors header") from error
    if not isinstance(entries, dict):
        raise _refusal("no JSON object", "a safetensors header")
    parts = entries.pop("__metadata__", None)
    if not isinstance(parts, dict) or sorted(parts) != sorted(_PARTS):
        raise _refusal("other metadata", ", ".join(_PARTS))
    _check_tensors(entries, tensor_bytes)
    return _checked_manifest(parts, kernel)


def _header_bytes(head: bytes, size: int) -> int:
    (length,) = struct.unpack_from("<Q", head)
    most = min(MAX_HEADER_BYTES, size - _LENGTH_BYTES)
    if not 2 <= length <= most:
        raise _refusal(f"a header of {length} bytes", f"a safetensors file, 2 to {most}")
    return int(length)


def _check_tensors(entries: Mapping[str, object], tensor_bytes: int) -> None:
    spans = sorted(_span(name, entry) for name, entry in entries.items())
    end = 0
    for first, last in spans:
        if first != end:
            raise _refusal(f"a tensor at byte {first}", f"one that begins at {end}, without a gap")
        end = last
    if end != tensor_bytes:
        raise _refusal(f"{tensor_bytes} bytes of tensors", f"{end}, what the header says")


def _span(name: str, entry: object) -> tuple[int, int]:
    allowed = "dtype, shape and data_offsets that agree"
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise _refusal(f"tensor {one_line(name, 40)}", allowed)
    shape, offsets = entry["shape"], entry["data_offsets"]
    sizes = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    whole = all(type(size) is int and 0 <= size < 2**48 for size in sizes)
    width = _ELEMENT_BYTES.get(str(entry["dtype"]))
    if not whole or width is None or len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS:
        raise _refusal(f"tensor {one_line(name, 40)}", allowed)
    first, last = offsets
    if last - first != prod(shape) * width:
        raise _refusal(f"tensor {one_line(name, 40)}", allowed)
    return first, last


def _checked_manifest(parts: Mapping[str, object], kernel: CompiledKernel) -> KernelManifest:
    try:
        graph = Graph.model_validate_json(str(parts["graph"]))
        target = KernelTarget.model_validate_json(str(parts["target"]))
        manifest = KernelManifest.model_validate_json(str(parts["manifest"]))
        cost = infer(graph, target)
    except (ValidationError, BlueprintError, ValueError, RecursionError) as error:
        raise _refusal(one_line(str(error)), "the parts that the compiler writes") from error
    digest = manifest.blueprint_digest
    expected = KernelManifest.describing(kernel_id(digest, target), digest, graph, target, cost)
    if manifest != expected:
        raise _refusal("a manifest that does not describe the graph", "the compiler's")
    if (manifest.kernel, digest) != (kernel.kernel, kernel.blueprint_digest):
        raise _refusal(f"an artifact of kernel {manifest.kernel}", f"one of {kernel.kernel}")
    return manifest


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"the constant {name}")


def _refusal(came: str, allowed: str) -> KernelError:
    return KernelError(f"artifact: got {came}; allowed: {allowed}")
