"""A session that ended well in an earlier process: bus and hub are told of it once more.

The process that trained it may have ended before they heard of it all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from typing import Any

import yaml

from esper.cli.closing import Closing
from esper.cli.preparing import uid_of
from esper.cli.run_checkpoints import run_checkpoints
from esper.cli.trainers import tell_success
from esper.cli.wiring import bus_elsewhere, hub_elsewhere
from esper.configs import EsperConfig
from esper.contracts.assets import TrainingSession
from esper.contracts.enums import SessionOutcome
from esper.contracts.manifests import Manifest
from esper.errors import EsperError
from esper.services.oona_client import InProcessOona, Oona
from esper.services.tolaria.boundary import BusController
from esper.services.tolaria.news import News, Numbering
from esper.services.tolaria.patience import HUB, IN_PROCESS, Patience
from esper.services.tolaria.run_directory import RunDirectory
from esper.services.tolaria.seeds import SeedBook
from esper.services.urza.client import UrzaClient, in_process_urza

SECONDS = 5.0
"""How long a person who shows a finished run once more waits for services that are away."""

_log = logging.getLogger(__name__)


async def tell_again(
    run: RunDirectory,
    manifest: Manifest,
    result: Mapping[str, Any],
    config: EsperConfig,
    *,
    lasting: bool,
    stopping: Callable[[], bool],
) -> None:
    """Tell bus and hub of a finished run; what can't be told is logged.

    Args:
        run: its directory.
        manifest: the one in it.
        result: what it came to.
        config: names real places (see `EsperConfig.inside`).
        lasting: services that are away are waited for as long as the session says; else for
            `SECONDS` at most.
        stopping: whether the waiting should end.
    """
    asset, news = _asset(run, manifest), await asyncio.to_thread(_news, run, manifest, config)
    seconds = manifest.session.spec.growth.controller.patience_seconds
    wired = config.redis.url is not None
    patience = IN_PROCESS
    if wired:
        limit = seconds if lasting else min(SECONDS, seconds or SECONDS)
        patience = Patience(lasting=True, seconds=limit, stopping=stopping)
    closing = Closing()
    try:
        async with AsyncExitStack() as stack:
            bus, hub = await stack.enter_async_context(_services(config, asset.uid, closing))
            wait = patience.begin()
            session = await wait.outlast(partial(hub.register_session, asset), by=HUB)
            controller = await BusController.over(bus, scope=asset.uid, patience=patience)
            try:
                await controller.tell(news)
                ended = session.changed(
                    outcome=SessionOutcome.SUCCEEDED, epoch=min(result["epochs"], session.epochs)
                )
                await tell_success(ended, hub, controller, patience)
            finally:
                await closing.do(controller.close())
    except EsperError as error:
        _log.warning("the hub may not know that session %s succeeded: %s", asset.name, error)


@asynccontextmanager
async def _services(
    config: EsperConfig, scope: str, closing: Closing
) -> AsyncIterator[tuple[Oona, UrzaClient]]:
    if config.redis.url is not None:
        async with bus_elsewhere(config, scope, closing) as bus, hub_elsewhere(config) as hub:
            yield bus, hub
    else:
        async with in_process_urza(config.database, config.storage) as own:
            yield InProcessOona(), own


def _asset(run: RunDirectory, manifest: Manifest) -> TrainingSession:
    """The session, for a hub that does not know it any more."""
    metadata, spec = manifest.session.metadata, manifest.session.spec
    status = yaml.safe_load((run.path / "status.yaml").read_text(encoding="utf-8"))["status"]
    fields: dict[str, Any] = {} if metadata.namespace is None else {"namespace": metadata.namespace}
    return TrainingSession(
        name=metadata.name,
        uid=uid_of(manifest),
        epochs=spec.training.epochs,
        num_layers=len(status.get("layers", ())),
        num_slots=spec.growth.seeds_per_layer,
        **fields,
    )


def _news(run: RunDirectory, manifest: Manifest, config: EsperConfig) -> list[News]:
    """All that was told, under the ids and the traces that it was told under.

    The traces stand in the newest checkpoint; where that can't be had it is told without them.
    """
    book = SeedBook()
    try:
        with closing(run_checkpoints(manifest, run.path, config)) as checkpoints:
            found = checkpoints.newest()
        book = SeedBook.from_state(found.snapshot.state["book"]) if found else book
    except EsperError as error:
        _log.warning("what is told again has no trace ids: %s", error)
    told = run.told(manifest.session.metadata.name)
    numbering = Numbering()
    return [numbering.news(item, book.trace_of(item)) for item in told]
