"""The hub's application in this process, over whatever database a test gives it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from pydantic import SecretStr

from esper.configs import DatabaseConfig, EsperConfig, RedisConfig, StorageConfig, UrzaConfig
from esper.contracts.assets import TrainingSession
from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin
from esper.services.urza.auth import Role, Tokens
from esper.services.urza.main import create_app
from esper.services.urza.store import UrzaHub

KEY = "the key that the tests' tokens are signed with"
DOCUMENT = builtin("low-rank", {"rank": 2})
OTHER = builtin("low-rank", {"rank": 3})
JSON = {"Content-Type": "application/json"}


def target(inputs: int = 4) -> KernelTarget:
    layer = LayerGeometry(kind="Linear", inputs=inputs, outputs=3)
    return KernelTarget(layer=layer, input_shape=(inputs,), output_shape=(3,))


def trained(uid: str = "uid-1", **fields: Any) -> TrainingSession:
    given = {"name": "digits", "uid": uid, "epochs": 5, "num_layers": 2, "num_slots": 1}
    return TrainingSession.model_validate({**given, **fields})


def settings(
    folder: Path, database: str | None = None, redis: str | None = None, **urza: Any
) -> EsperConfig:
    url = database or f"sqlite+aiosqlite:///{folder}/urza.sqlite"
    return EsperConfig(
        database=DatabaseConfig(url=url),
        storage=StorageConfig(folder=str(folder / "artifacts")),
        redis=RedisConfig(url=redis),
        urza=UrzaConfig(signing_key=SecretStr(KEY), **urza),
    )


def token(role: Role = Role.ADMIN, subject: str = "tester", **keywords: Any) -> str:
    return Tokens(SecretStr(KEY)).mint(role, subject, **keywords)


def expired(role: Role = Role.ADMIN) -> str:
    return token(role, expires_at=datetime.now(UTC) - timedelta(minutes=1))


def bearer(role: Role = Role.ADMIN, subject: str = "tester") -> dict[str, str]:
    return {"Authorization": f"Bearer {token(role, subject)}"}


class Client(httpx.AsyncClient):
    """Asks the application without a network; by default as an administrator."""

    def __init__(self, app: FastAPI, **keywords: Any) -> None:
        super().__init__(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://urza.example",
            **keywords,
        )
        self.app = app

    @property
    def hub(self) -> UrzaHub:
        hub: UrzaHub = self.app.state.urza.hub
        return hub


@asynccontextmanager
async def serving(config: EsperConfig, role: Role | None = Role.ADMIN) -> AsyncIterator[Client]:
    """The running application, and a client with a token of that role."""
    app = create_app(config)
    headers = {} if role is None else bearer(role)
    async with app.router.lifespan_context(app), Client(app, headers=headers) as client:
        yield client


def stored_files(folder: Path) -> list[str]:
    """Everything that lies in the object store's folder, hidden files too."""
    root = folder / "artifacts"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


