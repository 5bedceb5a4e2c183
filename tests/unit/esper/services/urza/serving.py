"""The hub's application, in this process or served on the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from fastapi import FastAPI
from pydantic import SecretStr

from esper.configs import EsperConfig, HubConfig, RedisConfig, StorageConfig, UrzaConfig
from esper.contracts.assets import TrainingSession
from esper.services.urza.auth import Role, Tokens
from esper.services.urza.http_client import HttpUrza
from esper.services.urza.main import create_app, serve
from esper.services.urza.store import UrzaHub
from tests.unit.esper.services.urza.hubs import Place

KEY = "the key that the tests' tokens are signed with"
JSON = {"Content-Type": "application/json"}


def trained(uid: str = "uid-1", **fields: Any) -> TrainingSession:
    given = {"name": "digits", "uid": uid, "epochs": 5, "num_layers": 2, "num_slots": 1}
    return TrainingSession.model_validate({**given, **fields})


def settings(place: Place, redis: str | None = None, **urza: Any) -> EsperConfig:
    return EsperConfig(
        database=place.config(),
        storage=StorageConfig(folder=str(place.artifacts)),
        redis=RedisConfig(url=redis),
        urza=UrzaConfig.model_validate({"signing_key": KEY, "port": 0, **urza}),
    )


def token(role: Role = Role.ADMIN, subject: str = "tester", **keywords: Any) -> str:
    return Tokens(SecretStr(KEY)).mint(role, subject, **keywords)


def expired(role: Role = Role.ADMIN) -> str:
    return token(role, expires_at=datetime.now(UTC) - timedelta(minutes=1))


def bearer(role: Role = Role.ADMIN, subject: str = "tester", namespace: str = "") -> dict[str, str]:
    return {"Authorization": f"Bearer {token(role, subject, namespace=namespace)}"}


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


@asynccontextmanager
async def listening(config: EsperConfig) -> AsyncIterator[str]:
    """The hub served on a free port of the loopback; gives its address."""
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    served = asyncio.create_task(serve(config, stop=stop, started=address.set_result))
    try:
        done, _ = await asyncio.wait({served, address}, return_when=asyncio.FIRST_COMPLETED)
        if address not in done:
            served.result()
        yield address.result()
    finally:
        stop.set()
        await served


@asynccontextmanager
async def over_http(
    config: EsperConfig,
    role: Role = Role.ADMIN,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[HttpUrza]:
    """A client with a token of that role, of a hub served on the loopback."""
    async with listening(config) as url:
        hub = HubConfig(url=url, token=SecretStr(token(role)), backoff_seconds=0.01)
        async with HttpUrza(hub, transport=transport) as client:
            yield client


def stored_files(place: Place) -> list[str]:
    """Everything that lies in the object store's folder, hidden files too."""
    root = place.artifacts
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
