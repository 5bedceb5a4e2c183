"""`esper serve` and `esper compile`: what they refuse, and how a signal ends a service."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from esper.cli.main import main


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, argv, *said):
    status = main(argv)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("esper: error: ")]
    assert (status, len(lines)) == (2, 1), error
    for words in said:
        assert words in lines[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["serve", "tamiyo"], "redis.url"),
        (["serve", "tezzeret"], "redis.url"),
        (["serve", "tezzeret", "--set", "redis.url=redis://127.0.0.1:1"], "hub.url"),
        (["serve", "urza"], "urza.signing_key"),
        (["serve", "tolaria"], "FILE"),
        (["serve", "tamiyo", "session.yaml"], "with tolaria only"),
        (["serve", "urza", "--output-dir", "D"], "with tolaria only"),
        (["serve", "urza", "--session", "uid"], "with tamiyo only"),
        (
            ["serve", "tamiyo", "--session", "a:b", "--set", "redis.url=redis://127.0.0.1:1"],
            "scope",
        ),
        (["compile", "--kernel", "0" * 40], "hub.url"),
        (["serve", "tamiyo", "--set", "tamiyo.speed=1"], "tamiyo.speed"),
        (["serve", "tamiyo", "--set", "redis.url=http://x"], "redis.url"),
    ],
)
def test_what_can_not_be_served_is_refused_in_one_line(capsys, empty_directory, argv, said):
    refused(capsys, argv, said)
    assert list(empty_directory.iterdir()) == []


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1"])
def test_a_host_that_is_none_of_this_machine_is_named(capsys, monkeypatch, host):
    monkeypatch.setenv("ESPER_URZA__SIGNING_KEY", "k" * 32)
    refused(capsys, ["serve", "urza", "--set", f"urza.host={host}"], f"urza.host: got {host}")


def test_a_hub_of_its_own_has_a_place_of_its_own(empty_directory):
    settings = empty_directory / "esper.yaml"
    settings.write_text(f"urza: {{signing_key: '{'k' * 32}', port: 0}}\n")
    with subprocess.Popen(
        [sys.executable, "-m", "esper", "serve", "urza"], stderr=subprocess.PIPE, text=True
    ) as service:
        told = service.stderr.readline()
        assert ready(told.split()[1]), told
        service.terminate()
        assert service.wait(timeout=30) == 0
    assert sorted(path.name for path in empty_directory.iterdir()) == ["esper.yaml", "hub"]
    assert (empty_directory / "hub" / "urza.sqlite").is_file()


def test_an_unknown_service_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "karn"])
    assert "tezzeret" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(capsys, redis_server):
    taken = f"component.health_port={redis_server.port}"
    argv = ["serve", "tamiyo", "--set", f"redis.url={redis_server.url}", "--set", taken]
    refused(capsys, argv, "component.health_port", "a free address")


def test_a_wrong_password_ends_the_service_and_is_not_shown(capsys, redis_server):
    url = redis_server.url.replace(redis_server.password, "not-it")
    status = main(["serve", "tamiyo", "--set", f"redis.url={url}"])
    error = capsys.readouterr().err
    assert status == 2
    assert "esper: error: redis.url" in error
    assert "not-it" not in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_service_in_order(empty_directory, redis_server, number):
    settings = empty_directory / "esper.yaml"
    settings.write_text(f"redis: {{url: '{redis_server.url}'}}\n")
    with subprocess.Popen(
        [sys.executable, "-m", "esper", "serve", "tamiyo"], stderr=subprocess.PIPE, text=True
    ) as service:
        told = service.stderr.readline()
        assert told.startswith("tamiyo: http://127.0.0.1:")
        url = told.split()[1]
        deadline = time.monotonic() + 30
        while not ready(url):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(service.pid, number)
        assert service.wait(timeout=120) == 0
        assert service.stderr.read() == ""


def ready(url):
    try:
        with urllib.request.urlopen(url + "/readyz", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
