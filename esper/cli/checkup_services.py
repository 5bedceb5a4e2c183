"""What `esper doctor` asks of services elsewhere: whether each answers, and to these credentials.

One question each, with a time limit, over the adapters that the services themselves use. Details
name the setting and the address, never a password or a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from esper.cli.wiring import bus_answers, bus_elsewhere, hub_answers, hub_elsewhere
from esper.configs import EsperConfig, without_password
from esper.errors import EsperError, one_line

ANSWER_SECONDS = 10.0

ENCODED = "special characters of a user or a password are written as %XX"

Answer = tuple[bool, str]
"""Whether it answers, and what is to be said of it."""


def bus(config: EsperConfig) -> Answer:
    """The bus at `redis.url`, which a run, Tamiyo and Tezzeret talk to."""

    async def ask() -> str:
        settings = config.redis.model_copy(update={"attempts": 1})
        async with bus_elsewhere(config.model_copy(update={"redis": settings}), None) as found:
            await bus_answers(found)
        return f"{without_password(config.redis.url or '')} answers"

    return _asked("redis.url", ask)


def hub(config: EsperConfig) -> Answer:
    """The hub at `hub.url`, which a run and Tezzeret talk to."""

    async def ask() -> str:
        settings = config.hub.model_copy(update={"attempts": 1})
        async with hub_elsewhere(config.model_copy(update={"hub": settings})) as found:
            await hub_answers(found)
        return f"{config.hub.url} answers and takes the token"

    return _asked("hub.url", ask)


def postgres(config: EsperConfig) -> Answer:
    """The database at `database.url`, which Urza talks to."""

    async def ask() -> str:
        from esper.services.urza.database import Database

        # As Urza opens it: the options of the URL are those of its driver.
        database = Database(config.database)
        try:
            version = await database.server_version()
        finally:
            await database.close()
        return f"{without_password(config.database.url)} answers (PostgreSQL {version})"

    return _asked("database.url", ask)


def bucket(config: EsperConfig) -> Answer:
    """The bucket `storage.bucket`, which Urza talks to."""

    async def ask() -> str:
        from esper.utils.object_store import open_store

        settings = config.storage.model_copy(update={"attempts": 1})
        await open_store(settings).exists("doctor")
        return f"{config.storage.bucket} at {config.storage.endpoint_url or 'Amazon'} answers"

    return _asked("storage.bucket", ask)


def _asked(setting: str, ask: Callable[[], Awaitable[str]]) -> Answer:
    async def in_time() -> str:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await ask()

    try:
        return True, asyncio.run(in_time())
    except TimeoutError:
        return False, f"{setting}: no answer in {ANSWER_SECONDS:g} s"
    except EsperError as error:
        said = str(error)
        return False, one_line(said if said.startswith(setting) else f"{setting}: {said}", 300)
    except OSError as error:
        return False, one_line(f"{setting}: {type(error).__name__}: {error}", 300)
    except ValueError:  # its text may hold a part of the password
        return False, f"{setting}: its value can't be read; {ENCODED}"
    except Exception as error:  # a driver's own, whose text may hold what it was given
        return False, f"{setting}: {type(error).__name__}"
