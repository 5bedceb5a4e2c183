"""What buildah has made: images and their layers, read out of its store as they are.

`buildah push` would compress every layer each time; a cluster on the same machine gains nothing.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from tools.cluster.containers.archives import Image, Layer
from tools.cluster.containers.machines import run
from tools.servers.process import ServerError

DRIVER = "overlay"


def options(root: Path) -> tuple[Path, Path]:
    """The two folders of a store: of what lasts, and of what is under way."""
    return root / "store", root / "running"


class ImageStore:
    """A store of images below a folder."""

    def __init__(self, root: Path) -> None:
        graph, running = options(root)
        self._words = [
            *("containers-storage", "--graph", str(graph), "--run", str(running)),
            *("--storage-driver", DRIVER),
        ]

    def has(self, name: str) -> bool:
        """Whether there is an image of a name."""
        return any(name in image.get("names", ()) for image in self._listed("images"))

    def identity(self, name: str) -> str:
        """The digest of an image's configuration.

        Raises:
            ServerError: there is none of that name.
        """
        return f"sha256:{self._found(name)['id']}"

    def image(self, name: str) -> Image:
        """The image of a name.

        Raises:
            ServerError: there is none.
        """
        found = self._found(name)
        layers = chain(self._listed("layers"), found["layer"])
        config = self._bytes("get-image-data", found["id"], f"sha256:{found['id']}")
        return Image(config, tuple(self._layer(layer) for layer in layers))

    def _found(self, name: str) -> dict[str, Any]:
        for found in self._listed("images"):
            if name in found.get("names", ()):
                return found
        raise ServerError(f"{name}: there is no such image, build it first")

    def _layer(self, found: Mapping[str, Any]) -> Layer:
        read = partial(self._read, found["id"])
        return Layer(str(found["diff-digest"]), int(found.get("diff-size", 0)), read)

    @contextmanager
    def _read(self, layer: str) -> Iterator[IO[bytes]]:
        words = [*self._words, "diff", "--uncompressed", layer]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as reading:
            assert reading.stdout is not None
            yield reading.stdout
        if reading.returncode:
            raise ServerError(f"{' '.join(words)}: exit code {reading.returncode}")

    def _listed(self, what: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] | None = json.loads(run([*self._words, what, "--json"]))
        return found or []

    def _bytes(self, *words: str) -> bytes:
        return subprocess.run([*self._words, *words], check=True, capture_output=True).stdout


def chain(layers: Sequence[Mapping[str, Any]], top: str) -> list[Mapping[str, Any]]:
    """The layers below `top` and itself, the lowest first."""
    known = {layer["id"]: layer for layer in layers}
    found: list[Mapping[str, Any]] = []
    name: str | None = top
    while name:
        found.append(known[name])
        name = known[name].get("parent")
    return found[::-1]
