"""Tokens, keys and passwords among the settings are used, and neither shown nor quoted."""

import pytest

from esper.cli.main import main
from esper.configs import MAXIMUM_FILE_BYTES, parse_assignments
from esper.errors import ConfigError
from tests.unit.esper.test_configs import load


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("token", ["with space", "new\nline", "pässword", "a\x00b"])
def test_a_token_that_no_header_carries_is_refused_unseen(token):
    with pytest.raises(ConfigError) as caught:
        load({}, {"ESPER_HUB__TOKEN": token})
    shown = f"{caught.value} {caught.value!r} {caught.value.came} {caught.value.__cause__}"
    assert "hub.token (environment ESPER_HUB__TOKEN)" in shown
    assert token not in shown


def test_a_token_is_used_and_never_shown():
    config = load({"hub.token": "sesame", "hub.url": "https://hub.example/base"})
    assert config.hub.token.get_secret_value() == "sesame"
    settings = {setting.name: setting for setting in config.settings()}
    assert settings["hub.token"].value == "(not shown)"
    assert settings["hub.token"].origin == "command line --set hub.token"
    shown = f"{config!r} {config} {config.model_dump()} {config.model_dump_json()} {settings}"
    assert "sesame" not in shown
    assert load({"hub.token": ""}).hub.token is None


def test_the_key_of_the_store_is_never_shown():
    config = load(
        {"storage.secret_access_key": "sesame", "storage.access_key_id": "me"},
        {"ESPER_STORAGE__BUCKET": "kernels"},
    )
    assert config.storage.secret_access_key.get_secret_value() == "sesame"
    settings = {setting.name: setting.value for setting in config.settings()}
    assert settings["storage.secret_access_key"] == "(not shown)"
    assert settings["storage.access_key_id"] == "me"
    assert "sesame" not in f"{config!r} {config.model_dump_json()} {settings}"
    with pytest.raises(ConfigError) as caught:
        load({"storage.secret_access_key": "ses ame"})
    assert "ses ame" not in f"{caught.value!r} {caught.value.__cause__}"


def test_doctor_does_not_show_the_token(capsys):
    arguments = ["doctor", "--set", "hub.token=sesame"]
    for form in (arguments, [*arguments, "--json"]):
        assert main(form) == 0
        shown = capsys.readouterr()
        assert "sesame" not in shown.out + shown.err
        assert "(not shown)" in shown.out


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("redis: redis://:hunter2@h:6379", "redis (file esper.yaml): got a text"),
        ("hub: hunter2token", "hub (file esper.yaml): got a text"),
        ("hunter2token", "esper.yaml: got a text"),
        ("- hunter2", "esper.yaml: got a list"),
        ("redis: {url: [redis://:hunter2@h]}", "redis.url (file esper.yaml): got ['redis://:***@h"),
        ("hub:\n  token: hunter2: x", "esper.yaml:2:17: got broken YAML"),
        ("hub:\n  token: *hunter2", "esper.yaml:2:10: got broken YAML: found undefined alias …"),
        ("hub:\n  token: !hunter2 x", "esper.yaml:2:10: got a tag"),
        ("hub:\n  token: !!int hunter2", "esper.yaml:2:10: got another value"),
        ("hub:\n  token: 'hunter2", "esper.yaml:2:18: got broken YAML"),
        ("hub: {token: hunter2}\n---\nhub: {}", "esper.yaml: got 2 documents"),
        ("hub:\n  token: hunter2\n  token: hunter3", "esper.yaml:3:3: got key 'token' twice"),
        ("hub: {token: hunter2}\nhub: {}", "esper.yaml:2:1: got key 'hub' twice"),
    ],
)
def test_a_settings_file_that_is_wrong_is_never_quoted(empty_directory, file, said):
    (empty_directory / "esper.yaml").write_text(file)
    with pytest.raises(ConfigError) as caught:
        load()
    assert said in str(caught.value)
    shown = f"{caught.value!r} {caught.value.__cause__} {caught.value.came}"
    assert "hunter" not in shown + str(caught.value)


def test_an_assignment_without_a_sign_is_not_quoted():
    with pytest.raises(ConfigError, match=r"got redis\.url without a value") as caught:
        parse_assignments(["redis.url:redis://:hunter2@h"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("hub.tokens", b"hunter2", "got hub.tokens; allowed: one of database.url"),
        (
            "hub.token",
            b"hunter2 \xff",
            "hub.token: got invalid start byte at byte 8; allowed: UTF-8",
        ),
        ("hub.token", b"hunter2 x", r"hub.token \(file .*/hub.token\): got \(not shown\)"),
        ("hub.token", b"h" * (MAXIMUM_FILE_BYTES + 1), "allowed: at most"),
    ],
)
def test_a_wrong_file_in_a_folder_of_settings_is_named_unseen(empty_directory, name, content, said):
    (empty_directory / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load(file=empty_directory)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+asyncpg://u:p@h/db", "postgresql+asyncpg://u:***@h/db"),
        ("postgresql+asyncpg://u:p@s:s/w?@h:5432/db", "postgresql+asyncpg://u:***@h:5432/db"),
        ("postgresql+asyncpg://:p@h/db", "postgresql+asyncpg://:***@h/db"),
        (
            "postgresql+asyncpg:///db?host=/run&password=p&x=1",
            "postgresql+asyncpg:///db?***",
        ),
        ("postgresql+asyncpg://h:5432/db?pass%77ord=p", "postgresql+asyncpg://h:5432/db?***"),
        ("postgresql+asyncpg://h:5432/db?password=a@b", "postgresql+asyncpg://h:***"),
        ("postgresql+asyncpg://u:p@h/db?Password=q@r", "postgresql+asyncpg://u:***"),
        ("postgresql+asyncpg://h/db#p", "postgresql+asyncpg://h/db?***"),
        ("postgresql+asyncpg://u@h:5432/db", "postgresql+asyncpg://u@h:5432/db"),
        ("sqlite+aiosqlite:////folder/a.sqlite", "sqlite+aiosqlite:////folder/a.sqlite"),
    ],
)
def test_a_database_url_is_shown_without_its_password(url, shown):
    config = load({"database.url": url})
    values = {setting.name: setting.value for setting in config.settings()}
    assert values["database.url"] == shown
    assert config.database.url == url


def test_a_refused_url_is_named_without_its_password():
    with pytest.raises(ConfigError, match=r"database\.url") as caught:
        load({"database.url": "mysql://user:hush@host/db"})
    assert "hush" not in str(caught.value)
