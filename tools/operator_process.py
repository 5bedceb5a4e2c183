"""The operator as a process: started, killed, frozen, cut off, started again."""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

from tools.servers.process import HOST, PROBE_SECONDS, ServerProcess
from tools.stack import ENVIRONMENT, SOURCES, write_settings

Settings = Mapping[str, Mapping[str, Any]]
_SAMPLE = re.compile(r"^(?P<name>[a-z_]+)(\{(?P<labels>[^}]*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class OperatorProcess(ServerProcess):
    """`esper-operator` over a folder of its own; a context manager.

    `start` returns when it answers, which it does before it holds the lease.
    """

    name = "operator"

    def __init__(self, folder: Path, settings: Settings) -> None:
        """`settings` are its own, by section."""
        super().__init__(folder)
        self.settings = settings
        self.started_as = 0
        self.profile: Path | None = None
        """Where cProfile writes what took time, once it has ended; None: it is not profiled."""

    @property
    def url(self) -> str:
        """Where it tells of its health."""
        return f"http://{HOST}:{self.port}"

    def asked(self, path: str) -> tuple[int, str]:
        """Status and text of one of its three answers; 0: there is none."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=PROBE_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read().decode()
        except (OSError, HTTPException) as error:  # also where it dies while it answers
            return 0, str(error)

    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        """Its metrics: name, labels and value of each."""
        found = []
        for line in self.asked("/metrics")[1].splitlines():
            sample = _SAMPLE.match(line)
            if sample:
                labels = dict(_LABEL.findall(sample["labels"] or ""))
                found.append((sample["name"], labels, float(sample["value"])))
        return found

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name with these labels."""
        return sum(
            value
            for sample, found, value in self.samples()
            if sample == name and labels.items() <= found.items()
        )

    @property
    def agent(self) -> str:
        """What its user agent in the API server's audit log holds; it is started, or was."""
        return f"-{self.started_as}-"

    @property
    def leads(self) -> bool:
        """Whether it holds the lease."""
        return self.total("esper_operator_leading") == 1.0

    def start(self) -> Self:
        """Start, and remember as which process."""
        started = super().start()
        self.started_as = self.pid
        return started

    def _prepare(self) -> None:
        component = {"health_port": self.port, "log_level": "info"}
        given = dict(self.settings)
        given["component"] = {**component, **given.get("component", {})}
        write_settings(self.folder / "esper.yaml", given)

    def _command(self) -> Sequence[str]:
        settings = str(self.folder / "esper.yaml")
        profiled = ["-m", "cProfile", "-o", str(self.profile.resolve())] if self.profile else []
        return [sys.executable, *profiled, "-m", "esper_operator", "--config", settings]

    def _environment(self) -> Mapping[str, str]:
        return {**ENVIRONMENT, "PYTHONPATH": f"{SOURCES}:{SOURCES / 'operator'}"}

    def _answers(self) -> bool:
        return self.asked("/healthz")[0] == 200
