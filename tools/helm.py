"""Helm with this repository's chart: rendered, installed, upgraded and taken away."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tools.cluster.programs import cluster_program
from tools.servers.process import ServerError

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "charts" / "esper"
LOCAL_VALUES = ROOT / "charts" / "local-values.yaml"
NAMESPACE = "esper-system"
RELEASE = "esper"
RUN_SECONDS = 900.0

Values = Mapping[str, Any]
# The one in C is ten times as fast, and not everywhere.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class HelmError(ServerError):
    """Helm ended with an error, which the message tells."""


def render(
    values: Values | None = None,
    *words: str,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    chart: Path = CHART,
) -> list[dict[str, Any]]:
    """The objects of the chart with these values over its own, hooks included.

    Raises:
        HelmError: the values are refused, or a template is broken.
    """
    text = run("template", release, str(chart), "--namespace", namespace, *words, values=values)
    return [document for document in yaml.load_all(text, Loader=_LOADER) if document]


def run(*words: str, values: Values | None = None, kubeconfig: Path | None = None) -> str:
    """What a command of Helm prints; without a kubeconfig that of the environment is used.

    Raises:
        HelmError: it ended with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Helm's own folders: nothing of the person's comes in, and nothing is left.
        places = {f"HELM_{name}_HOME": folder for name in ("CACHE", "CONFIG", "DATA")}
        given = [str(cluster_program("helm")), *words]
        if values is not None:
            (Path(folder) / "values.json").write_text(json.dumps(values))
            given += ["--values", f"{folder}/values.json"]
        if kubeconfig is not None:
            given += ["--kubeconfig", str(kubeconfig)]
        done = subprocess.run(
            given,
            env=os.environ | places,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
        )
    if done.returncode:
        raise HelmError(f"helm {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
