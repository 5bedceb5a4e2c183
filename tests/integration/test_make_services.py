"""`make services`: what it shows is so, and a signal ends all of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.alive import alive
from tests.integration.processes import ROOT, environment
from tools.servers.process import answers_tcp

ROW = re.compile(r"  (\S+) +(?:http://)?127\.0\.0\.1:(\d+) +(.+)")
PARTS = {"redis", "postgres", "s3", "urza", "tezzeret-1", "tamiyo"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("services")


def said(process: subprocess.Popen[str], last: str) -> Iterator[str]:
    """The lines that it writes, up to the one that holds `last`."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip("\n")
        if last in line:
            return
    raise AssertionError(f"it ended without saying {last}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_of_it(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tools.services", "--folder", str(folder), "--workers", "1"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        lines = list(said(process, "Ctrl-C"))
        rows = {match[1]: match for match in map(ROW.fullmatch, lines) if match}
        assert set(rows) == PARTS
        for name, row in rows.items():
            service = name in {"urza", "tezzeret-1", "tamiyo"}
            assert row[3] == ("ready" if service else "answers")
            assert answers_tcp(int(row[2]))
            if service:
                urllib.request.urlopen(f"http://127.0.0.1:{row[2]}/readyz", timeout=60).close()
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > len(PARTS)
        if number == signal.SIGINT:
            store = next(one for one in family if "versitygw" in one.name())
            store.suspend()  # from now on it answers nobody
            assert re.fullmatch(r"  s3 +does not answer", list(said(process, "  s3 "))[-1])
            store.resume()
        os.kill(process.pid, number)
        assert list(said(process, "stopped"))[-2:] == ["stopping", "stopped"]
        assert process.wait(timeout=120) == 0
    assert [one for one in family if one.is_running() and alive(one.pid)] == []
