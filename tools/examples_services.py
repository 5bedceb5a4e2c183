"""`make examples-services`: each example in one process and over the services, equal to the bit."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from esper.services.tolaria.checkpoint_manifest import LOGS
from tools.chaos_checks import timeless
from tools.stack import Stack

EXAMPLES = ("01-mnist1d-mlp", "02-digits-cnn", "03-own-model")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the examples both ways and print what differs; 0 where nothing does."""
    parser = argparse.ArgumentParser(prog="make examples-services", description=__doc__)
    parser.add_argument("examples", nargs="*", default=EXAMPLES, help="default: all")
    arguments = parser.parse_args(argv)
    differing = 0
    with tempfile.TemporaryDirectory(prefix="examples-") as temporary:
        folder = Path(temporary)
        with Stack(folder / "stack") as stack:
            for example in arguments.examples:
                differing += not _equal(example, folder, stack)
    return 1 if differing else 0


def _equal(example: str, folder: Path, stack: Stack) -> bool:
    here, there = folder / example / "embedded", folder / example / "services"
    _run(example, here)
    _run(example, there, "--config", str(stack.client_settings))
    differing = [name for name in LOGS if timeless(here / name) != timeless(there / name)]
    model = "model.safetensors"
    if (here / model).read_bytes() != (there / model).read_bytes():
        differing.append(model)
    told = {
        "example": example,
        "epochs": len(timeless(there / "metrics.jsonl")),
        "differing": differing,
    }
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    return not differing


def _run(example: str, directory: Path, *options: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "esper", "run", f"examples/{example}/session.yaml"),
            *("--output-dir", str(directory), "--quiet", *options),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )


if __name__ == "__main__":
    sys.exit(main())
