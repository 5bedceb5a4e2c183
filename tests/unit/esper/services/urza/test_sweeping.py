"""The operator's sweep of what sessions have left, whatever its clock says beside the hub's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from esper.configs import HubConfig
from esper.contracts.base import utc_now
from esper.services.urza.api import internal
from esper.services.urza.http_client import HttpUrza
from esper_operator.scope import Scope
from esper_operator.sweeping import Sweep
from tests.unit.esper.services.urza.serving import serving, settings, token


class Cluster:
    """An API server that has no session; one is made while it is being listed."""

    def __init__(self, hub: HttpUrza) -> None:
        self._hub = hub

    async def chunks(self, *asked: Any, **how: Any) -> AsyncIterator[tuple[list[Any], str]]:
        """The list, from before the new session."""
        await self._hub.session_credentials("made-meanwhile", "team")
        yield [], "1"


class Heard:
    """What was heard of sessions."""

    def keep_only(self, uids: set[str]) -> None:
        """Nothing was."""


@pytest.fixture
def place(sqlite_place: Any) -> Any:
    return sqlite_place


@pytest.mark.parametrize("apart", [timedelta(hours=-1), timedelta(0), timedelta(hours=1)])
def test_a_sweep_ends_what_was_gone_and_leaves_what_is_new_however_far_the_clocks_are_apart(
    place: Any, monkeypatch: pytest.MonkeyPatch, apart: timedelta
) -> None:
    earlier = timedelta(0)

    def clock() -> Any:
        return utc_now() + apart + earlier

    async def life() -> None:
        nonlocal earlier
        async with serving(settings(place)) as client:
            client.hub._clock = clock  # as on a machine of its own
            monkeypatch.setattr(internal, "utc_now", clock)
            transport = httpx.ASGITransport(client.app)
            config = HubConfig(url="http://urza.example", token=SecretStr(token()))
            async with HttpUrza(config, transport=transport) as hub:
                earlier = -timedelta(minutes=1)
                await hub.session_credentials("gone", "team")
                earlier = timedelta(0)
                cluster: Any = Cluster(hub)
                heard: Any = Heard()
                await Sweep(cluster, hub, heard, scope=Scope(), every=60.0).once()
            revoked = await client.hub.list_credentials("team", revoked=True)
            live = await client.hub.list_credentials("team", revoked=False)
            assert [row.uid for row in revoked] == ["gone"]
            assert [row.uid for row in live] == ["made-meanwhile"]

    asyncio.run(life())
