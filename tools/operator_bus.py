"""What a session's trainer says on the bus, said by a test."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from esper.configs import RedisConfig
from esper.contracts.blueprints import KernelTarget, builtin, kernel_id
from esper.contracts.enums import ComponentType
from esper.contracts.messages import KernelRequested, OonaMessage, TopicNames
from esper.contracts.operational import SessionSnapshot
from esper.services.oona_client import OonaClient


class Trainer:
    """Tolaria of one session, as the bus knows it."""

    def __init__(self, redis_url: str, namespace: str, session: dict[str, Any]) -> None:
        """`redis_url` opens all streams; `session` is the object."""
        self._config = RedisConfig(url=redis_url, namespace=namespace)
        self._uid = session["metadata"]["uid"]
        self._name = session["metadata"]["name"]
        self._sequence = 0

    def stands(self, **fields: Any) -> None:
        """Tell how the session stands."""
        self._sequence += 1
        given = {
            "session": self._name,
            "attempt": 1,
            "sequence": self._sequence,
            "epochs": 10,
            "time": datetime.now(UTC),
            **fields,
        }
        self._say(TopicNames.STATUS, SessionSnapshot.model_validate(given, by_name=True))

    def asks(self, blueprint: str, target: KernelTarget, **arguments: Any) -> str:
        """Ask for a kernel of a built-in blueprint; returns its id."""
        document = builtin(blueprint, arguments)
        kernel = kernel_id(document.digest, target)
        asked = KernelRequested(
            session=self._name,
            kernel=kernel,
            blueprint=blueprint,
            blueprint_digest=document.digest,
            target=target,
        )
        self._say(TopicNames.KERNEL_REQUESTED, asked)
        return kernel

    def _say(self, topic: TopicNames, payload: Any) -> None:
        message = OonaMessage.carrying(topic, payload, ComponentType.TOLARIA, scope=self._uid)

        async def say() -> None:
            bus = OonaClient(self._config, scope=self._uid)
            await bus.publish(message)
            await bus.close()

        asyncio.run(say())
