"""The results file that every benchmark writes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit that was measured, with a mark if files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip() or "unknown"


def read_figures(name: str) -> dict[str, Any]:
    """The figures of an earlier run; empty where there is none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    figures: dict[str, Any] = json.loads(path.read_text())["figures"]
    return figures


def write_results(name: str, figures: dict[str, Any], bars: dict[str, dict[str, Any]]) -> Path:
    """Write `benchmarks/results/<name>.json`; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "name": name,
        "machine": machine(),
        "commit": commit(),
        "figures": figures,
        "bars": bars,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
