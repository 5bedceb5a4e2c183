"""`esper token`."""

import json

import pytest
from pydantic import SecretStr

from esper.cli.main import main
from esper.services.urza.auth import Caller, Role, Tokens

KEY = "a signing key that is long enough for a hub"


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPER_URZA__SIGNING_KEY", KEY)


def ended(capsys, *arguments):
    status = main(["token", *arguments])
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err
    return status, printed.out, printed.err


@pytest.mark.parametrize("role", ["reader", "worker", "admin"])
def test_a_token_opens_the_hub_for_its_role(capsys, role):
    status, out, err = ended(capsys, "--role", role)
    assert (status, err) == (0, "")
    caller = Tokens(SecretStr(KEY)).caller(f"Bearer {out.strip()}")
    assert caller == Caller(Role(role), role)


def test_a_session_token_is_for_one_session(capsys):
    status, out, _ = ended(
        capsys, "--role", "session", "--subject", "uid-7", "--namespace", "team-a", "--json"
    )
    assert status == 0
    made = json.loads(out)
    assert set(made) == {"token", "role", "expiresAt"}
    caller = Tokens(SecretStr(KEY)).caller(f"Bearer {made['token']}")
    assert caller == Caller(Role.SESSION, "uid-7", "team-a")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--role", "session"], "--subject"),
        (["--role", "compiler"], "--subject"),
        (["--role", "reader", "--days", "0"], "--days"),
        (["--role", "reader", "--days", "nan"], "--days"),
        (["--role", "reader", "--days", "1e9"], "--days"),
        (["--role", "reader", "--subject", "a*"], "subject"),
        (["--role", "reader", "--namespace", "a:b"], "namespace"),
    ],
)
def test_what_no_token_can_have_is_refused(capsys, arguments, field):
    status, out, err = ended(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"esper: error: {field}: got ")


def test_without_a_key_there_is_no_token(capsys, monkeypatch):
    monkeypatch.delenv("ESPER_URZA__SIGNING_KEY")
    status, out, err = ended(capsys, "--role", "admin")
    assert (status, out) == (2, "")
    assert "urza.signing_key" in err


def test_an_unknown_role_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["token", "--role", "root"])
    assert caught.value.code == 2
    assert "reader" in capsys.readouterr().err
