"""Tokens: what they carry, what is refused, and what each role may do."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from pydantic import SecretStr

from esper.errors import BadInput, ConfigError, Unauthorized
from esper.services.urza.auth import (
    INSTALLATION,
    LEEWAY_SECONDS,
    MAX_TOKEN_CHARACTERS,
    PERMISSIONS,
    Caller,
    Permission,
    Role,
    Tokens,
    TooWeak,
)

KEY = "a key that only these tests are signed with"
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def tokens(**keywords: Any) -> Tokens:
    return Tokens(SecretStr(KEY), clock=lambda: NOW, **keywords)


def forged(key: str = KEY, algorithm: str = "HS256", **changes: Any) -> str:
    """A token as the hub makes them, with changes; a value of None leaves the claim out."""
    now = int(datetime.now(UTC).timestamp())
    claims = {"iss": "urza", "sub": "me", "role": "admin", "iat": now, "exp": now + 600}
    kept = {name: value for name, value in (claims | changes).items() if value is not None}
    return jwt.encode(kept, key, algorithm=algorithm)


def refusal(token: str, **keywords: Any) -> str:
    with pytest.raises(Unauthorized) as caught:
        tokens(**keywords).caller(f"Bearer {token}")
    assert type(caught.value) is Unauthorized
    assert token not in str(caught.value) + repr(caught.value.__cause__)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


@pytest.mark.parametrize("role", Role)
def test_a_token_says_who_holds_it(role: Role) -> None:
    made = Tokens(SecretStr(KEY)).mint(role, "3f2c-uid", namespace="team-a")
    assert tokens().caller(f"Bearer {made}") == Caller(role, "3f2c-uid", "team-a")
    assert tokens().caller(f"bearer {made}").role is role


def test_equal_arguments_give_the_same_token() -> None:
    until = NOW + timedelta(days=3)
    first = tokens().mint(Role.SESSION, "uid", issued_at=NOW, expires_at=until)
    assert first == tokens().mint(Role.SESSION, "uid", issued_at=NOW, expires_at=until)
    assert first != tokens().mint(Role.SESSION, "other", issued_at=NOW, expires_at=until)
    claims = jwt.decode(first, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 3 * 86400
    assert "ns" not in claims


def test_a_token_lasts_as_long_as_it_says() -> None:
    now = int(datetime.now(UTC).timestamp())
    assert tokens().caller("Bearer " + forged(exp=now - LEEWAY_SECONDS + 2)).role is Role.ADMIN
    assert "expired" in refusal(forged(exp=now - LEEWAY_SECONDS - 2))


def test_a_token_that_was_good_is_refused_once_it_has_expired() -> None:
    token = forged(exp=int(time.time()) - LEEWAY_SECONDS + 2)
    read = tokens()
    # Within the leeway it is read anew each time, and not remembered as good for ever.
    assert read.caller(f"Bearer {token}").role is Role.ADMIN
    time.sleep(2.1)
    with pytest.raises(Unauthorized, match="expired"):
        read.caller(f"Bearer {token}")


def test_only_so_many_good_tokens_are_remembered() -> None:
    read = tokens()
    for number in range(600):
        assert read.caller("Bearer " + forged(sub=f"me-{number}")).subject == f"me-{number}"
    assert len(read._known) <= 256


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Basic bWU6bWU=", "Token abc", "Bearer " + "x" * 3000]
)
def test_what_is_no_bearer_token_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthorized, match=r"token: got .*; allowed: "):
        tokens().caller(header)


def unsigned() -> str:
    def part(data: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(data).encode()).rstrip(b"=").decode()

    claims = {"iss": "urza", "sub": "me", "role": "admin", "iat": 1, "exp": 2**33}
    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims)}."


FOREIGN: list[Callable[[], str]] = [
    lambda: "abc",
    lambda: "a.b.c",
    lambda: "é.é.é",
    lambda: "..",
    lambda: unsigned(),
    lambda: forged(key="another key, as long as the right one is"),
    lambda: forged(algorithm="HS512"),
    lambda: forged() + "x",
    lambda: forged()[:-3],
    lambda: forged(iss="someone"),
    lambda: forged(iss=None),
    lambda: forged(sub=None),
    lambda: forged(exp=None),
    lambda: forged(iat=None),
    lambda: forged(exp="soon"),
    lambda: forged(exp=10**400),
    lambda: forged(role="root"),
    lambda: forged(role=None),
    lambda: forged(role=["admin"]),
    lambda: forged(ns=3),
]


# By number: a token holds when it was made, and every worker of the tests must name the same ones.
@pytest.mark.parametrize("number", range(len(FOREIGN)))
def test_a_token_that_the_hub_did_not_make_is_refused(number: int) -> None:
    token = FOREIGN[number]()
    refusal(token)


def test_the_tokens_of_a_revoked_session_are_refused() -> None:
    revoked = {"gone"}
    good, gone = forged(sub="here", role="session"), forged(sub="gone", role="session")
    assert tokens(revoked=revoked).caller(f"Bearer {good}").subject == "here"
    assert "ended" in refusal(gone, revoked=revoked)
    # Only sessions are revoked; a person of that name is someone else.
    assert tokens(revoked=revoked).caller("Bearer " + forged(sub="gone")).role is Role.ADMIN
    revoked.clear()
    assert tokens(revoked=revoked).caller(f"Bearer {gone}").subject == "gone"


@pytest.mark.parametrize("name", ["", "*", "a:b", "a b", "-a", "a" * 64, "ü", "a\n"])
@pytest.mark.parametrize("field", ["subject", "namespace"])
def test_names_that_could_be_patterns_get_no_token(field: str, name: str) -> None:
    if field == "namespace" and not name:
        return
    names = {"subject": "me", "namespace": "here"} | {field: name}
    with pytest.raises(BadInput, match=field):
        tokens().mint(Role.READER, names["subject"], namespace=names["namespace"])


def test_the_longest_token_is_read() -> None:
    made = Tokens(SecretStr(KEY)).mint(Role.SESSION, "s" * 63, namespace="n" * 63)
    assert len(made) < MAX_TOKEN_CHARACTERS
    assert tokens().caller(f"Bearer {made}").subject == "s" * 63


def test_without_a_key_there_are_no_tokens() -> None:
    with pytest.raises(ConfigError, match=r"urza\.signing_key"):
        Tokens(None)


MAY = {
    Role.COMPILER: "read, compile",
    Role.READER: "read, list, see sessions",
    Role.SESSION: "read, list, see sessions, propose, keep sessions",
    Role.WORKER: "read, list, see sessions, propose, keep sessions, compile, work",
    Role.ADMIN: "read, list, see sessions, propose, keep sessions, compile, work, administer",
}


@pytest.mark.parametrize("role", Role)
def test_the_permissions_of_each_role_are_frozen(role: Role) -> None:
    assert PERMISSIONS[role] == set(MAY[role].split(", "))
    for permission in Permission:
        if permission in PERMISSIONS[role]:
            Caller(role, "me").require(permission)
        else:
            with pytest.raises(TooWeak, match=f"got {role}; allowed: .*admin"):
                Caller(role, "me").require(permission)


def test_a_session_reaches_its_own_rows_only() -> None:
    Caller(Role.SESSION, "mine").require_session("mine")
    with pytest.raises(TooWeak, match="the token's own") as caught:
        Caller(Role.SESSION, "mine").require_session("yours")
    assert "yours" not in str(caught.value)
    for role in (Role.READER, Role.WORKER, Role.ADMIN):
        Caller(role, "mine").require_session("yours")


def test_a_compiler_compiles_its_own_kernel_only() -> None:
    Caller(Role.COMPILER, "mine").require_kernel("mine")
    with pytest.raises(TooWeak, match="the token's own"):
        Caller(Role.COMPILER, "mine").require_kernel("another")
    for role in (Role.WORKER, Role.ADMIN):
        Caller(role, "mine").require_kernel("another")


def test_all_but_administrators_reach_the_namespace_of_their_token_only() -> None:
    for role in (Role.READER, Role.SESSION, Role.WORKER):
        Caller(role, "me", "team-a").require_namespace("team-a")
        Caller(role, "me").require_namespace("team-b")
        with pytest.raises(TooWeak, match="the token's own") as caught:
            Caller(role, "me", "team-a").require_namespace("team-b")
        assert "team-b" not in str(caught.value)
    Caller(Role.ADMIN, "me", "team-a").require_namespace("team-b")


def test_the_installations_token_is_an_admins_as_long_as_it_is_set() -> None:
    own = "the-token-of-an-installation-000000"
    known = tokens(admin=SecretStr(own))
    assert known.caller(f"Bearer {own}") == Caller(Role.ADMIN, INSTALLATION)
    assert known.caller(f"Bearer {own}").role is Role.ADMIN  # remembered, and still good
    for wrong in (own[:-1], own + "0", own.upper(), "\xe9" * 40):
        assert refusal(wrong, admin=SecretStr(own))
    assert refusal(own)


def test_the_key_is_shown_nowhere() -> None:
    assert KEY not in repr(tokens()) + str(vars(Tokens)) + repr(SecretStr(KEY))
