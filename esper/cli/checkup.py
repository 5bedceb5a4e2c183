"""What `esper doctor` looks at: versions, extras, and the places a run reads and writes."""

from __future__ import annotations

import os
import platform
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from esper.cli import checkup_services
from esper.configs import EsperConfig

EXTRAS: dict[str, tuple[str, ...]] = {
    "runtime": ("torch", "safetensors", "numpy", "httpx"),
    "hub": ("sqlalchemy", "aiosqlite", "asyncpg", "alembic", "fastapi", "uvicorn", "jwt"),
    "bus": ("redis",),
    "s3": ("boto3",),
    "report": ("matplotlib",),
    "zoo": ("mnist1d", "sklearn"),
    "bench": ("rliable", "peft", "cachetools"),
}
"""What each extra brings, by module name."""

REQUIRED = ("runtime", "hub")
"""The extras without which `esper run` can't work."""

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "jwt": "pyjwt"}
_RUN = Path("runs/example")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `status` is ok, failed, or missing (not needed to run)."""

    name: str
    status: str
    detail: str


def extra_of(module: str) -> str | None:
    """The extra that brings a module, None where none does."""
    return next((extra for extra, modules in EXTRAS.items() if module in modules), None)


def versions() -> Iterator[tuple[str, str]]:
    """What runs here: Esper, Python, the machine, and each package of the extras."""
    from esper import __version__

    yield "esper", __version__
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    yield "cores", str(os.cpu_count())
    for module in ("pydantic", *(module for modules in EXTRAS.values() for module in modules)):
        try:
            yield module, version(_DISTRIBUTIONS.get(module, module))
        except PackageNotFoundError:
            yield module, "not installed"
    if find_spec("torch") is not None:
        import torch

        yield "torch threads", str(torch.get_num_threads())
        yield "accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def checks(config: EsperConfig) -> Iterator[Check]:
    """Each thing a run needs, looked at without leaving a trace."""
    for extra, modules in EXTRAS.items():
        absent = [module for module in modules if find_spec(module) is None]
        if not absent:
            yield Check(f"extra {extra}", "ok", ", ".join(modules))
        else:
            status = "failed" if extra in REQUIRED else "missing"
            detail = f"no {', '.join(absent)}; install with: pip install 'esper[{extra}]'"
            yield Check(f"extra {extra}", status, detail)
    here = config.inside(_RUN)
    if here.database.url.startswith("postgresql"):
        yield _elsewhere("database", checkup_services.postgres(here))
    else:
        yield _database(Path(here.database.url.partition(":///")[2].partition("?")[0]))
    if here.storage.bucket is not None:
        yield _elsewhere("storage", checkup_services.bucket(here))
    else:
        yield _folder("storage", Path(here.storage.folder))
    for name, url, ask in (
        ("bus", here.redis.url, checkup_services.bus),
        ("hub", here.hub.url, checkup_services.hub),
    ):
        yield Check(name, "ok", "in-process") if url is None else _elsewhere(name, ask(here))


def _elsewhere(name: str, answer: checkup_services.Answer) -> Check:
    answers, detail = answer
    return Check(name, "ok" if answers else "failed", detail)


def _database(path: Path) -> Check:
    if not path.is_file():
        return _folder("database", path.parent)
    try:
        # mode=rw: looking must not make a database where there is none
        connection = sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=2)
        try:
            connection.execute("PRAGMA schema_version").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Check("database", "failed", f"{path}: {error}")
    return Check("database", "ok", f"{path} opens (SQLite {sqlite3.sqlite_version})")


def _folder(name: str, folder: Path) -> Check:
    """Whether the folder could be made and written; a look leaves no trace."""
    existing = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if not existing.is_dir():
        return Check(name, "failed", f"{existing} is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, "failed", f"{existing} can't be written")
    return Check(name, "ok", f"{existing} can be written")
