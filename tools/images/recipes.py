"""How each image is built: names, arguments and command lines. Nothing here does anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.images.store import DRIVER, options

REGISTRY = "localhost"
"""Of images that were never pushed anywhere."""
TAG = "dev"
ACCELERATORS = ("cpu", "cuda")
SUITE = "bookworm"
"""The release of Debian that the bases are made of."""
_CERTIFICATES = ("/etc/ssl/certs", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates")
_CERTIFICATE_NAMES = ("PIP_CERT", "SSL_CERT_FILE")
_UV_CACHE = "/uv-cache"
_UNREAD = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


@dataclass(frozen=True)
class Recipe:
    """One of Esper's images.

    Attributes:
        name: it is called `esper-<name>`.
        packages: those of Debian that its base has.
        python: whether it installs packages of Python.
        accelerated: whether it is told what its PyTorch is to run on.
    """

    name: str
    packages: tuple[str, ...]
    python: bool = True
    accelerated: bool = False

    @property
    def file(self) -> str:
        """Its Containerfile, from the repository."""
        return f"images/{self.name}.Containerfile"

    def image(self, tag: str = TAG) -> str:
        """Its whole name."""
        return f"{REGISTRY}/esper-{self.name}:{tag}"

    @property
    def base(self) -> str:
        """The name of the base that is made of Debian's packages."""
        return f"{REGISTRY}/esper-base-{self.name}:{SUITE}"


_PYTHON = ("ca-certificates", "python3", "python3-venv")
RECIPES = {
    recipe.name: recipe
    for recipe in (
        # torch.compile calls the compiler, and what it compiles includes Python.h.
        Recipe("runtime", (*_PYTHON, "g++", "python3-dev"), accelerated=True),
        Recipe("control", _PYTHON),
        Recipe("redis", ("redis-server",), python=False),
    )
}


def arguments(
    recipe: Recipe, *, base: str | None, accelerator: str, environment: Mapping[str, str]
) -> dict[str, str]:
    """The build arguments of an image.

    Args:
        recipe: the image.
        base: the image that it is built on; None for the Containerfile's own.
        accelerator: one of `ACCELERATORS`.
        environment: names the certificates that this machine's installers trust.
    """
    found = {} if base is None else {"BASE": base}
    if recipe.accelerated:
        found["ACCELERATOR"] = accelerator
    if recipe.python:
        found |= {name: environment[name] for name in _CERTIFICATE_NAMES if name in environment}
    return found


def docker_build(file: str, image: str, context: Path, given: Mapping[str, str]) -> list[str]:
    """Builds an image with Docker; `file` is below the context."""
    words = ["docker", "build", f"--file={context / file}", f"--tag={image}"]
    return [*words, *_build_arguments(given), str(context)]


@dataclass(frozen=True)
class Buildah:
    """Command lines of buildah.

    Attributes:
        root: the folder of its store.
        uv_cache: uv's cache on this machine, which builds share.
    """

    root: Path
    uv_cache: Path

    def build(self, file: str, image: str, context: Path, given: Mapping[str, str]) -> list[str]:
        """Builds an image; `file` is below the context."""
        folders = [folder for folder in _CERTIFICATES if Path(folder).is_dir()]
        volumes = [*(f"{folder}:{folder}:ro" for folder in folders), f"{self.uv_cache}:{_UV_CACHE}"]
        return self._words(
            *("build", "--isolation=chroot", "--network=host", "--layers"),
            # What is already here is what is meant; there may be no registry to ask.
            "--pull=false",
            *(f"--volume={volume}" for volume in volumes),
            *(f"--file={context / file}", f"--tag={image}"),
            *_build_arguments({**given, "UV_CACHE_DIR": _UV_CACHE}),
            str(context),
        )

    def new_container(self) -> list[str]:
        """Prints the name of a new, empty container."""
        return self._words("from", "scratch")

    def unpack(self, container: str, archive: Path) -> list[str]:
        """Unpacks a tar archive in a container."""
        return self._words("add", "--quiet", container, str(archive), "/")

    def commit(self, container: str, image: str) -> list[str]:
        """Makes an image of a container, which goes."""
        return self._words("commit", "--quiet", "--rm", "--disable-compression", container, image)

    def remove(self, container: str) -> list[str]:
        """Removes a container."""
        return self._words("rm", container)

    def _words(self, *words: str) -> list[str]:
        graph, running = options(self.root)
        return [
            *("buildah", f"--root={graph}", f"--runroot={running}"),
            *(f"--storage-driver={DRIVER}", *words),
        ]


def debian(packages: Sequence[str], archive: Path) -> list[str]:
    """Makes a root file system of Debian's packages, as a tar archive."""
    return [
        *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}"),
        *(f"--dpkgopt=path-exclude={path}" for path in _UNREAD),
        *("--dpkgopt=path-include=/usr/share/doc/*/copyright", SUITE, str(archive)),
    ]


def _build_arguments(given: Mapping[str, str]) -> list[str]:
    return [f"--build-arg={name}={value}" for name, value in given.items()]
