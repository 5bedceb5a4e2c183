"""The servers that `services_hub` compares, each started as a process: `… urza` or `… bare`.

The address is the one line on standard output; SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import uvicorn
from fastapi import Body, FastAPI, HTTPException
from pydantic import SecretStr

from esper.configs import DatabaseConfig, EsperConfig, StorageConfig, UrzaConfig
from esper.contracts.base import canonical_json
from esper.contracts.blueprints import KernelTarget, kernel_id
from esper.services.urza.database import Database
from esper.services.urza.main import serve

_READ = """
SELECT k.id, k.created_at, k.updated_at, k.version, k.archived_at, k.kernel, k.target, k.state,
       k.claimed_by, k.lease_token, k.lease_expires_at, k.artifact_digest, k.artifact_bytes,
       k.figures, k.error, b.digest AS blueprint_digest, b.document
FROM compiled_kernels k JOIN blueprints b ON b.id = k.blueprint_id WHERE k.kernel = $1
"""
_CREATE = """
INSERT INTO blueprints (id, created_at, updated_at, version, digest, document, state)
VALUES ($1, $2, $2, 1, $3, $4, 'proposed') ON CONFLICT DO NOTHING
RETURNING id, created_at, updated_at, digest, document, state
"""
_REQUEST = """
INSERT INTO compiled_kernels (id, created_at, updated_at, version, kernel, blueprint_id, target,
                              state)
SELECT $1, $2, $2, 1, $3, id, $4, 'proposed' FROM blueprints WHERE digest = $5
RETURNING kernel
"""


def bare(database: str) -> FastAPI:
    """What one would write in an afternoon: FastAPI, a pool of asyncpg, two handlers."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        plain = database.replace("postgresql+asyncpg", "postgresql")
        async with asyncpg.create_pool(plain, min_size=1, max_size=5) as pool:
            app.state.pool = pool
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/api/v1/kernels/{kernel}")
    async def read(kernel: str) -> dict[str, Any]:
        row = await app.state.pool.fetchrow(_READ, kernel)
        if row is None:
            raise HTTPException(404)
        return {**row, "target": json.loads(row["target"])}

    @app.post("/api/v1/blueprints/", status_code=201)
    async def create(document: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
        digest = hashlib.sha256(
            canonical_json({"hosts": sorted(document["hosts"]), "graph": document["graph"]})
        ).hexdigest()
        async with app.state.pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                _CREATE, uuid.uuid4(), datetime.now(UTC), digest, json.dumps(document)
            )
        return {} if row is None else {**row, "document": json.loads(row["document"])}

    @app.post("/api/v1/kernels/", status_code=201)
    async def request(creation: dict[str, Any]) -> dict[str, Any]:
        target = KernelTarget.model_validate(creation["target"])
        digest = creation["blueprintDigest"]
        key, wire = kernel_id(digest, target), json.dumps(creation["target"])
        now = datetime.now(UTC)
        await app.state.pool.fetchrow(_REQUEST, uuid.uuid4(), now, key, wire, digest)
        return {"kernel": key}

    return app


async def main(kind: str) -> None:
    """Serve until SIGTERM."""
    database, stop = os.environ["BENCHMARK_DATABASE"], asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    def announce(address: str) -> None:
        print(address, flush=True)

    config = EsperConfig(
        database=DatabaseConfig(url=database),
        storage=StorageConfig(folder=str(Path(os.environ["BENCHMARK_FOLDER"]) / "artifacts")),
        urza=UrzaConfig(port=0, signing_key=SecretStr(os.environ["BENCHMARK_KEY"])),
    )
    if kind == "urza":
        await serve(config, stop=stop, started=announce)
        return
    async with Database(config.database):  # the same tables
        pass
    server = uvicorn.Server(
        uvicorn.Config(bare(database), port=0, log_config=None, access_log=False)
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    announce(f"http://{host}:{port}")
    await stop.wait()
    server.should_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
