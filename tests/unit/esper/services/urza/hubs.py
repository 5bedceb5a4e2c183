"""What the tests of the hub share: places for a hub, and things to put into it."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from esper.configs import DatabaseConfig
from esper.contracts.blueprints import BlueprintDocument, KernelTarget, LayerGeometry, builtin
from esper.contracts.kernels import KernelFigures, KernelMetadata
from esper.services.urza.database import Database
from esper.services.urza.store import UrzaHub
from esper.utils.object_store import FolderStore

DOCUMENT = builtin("low-rank", {"rank": 2})
OTHER = builtin("low-rank", {"rank": 3})
DATA = b"the artifact's bytes"
DIGEST = hashlib.sha256(DATA).hexdigest()
UNKNOWN = "f" * 40


@dataclass(frozen=True)
class Place:
    """Where a hub keeps its rows and its artifacts."""

    url: str
    folder: Path

    def config(self, **fields: object) -> DatabaseConfig:
        return DatabaseConfig.model_validate({"url": self.url, **fields})

    @property
    def is_postgres(self) -> bool:
        return self.url.startswith("postgresql")

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"


class Clock:
    """A clock that is moved on by hand."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@asynccontextmanager
async def opened(
    place: Place, *, clock: Callable[[], datetime] | None = None, **fields: object
) -> AsyncIterator[UrzaHub]:
    async with Database(place.config(**fields)) as database:
        store = FolderStore(place.artifacts)
        yield UrzaHub(database, store, clock=clock) if clock else UrzaHub(database, store)


def target(inputs: int = 4) -> KernelTarget:
    layer = LayerGeometry(kind="Linear", inputs=inputs, outputs=3)
    return KernelTarget(layer=layer, input_shape=(inputs,), output_shape=(3,))


def described(kernel: str, **fields: object) -> KernelMetadata:
    figures = KernelFigures(
        parameters=14,
        flops=84,
        parameter_bytes=56,
        latency_microseconds=1.5,
        latency_batch=2,
        device="cpu",
        threads=1,
    )
    return KernelMetadata.model_validate(
        {
            "kernel": kernel,
            "blueprint_digest": DOCUMENT.digest,
            "artifact_digest": DIGEST,
            "artifact_bytes": len(DATA),
            "figures": figures,
            **fields,
        }
    )


async def requested(hub: UrzaHub, document: BlueprintDocument = DOCUMENT, inputs: int = 4) -> str:
    await hub.put_blueprint(document)
    return (await hub.request_kernel(document.digest, target(inputs))).kernel
