"""OCI archives as `ctr images import` reads them, written without any other program."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_LISTING = ("index.v1+json", "manifest.v1+json", "manifest.list.v2+json", "manifest.v2+json")
"""How the media types end of what names other content, of OCI and of Docker."""
_NAME = "io.containerd.image.name"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Blob:
    """What a store of images holds.

    Attributes:
        kind: its media type.
        digest: what it is called.
        size: in bytes.
    """

    kind: str
    digest: str
    size: int


@dataclass(frozen=True)
class Layer:
    """One layer of an image, a tar archive that is not compressed.

    Attributes:
        digest: what it is called.
        size: of the archive, in bytes.
        read: opens the archive.
    """

    digest: str
    size: int
    read: Callable[[], AbstractContextManager[IO[bytes]]]


@dataclass(frozen=True)
class Image:
    """An image: its configuration, as it is written, and its layers, the lowest first."""

    config: bytes
    layers: tuple[Layer, ...]


def program_image(program: Path) -> Image:
    """An image that holds one static program, and runs it."""
    content = program.read_bytes()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo(program.name)
        entry.size, entry.mode = len(content), 0o755
        tar.addfile(entry, io.BytesIO(content))
    layer = packed.getvalue()
    config = {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": [f"/{program.name}"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
    }
    return Image(_json(config), (Layer(digest(layer), len(layer), lambda: io.BytesIO(layer)),))


def write_archive(
    name: str, image: Image, target: IO[bytes], *, there: Container[str] = ()
) -> list[Layer]:
    """Write an image of a name, but for the layers that are already there.

    Args:
        name: what it is to be called.
        image: the image.
        target: where the archive goes, in one stream.
        there: the digests that the store holds which reads the archive.

    Returns:
        The layers that were written.
    """
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _descriptor(_CONFIG, image.config),
            "layers": [
                {"mediaType": _LAYER, "digest": layer.digest, "size": layer.size}
                for layer in image.layers
            ],
        }
    )
    missing = {layer.digest: layer for layer in image.layers if layer.digest not in there}
    with tarfile.open(fileobj=target, mode="w|", bufsize=1 << 20) as tar:
        tar.copybufsize = 1 << 20
        for layer in missing.values():
            entry = tarfile.TarInfo(_path(layer.digest))
            entry.size = layer.size
            with layer.read() as content:
                tar.addfile(entry, content)
        for blob in (image.config, manifest):
            _add(tar, _path(digest(blob)), blob)
        _add_index(tar, name, _descriptor(_MANIFEST, manifest))
    return list(missing.values())


def write_index(name: str, root: Blob, target: IO[bytes]) -> None:
    """Write an image of a name, all of which is there: nothing but what it is called."""
    with tarfile.open(fileobj=target, mode="w|") as tar:
        described = {"mediaType": root.kind, "digest": root.digest, "size": root.size}
        _add_index(tar, name, described)


def reachable(root: Blob, file: Callable[[str], Path]) -> Iterator[Blob]:
    """What an image consists of: its index, manifests, configurations and layers.

    Of an index that names several platforms, those are left out whose manifest is not there.

    Args:
        root: its manifest or index.
        file: where what has a digest lies.
    """
    yield root
    if root.kind.endswith(_LISTING):
        said = json.loads(file(root.digest).read_bytes())
        here = [part for part in said.get("manifests", ()) if file(part["digest"]).exists()]
        config = [said["config"]] if "config" in said else []
        for part in (*here, *config, *said.get("layers", ())):
            yield from reachable(Blob(part["mediaType"], part["digest"], part["size"]), file)


def digest(content: bytes) -> str:
    """What a blob is called."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _path(name: str) -> str:
    return f"blobs/{name.replace(':', '/')}"


def _descriptor(kind: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest(blob), "size": len(blob)}


def _add_index(tar: tarfile.TarFile, name: str, root: Mapping[str, Any]) -> None:
    index = {"schemaVersion": 2, "manifests": [{**root, "annotations": {_NAME: name}}]}
    _add(tar, "index.json", _json(index))
    _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))


def _json(document: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(document).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
