import json
import socket
import sqlite3
from importlib.metadata import version

import pytest

from esper.cli import checkup
from esper.cli.main import main
from esper.configs import NAMES, EsperConfig


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(**settings):
    line = {name.replace("__", "."): value for name, value in settings.items()}
    config = EsperConfig.load(line, environment={})
    return {check.name: check for check in checkup.checks(config)}


def test_doctor_tells_settings_versions_and_checks_as_json(capsys, empty_directory):
    assert main(["doctor", "--json", "--set", "database.pool_size=2"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["healthy"] is True
    settings = {setting.pop("name"): setting for setting in told["settings"]}
    assert tuple(settings) == NAMES
    assert settings["database.pool_size"] == {
        "value": 2,
        "origin": "command line --set database.pool_size",
    }
    assert told["versions"]["torch"] == version("torch")
    assert int(told["versions"]["torch threads"]) >= 1
    assert {check["status"] for check in told["checks"]} <= {"ok", "missing"}
    assert list(empty_directory.iterdir()) == []


def test_doctor_shows_the_same_to_a_person(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in (*NAMES, "python", "torch", "cores", "bus", "storage", "default"):
        assert name in shown


def test_doctor_fails_where_a_run_would(capsys, empty_directory):
    (empty_directory / "file").write_text("")
    assert main(["doctor", "--set", "storage.folder=file/artifacts"]) == 1
    assert "failed" in capsys.readouterr().out


def test_a_database_that_is_there_is_opened(empty_directory):
    path = empty_directory / "urza.sqlite"
    sqlite3.connect(path).close()
    check = look(database__url=f"sqlite+aiosqlite:///{path}")["database"]
    assert check.status == "ok"
    assert "opens" in check.detail


def test_a_database_of_another_kind_fails(empty_directory):
    path = empty_directory / "urza.sqlite"
    path.write_bytes(b"no database at all" * 100)
    assert look(database__url=f"sqlite+aiosqlite:///{path}")["database"].status == "failed"


def test_a_database_that_is_not_there_needs_a_place_and_is_not_made(empty_directory):
    check = look(database__url=f"sqlite+aiosqlite:///{empty_directory}/new/urza.sqlite")["database"]
    assert check.status == "ok"
    assert list(empty_directory.iterdir()) == []


@pytest.mark.parametrize("writable", [True, False])
def test_a_folder_must_be_writable(empty_directory, monkeypatch, writable):
    monkeypatch.setattr(checkup.os, "access", lambda place, mode: writable)
    assert look()["storage"].status == ("ok" if writable else "failed")


def test_bus_and_hub_are_in_process_unless_an_address_is_set():
    found = look()
    assert (found["bus"].detail, found["hub"].detail) == ("in-process", "in-process")


def test_a_bus_elsewhere_must_answer_to_its_password(redis_server):
    check = look(redis__url=redis_server.url)["bus"]
    assert (check.status, "answers" in check.detail) == ("ok", True)
    wrong = look(redis__url=redis_server.url.replace(redis_server.password, "not-it"))["bus"]
    assert wrong.status == "failed"
    for shown in (check.detail, wrong.detail):
        assert redis_server.password not in shown
        assert "not-it" not in shown
    assert wrong.detail.startswith("redis.url")


def test_a_database_elsewhere_must_answer_to_its_password(postgres_server):
    check = look(database__url=postgres_server.url)["database"]
    assert check.status == "ok"
    assert "(PostgreSQL 18" in check.detail
    url = postgres_server.url.replace(postgres_server.password, "not-it")
    wrong = look(database__url=url)["database"]
    assert wrong.status == "failed"
    assert wrong.detail.startswith("database.url")
    assert "not-it" not in wrong.detail
    assert postgres_server.password not in check.detail


@pytest.mark.parametrize(
    ("option", "status"),
    [
        ("ssl=disable", "ok"),
        ("prepared_statement_cache_size=0", "ok"),
        ("sslmode=disable", "failed"),
        ("host=127.0.0.1", "ok"),
    ],
)
def test_a_database_elsewhere_is_asked_as_the_hub_asks_it(postgres_server, option, status):
    check = look(database__url=f"{postgres_server.url}?{option}")["database"]
    assert check.status == status, check.detail
    assert check.status == "ok" or check.detail.startswith("database.url")
    assert postgres_server.password not in check.detail


def test_a_bucket_must_be_there_and_open(s3_bucket):
    settings = {
        "storage__bucket": s3_bucket.name,
        "storage__endpoint_url": s3_bucket.endpoint_url,
        "storage__region": s3_bucket.region,
        "storage__access_key_id": s3_bucket.access_key_id,
    }
    check = look(**settings, storage__secret_access_key=s3_bucket.secret_access_key)["storage"]
    assert check.status == "ok", check.detail
    wrong = look(**settings, storage__secret_access_key="not-it")["storage"]
    assert wrong.status == "failed"
    assert "storage." in wrong.detail
    assert "not-it" not in wrong.detail


@pytest.mark.parametrize(
    ("name", "setting", "url"),
    [
        ("bus", "redis__url", "redis://127.0.0.1:{port}/0"),
        ("bus", "redis__url", "redis://127.0.0.1:seven"),
        ("hub", "hub__url", "http://127.0.0.1:{port}"),
        ("database", "database__url", "postgresql+asyncpg://u:secret@127.0.0.1:{port}/d"),
    ],
)
def test_what_does_not_answer_is_named_by_its_setting(name, setting, url):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    check = look(**{setting: url.format(port=port)})[name]
    assert check.status == "failed"
    assert check.detail.startswith(setting.replace("__", "."))
    assert "secret" not in check.detail
    assert "\n" not in check.detail


@pytest.mark.parametrize(
    ("name", "setting", "url"),
    [
        ("bus", "redis__url", "redis://:sup3rsecret/x@127.0.0.1:6379/0"),
        ("database", "database__url", "postgresql+asyncpg://u:sup3rsecret/x@127.0.0.1/d"),
        ("database", "database__url", "postgresql+asyncpg://u:sup3rsecret?x@127.0.0.1/d"),
    ],
)
def test_a_password_that_is_not_encoded_is_not_shown(name, setting, url):
    check = look(**{setting: url})[name]
    assert check.status == "failed"
    assert check.detail.startswith(setting.replace("__", "."))
    assert name == "database" or "%XX" in check.detail  # the hub's database needs no %XX
    assert "sup3rsecret" not in check.detail


def test_an_absent_extra_says_how_to_install_it(monkeypatch):
    absent = {"torch", "rliable"}
    monkeypatch.setattr(checkup, "find_spec", lambda name: None if name in absent else object())
    found = look()
    assert found["extra runtime"].status == "failed"
    assert found["extra bench"].status == "missing"
    assert "pip install 'esper[bench]'" in found["extra bench"].detail
    assert found["extra hub"].status == "ok"


def test_modules_belong_to_the_extra_that_brings_them():
    assert checkup.extra_of("sklearn") == "zoo"
    assert checkup.extra_of("os") is None
