"""OCI archives as `ctr images import` reads them, written without any other program."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_NAME = "io.containerd.image.name"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def program_archive(name: str, program: Path, target: IO[bytes]) -> None:
    """Write an image of a name that holds one static program, and runs it."""
    inside = f"/{program.name}"
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        entry = tarfile.TarInfo(inside.lstrip("/"))
        content = program.read_bytes()
        entry.size, entry.mode = len(content), 0o755
        tar.addfile(entry, io.BytesIO(content))
    config = {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": [inside]},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer.getvalue())]},
    }
    blobs = [layer.getvalue(), _json(config)]
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _descriptor(_CONFIG, blobs[1]),
        "layers": [_descriptor(_LAYER, blobs[0])],
    }
    blobs.append(_json(manifest))
    with tarfile.open(fileobj=target, mode="w|") as tar:
        for blob in blobs:
            _add(tar, f"blobs/{digest(blob).replace(':', '/')}", blob)
        _finish(tar, name, _descriptor(_MANIFEST, blobs[-1]))


def thin_archive(name: str, image: Path, there: Container[str], target: IO[bytes]) -> list[str]:
    """Write an image of a name from an OCI layout, but for the layers that are already there.

    Args:
        name: what it is to be called.
        image: the folder of the layout, with one image.
        there: the digests that the store holds which reads the archive.
        target: where the archive goes, in one stream.

    Returns:
        The digests of the layers that were written.
    """
    (entry,) = json.loads((image / "index.json").read_text())["manifests"]
    manifest: dict[str, Any] = json.loads(_blob(image, entry["digest"]).read_text())
    layers = [layer["digest"] for layer in manifest["layers"]]
    missing = [layer for layer in dict.fromkeys(layers) if layer not in there]
    with tarfile.open(fileobj=target, mode="w|") as tar:
        for wanted in (entry["digest"], manifest["config"]["digest"], *missing):
            path = _blob(image, wanted)
            tar.add(path, f"blobs/{wanted.replace(':', '/')}")
        _finish(tar, name, {key: entry[key] for key in ("mediaType", "digest", "size")})
    return missing


def digest(content: bytes) -> str:
    """What a blob is called."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _finish(tar: tarfile.TarFile, name: str, manifest: Mapping[str, Any]) -> None:
    index = {"schemaVersion": 2, "manifests": [{**manifest, "annotations": {_NAME: name}}]}
    _add(tar, "index.json", _json(index))
    _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))


def _blob(image: Path, name: str) -> Path:
    return image / "blobs" / name.replace(":", "/")


def _descriptor(kind: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest(blob), "size": len(blob)}


def _json(document: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(document).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
