"""What opens a session's rows and streams: made from the hub's key, kept nowhere.

The hub's token and the Redis password of a session follow from `urza.signing_key`, the session's
uid and the time that the hub first made them for it. So asking again, or asking another process of
the same hub, gives the same ones, and the database holds no secret.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime, timedelta

from pydantic import SecretStr

from esper.contracts.messages import TopicNames
from esper.services.contracts import (
    IssuedCredentials,
    KernelCredentials,
    OperatorCredentials,
    SessionCredentials,
)
from esper.services.urza.auth import Role, Tokens
from esper.services.urza.redis_users import OPERATOR_USER, RedisUser, namespace_user, session_user

TAMIYO = "tamiyo"
KERNEL_DAYS = 1
"""How long a compile Job's token lasts at least: it has an hour of work at most."""
_TOLARIA_PUBLISHES = (
    TopicNames.PACKETS,
    TopicNames.TRANSITIONS,
    TopicNames.EVENTS,
    TopicNames.STATUS,
    TopicNames.KERNEL_REQUESTED,
)
_TOLARIA_RECEIVES = (TopicNames.DECISIONS, TopicNames.KERNEL_READY)
_OPERATOR_RECEIVES = (
    TopicNames.STATUS,
    TopicNames.TRANSITIONS,
    TopicNames.EVENTS,
    TopicNames.KERNEL_REQUESTED,
)


class Secrets:
    """Derives tokens, Redis users and their passwords.

    Args:
        key: `urza.signing_key`.
        tokens: signs with the same key.
        has_redis: whether there is a Redis to have users in.
    """

    def __init__(self, key: SecretStr, tokens: Tokens, *, has_redis: bool) -> None:
        self._key = key.get_secret_value().encode()
        self._tokens = tokens
        self._has_redis = has_redis

    def session_user(self, row: SessionCredentials) -> RedisUser:
        """The Redis user of a session's Tolaria; it reaches that session's streams."""
        made = row.created_at.isoformat()
        return RedisUser(
            name=session_user(row.namespace, row.uid),
            password=self._derived("session", row.namespace, row.uid, made),
            streams=f"esper:{row.namespace}:{row.uid}",
            publishes=_TOLARIA_PUBLISHES,
            receives=_TOLARIA_RECEIVES,
        )

    def namespace_user(self, namespace: str) -> RedisUser:
        """The Redis user of a namespace's Tamiyo; it reaches the streams of all its sessions."""
        return RedisUser(
            name=namespace_user(namespace),
            password=self._derived("namespace", namespace),
            streams=f"esper:{namespace}:*",
            publishes=(TopicNames.DECISIONS,),
            receives=(TopicNames.PACKETS,),
            scans=True,
        )

    def operator_user(self) -> RedisUser:
        """The Redis user of the operator; it reaches the streams of all namespaces."""
        return RedisUser(
            name=OPERATOR_USER,
            password=self._derived("operator"),
            streams="esper:*:*",
            publishes=(TopicNames.KERNEL_READY,),
            receives=_OPERATOR_RECEIVES,
            scans=True,
        )

    def of_session(self, row: SessionCredentials) -> IssuedCredentials:
        """What the session with that row is given."""
        token = self._tokens.mint(
            Role.SESSION,
            row.uid,
            namespace=row.namespace,
            issued_at=row.created_at,
            expires_at=row.expires_at,
        )
        return self._issued(row.namespace, token, row.expires_at, self.session_user(row), row.uid)

    def of_namespace(self, namespace: str, now: datetime, days: int) -> IssuedCredentials:
        """What the namespace's Tamiyo is given; its token is the same for all of a UTC day."""
        since, until = _day(now, days)
        token = self._tokens.mint(
            Role.READER, TAMIYO, namespace=namespace, issued_at=since, expires_at=until
        )
        return self._issued(namespace, token, until, self.namespace_user(namespace), None)

    def of_operator(self) -> OperatorCredentials:
        """What the operator is given."""
        user = self.operator_user()
        return OperatorCredentials(
            redis_username=user.name if self._has_redis else None,
            redis_password=user.password if self._has_redis else None,
        )

    def of_kernel(self, kernel: str, now: datetime) -> KernelCredentials:
        """What the kernel's compile Job is given; the same for all of a UTC day."""
        since, until = _day(now, KERNEL_DAYS)
        token = self._tokens.mint(Role.COMPILER, kernel, issued_at=since, expires_at=until)
        return KernelCredentials(kernel=kernel, hub_token=token, expires_at=until)

    def _issued(
        self, namespace: str, token: str, until: datetime, user: RedisUser, uid: str | None
    ) -> IssuedCredentials:
        return IssuedCredentials(
            uid=uid,
            namespace=namespace,
            hub_token=token,
            redis_username=user.name if self._has_redis else None,
            redis_password=user.password if self._has_redis else None,
            expires_at=until,
        )

    def _derived(self, *parts: str) -> str:
        # Parts are names and times: none holds the separator.
        text = "\n".join(("redis", *parts)).encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()


def _day(now: datetime, days: int) -> tuple[datetime, datetime]:
    """The beginning of the UTC day of `now`, and the end of the day so many days later."""
    since = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return since, since + timedelta(days=days + 1)
