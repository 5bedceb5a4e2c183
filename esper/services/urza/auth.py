"""Who may do what at the hub: bearer tokens, their roles, and what each role is allowed.

A token is a JSON Web Token (RFC 7519) signed with HMAC-SHA-256 and `urza.signing_key`. Nothing of
it is stored: it is good until it expires, or until the session that it was made for is revoked.
Beside these `urza.admin_token`, where it is set, is good as long as it is set: with it an
installation's operator comes in without a token that ends.

=============  ========  ======  =======  ======  =====
permission     compiler  reader  session  worker  admin
=============  ========  ======  =======  ======  =====
read           yes       yes     yes      yes     yes
list                     yes     its own  yes     yes
see sessions             yes     its own  yes     yes
propose                          yes      yes     yes
keep sessions                    its own  yes     yes
compile        its own                    yes     yes
work                                      yes     yes
administer                                        yes
=============  ========  ======  =======  ======  =====

*read* blueprints, kernels and artifacts by their digests and ids, but a kernel that is not compiled
only whoever uses it (a session's or a namespace's token), compiles it or may *work*; *list* them,
which a session can as far as it uses them; *see sessions*;
*propose* blueprints and ask for kernels; *keep sessions*: register and update them; *compile*:
claim a kernel by its name, and hand in its artifact and result (a compiler's token is of one
kernel); *work*: claim whatever is to be compiled or validated; *administer*: delete, archive, make
credentials, sweep. Of sessions a token that names a namespace reaches those in it alone, and lists
what those use; an administrator's reaches all.
"""

from __future__ import annotations

import hmac
import math
import re
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType

import jwt
from pydantic import SecretStr

from esper.contracts.base import utc_now
from esper.errors import BadInput, ConfigError, Unauthorized

ISSUER = "urza"
INSTALLATION = "installation"
"""Whom the token of `urza.admin_token` is for."""
_REMEMBERED = 256
LEEWAY_SECONDS = 5
"""How far the clocks of two machines may be apart."""

MAX_TOKEN_CHARACTERS = 2048
_ALGORITHM = "HS256"
_HEADER = "a header Authorization: Bearer TOKEN"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")


class Role(StrEnum):
    """What a token is for, the weakest first."""

    COMPILER = "compiler"
    READER = "reader"
    SESSION = "session"
    WORKER = "worker"
    ADMIN = "admin"


class Permission(StrEnum):
    """What an endpoint asks for."""

    READ = "read"
    LIST = "list"
    SEE_SESSIONS = "see sessions"
    PROPOSE = "propose"
    KEEP_SESSIONS = "keep sessions"
    COMPILE = "compile"
    WORK = "work"
    ADMINISTER = "administer"


_COMPILER = frozenset({Permission.READ, Permission.COMPILE})
_READER = frozenset({Permission.READ, Permission.LIST, Permission.SEE_SESSIONS})
_SESSION = _READER | {Permission.PROPOSE, Permission.KEEP_SESSIONS}
_WORKER = _SESSION | {Permission.COMPILE, Permission.WORK}

PERMISSIONS: Mapping[Role, frozenset[Permission]] = MappingProxyType(
    {
        Role.COMPILER: _COMPILER,
        Role.READER: _READER,
        Role.SESSION: _SESSION,
        Role.WORKER: _WORKER,
        Role.ADMIN: _WORKER | {Permission.ADMINISTER},
    }
)


class TooWeak(Unauthorized):
    """The token is good, but its role may not do this."""


@dataclass(frozen=True)
class Caller:
    """Whoever holds a token: its role, whom it was made for, and its namespace.

    That is a session's uid, a kernel, or a name for people to read.
    """

    role: Role
    subject: str
    namespace: str = ""

    @property
    def own_session(self) -> str | None:
        """The uid of the one session whose rows the caller reaches; None: every session's."""
        return self.subject if self.role is Role.SESSION else None

    def require(self, permission: Permission) -> None:
        """Refuse a caller whose role lacks `permission`.

        Raises:
            TooWeak: it does.
        """
        if permission not in PERMISSIONS[self.role]:
            needed = ", ".join(role for role in Role if permission in PERMISSIONS[role])
            raise TooWeak("token's role", self.role.value, needed)

    @property
    def own_namespace(self) -> str | None:
        """The one namespace whose sessions the caller reaches; None: every namespace's.

        Administrators serve the whole hub, whatever their token names.
        """
        return self.namespace if self.role is not Role.ADMIN and self.namespace else None

    def require_namespace(self, namespace: str) -> None:
        """Refuse a token of one namespace on another.

        Raises:
            TooWeak: the token is of a namespace, and another one.
        """
        if self.own_namespace not in {None, namespace}:
            raise TooWeak("namespace", "another than the token's", "the token's own")

    def require_session(self, uid: str) -> None:
        """Refuse a session's token on another session.

        Raises:
            TooWeak: the caller is a session, and another one.
        """
        if self.own_session not in {None, uid}:
            raise TooWeak("session", "another than the token's", "the token's own")

    def require_kernel(self, kernel: str) -> None:
        """Refuse a compiler's token on another kernel.

        Raises:
            TooWeak: the caller compiles one kernel, and another one.
        """
        if self.role is Role.COMPILER and self.subject != kernel:
            raise TooWeak("kernel", "another than the token's", "the token's own")


class Tokens:
    """Makes and reads tokens.

    Args:
        key: what they are signed with, at least 32 characters.
        revoked: the uids of sessions whose tokens are not good any more.
        admin: `urza.admin_token`.
        clock: the time now, in UTC.

    Raises:
        ConfigError: there is no key.
    """

    def __init__(
        self,
        key: SecretStr | None,
        *,
        revoked: Container[str] = frozenset(),
        admin: SecretStr | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        if key is None:
            raise ConfigError("urza.signing_key", None, "a secret of at least 32 characters")
        self._key = key.get_secret_value()
        self._revoked = revoked
        self._admin = None if admin is None else admin.get_secret_value().encode()
        self._clock = clock
        # Signatures of tokens that were good: most requests come with one of few.
        self._known: dict[str, tuple[Caller, float]] = {}

    def mint(
        self,
        role: Role,
        subject: str,
        *,
        namespace: str = "",
        issued_at: datetime | None = None,
        expires_at: datetime | None = None,
        lifetime: timedelta = timedelta(days=30),
    ) -> str:
        """A token for `role`; equal arguments, times included, give the same token.

        Args:
            role: what its holder may do.
            subject: a session's uid, a compiler's kernel, or a name for people to read.
            namespace: the one whose sessions its holder reaches; none for all.
            issued_at: by default now.
            expires_at: by default `issued_at` and `lifetime`.
            lifetime: where `expires_at` is left out.

        Raises:
            BadInput: the subject or the namespace is no name of letters, digits and dashes.
        """
        for field, name in (("subject", subject), ("namespace", namespace or "none")):
            if not _NAME.fullmatch(name):
                raise BadInput(field, name, "1 to 63 letters, digits and dashes")
        since = issued_at or self._clock()
        until = expires_at or since + lifetime
        claims: dict[str, object] = {
            "iss": ISSUER,
            "sub": subject,
            "role": role.value,
            "iat": int(since.timestamp()),
            "exp": int(until.timestamp()),
        }
        if namespace:
            claims["ns"] = namespace
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM)

    def caller(self, authorization: str | None) -> Caller:
        """Whose token stands in an Authorization header.

        Raises:
            Unauthorized: there is none; or it is malformed, signed with another key or
                algorithm, expired or revoked. The message never quotes it.
        """
        if authorization is None:
            raise Unauthorized("token", "none", _HEADER)
        known = self._known.get(authorization)
        if known is None or known[1] <= time.time():
            known = self._read(authorization)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[authorization] = known
        caller = known[0]
        if caller.role is Role.SESSION and caller.subject in self._revoked:
            raise Unauthorized("token", "one of a session that has ended", "a live session's")
        return caller

    def _read(self, authorization: str) -> tuple[Caller, float]:
        """Whose token that is, and the time from 1970 on, in seconds, at which it expires."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or len(token) > MAX_TOKEN_CHARACTERS:
            raise Unauthorized("token", "none of the scheme Bearer", _HEADER)
        if self._admin is not None and hmac.compare_digest(token.encode(), self._admin):
            return Caller(Role.ADMIN, INSTALLATION), math.inf
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[_ALGORITHM],
                issuer=ISSUER,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iat", "iss", "sub"], "verify_iat": False},
            )
            until = float(claims["exp"])
        except jwt.ExpiredSignatureError:
            raise Unauthorized("token", "one that has expired", "a newer one") from None
        except (jwt.InvalidTokenError, ValueError, OverflowError):
            # What the library says may quote the token.
            raise Unauthorized("token", "one that the hub did not sign", "its own") from None
        return _caller(claims), until


def _caller(claims: Mapping[str, object]) -> Caller:
    role, subject, namespace = claims.get("role"), claims["sub"], claims.get("ns", "")
    if not isinstance(role, str) or role not in set(Role):
        raise Unauthorized("token's role", "an unknown one", ", ".join(Role))
    if not isinstance(subject, str) or not isinstance(namespace, str):
        raise Unauthorized("token", "claims of wrong types", "text")
    return Caller(Role(role), subject, namespace)
