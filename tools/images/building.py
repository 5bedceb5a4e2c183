"""Builds images, with Docker where it answers, else with buildah, and gives them to a cluster."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tools.cluster.containers.kind import KindCluster
from tools.cluster.containers.layout import KIND, Layout
from tools.cluster.containers.machines import run
from tools.cluster.containers.packages import IMAGES, install, require_root
from tools.cluster.containers.source import SourceCluster
from tools.images.recipes import Buildah, Recipe, arguments, debian, docker_build
from tools.images.store import ImageStore
from tools.servers.process import ServerError

ROOT = Path(__file__).parents[2]
CACHE = Path.home() / ".cache" / "esper" / "images"

Say = Callable[[str], None]


class Images(Protocol):
    """What builds images, and keeps them."""

    def base_of(self, recipe: Recipe) -> str | None:
        """The base of an image where none is asked for; None for the Containerfile's own."""

    def build(self, file: str, image: str, context: Path, given: Mapping[str, str]) -> None:
        """Build an image of a name by a Containerfile below the context."""

    def load(self, image: str, cluster: Layout) -> None:
        """Give an image to a cluster."""

    def identity(self, image: str) -> str:
        """The digest of an image's configuration: another one after every change."""


class DockerImages:
    """Those of the Docker that answers here."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def base_of(self, recipe: Recipe) -> str | None:
        """None: Docker pulls."""
        return None

    def build(self, file: str, image: str, context: Path, given: Mapping[str, str]) -> None:
        """Build one.

        Raises:
            ServerError: Docker failed.
        """
        with told(self._say, f"{image}: built"):
            run(docker_build(file, image, context, given))

    def load(self, image: str, cluster: Layout) -> None:
        """Give one to a cluster of kind.

        Raises:
            ServerError: the cluster is of another kind.
        """
        if cluster.way != KIND:
            raise ServerError(f"{cluster.state}: got a cluster that does not use Docker's images")
        with told(self._say, f"{image}: loaded"):
            KindCluster(cluster, self._say).load_image(image)

    def identity(self, image: str) -> str:
        """What Docker says."""
        return run(["docker", "image", "inspect", "--format={{.Id}}", image]).strip()


class BuildahImages:
    """Those in a store of buildah's below a folder."""

    def __init__(self, say: Say, root: Path = CACHE) -> None:
        self._say = say
        self._root = root
        self._store = ImageStore(root)
        uv = Path(sys.prefix) / "bin" / "uv"
        self._buildah = Buildah(root, Path(run([str(uv), "cache", "dir"]).strip()))
        root.mkdir(parents=True, exist_ok=True)
        self._buildah.uv_cache.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Install what is missing.

        Raises:
            ServerError: something is, and can't be installed.
        """
        require_root()
        install(IMAGES, self._say)

    def base_of(self, recipe: Recipe) -> str | None:
        """A base of Debian's packages, made the first time.

        Raises:
            ServerError: mmdebstrap or buildah failed.
        """
        with self._locked():
            if not self._store.has(recipe.base):
                with told(self._say, f"{recipe.base}: made of Debian's packages"):
                    self._make(recipe)
        return recipe.base

    def build(self, file: str, image: str, context: Path, given: Mapping[str, str]) -> None:
        """Build one.

        Raises:
            ServerError: buildah failed.
        """
        with self._locked(), told(self._say, f"{image}: built"):
            run(self._buildah.build(file, image, context, given))

    def load(self, image: str, cluster: Layout) -> None:
        """Give one to a cluster from source: the layers that its nodes do not have."""
        with told(self._say, f"{image}: loaded"):
            size = SourceCluster(cluster, self._say).load(image, self._store.image(image))
        self._say(f"{image}: {size / 1e6:.1f} MB were new")

    def identity(self, image: str) -> str:
        """What the store says."""
        return self._store.identity(image)

    def _make(self, recipe: Recipe) -> None:
        with tempfile.TemporaryDirectory(dir=self._root) as folder:
            archive = Path(folder) / "root.tar"
            run(debian(recipe.packages, archive))
            container = run(self._buildah.new_container()).strip()
            try:
                run(self._buildah.unpack(container, archive))
            except ServerError:
                run(self._buildah.remove(container))
                raise
            run(self._buildah.commit(container, recipe.base))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two builds at once would both make what one makes."""
        with (self._root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def remove(root: Path = CACHE) -> None:
    """Remove all images that buildah has made, and what builds were sped up by."""
    store = root / "store" / "overlay"
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in mounts:
        if mount == str(store):  # the driver binds it to itself
            run(["umount", mount])
    if root.exists():
        shutil.rmtree(root)


def build(images: Images, recipe: Recipe, *, base: str | None, accelerator: str, tag: str) -> str:
    """Build one of Esper's images; returns its name."""
    given = arguments(
        recipe, base=base or images.base_of(recipe), accelerator=accelerator, environment=os.environ
    )
    images.build(recipe.file, recipe.image(tag), ROOT, given)
    return recipe.image(tag)


@contextmanager
def told(say: Say, what: str) -> Iterator[None]:
    """Say how long something took."""
    began = time.monotonic()
    yield
    say(f"{what} ({time.monotonic() - began:.1f} s)")
