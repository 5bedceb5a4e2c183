"""`make examples-ranks`: examples by 1, 2 and 4 ranks in logical shards, equal to the bit.

Without logical shards two runs by 2 ranks are equal to the bit. `--accuracy` compares them with one
process instead: the mean accuracy on the test set over seeds, no more than a point apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from tools.chaos_checks import differences, timeless
from tools.chaos_ranks import SHARDS, train_alone
from tools.rank_worker import Worker, WorkerEnded

EXAMPLES = ("01-mnist1d-mlp", "02-digits-cnn")
SIZES = (2, 4)
POINT = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line of JSON for each example; 0 where all holds."""
    parser = argparse.ArgumentParser(prog="make examples-ranks", description=__doc__)
    parser.add_argument("examples", nargs="*", help="default: all; with --accuracy: the first")
    parser.add_argument("--accuracy", action="store_true", help="compare accuracies instead")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="for --accuracy")
    arguments = parser.parse_args(argv)
    holds = True
    with tempfile.TemporaryDirectory(prefix="examples-ranks-") as temporary:
        for example in arguments.examples or EXAMPLES[: 1 if arguments.accuracy else None]:
            folder = Path(temporary) / example
            if arguments.accuracy:
                told = _accuracies(example, folder, arguments.seeds)
            else:
                told = _bits(example, folder)
            holds &= bool(told["holds"])
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
    return 0 if holds else 1


def _bits(example: str, folder: Path) -> dict[str, object]:
    """What differs between one process and several ranks, and between two runs of as many."""
    sharded, plain = folder / "sharded.yaml", folder / "plain.yaml"
    _write(example, sharded, logicalShards=SHARDS)
    _write(example, plain)
    alone = folder / "alone"
    train_alone(sharded, alone)
    differing = {}
    for size in SIZES:
        _train(sharded, folder / f"ranks-{size}", size)
        differing[f"1 and {size} ranks, {SHARDS} logical shards"] = differences(
            alone, folder / f"ranks-{size}"
        )
    for name in ("first", "again"):
        _train(plain, folder / name, 2)
    differing["2 ranks, twice"] = differences(folder / "first", folder / "again")
    return {
        "example": example,
        "epochs": len(timeless(alone / "metrics.jsonl")),
        "transitions": len(timeless(alone / "events.jsonl")),
        "differing": differing,
        "holds": not any(differing.values()),
    }


def _accuracies(example: str, folder: Path, seeds: int) -> dict[str, object]:
    """The accuracies on the test set of one process and of 2 ranks, without logical shards."""
    one, two = [], []
    for seed in range(seeds):
        manifest = folder / f"seed-{seed}.yaml"
        _write(example, manifest, seed=seed)
        train_alone(manifest, folder / f"alone-{seed}")
        _train(manifest, folder / f"ranks-{seed}", 2)
        one.append(_accuracy(folder / f"alone-{seed}"))
        two.append(_accuracy(folder / f"ranks-{seed}"))
        sys.stderr.write(f"seed {seed}: one process {one[-1]:.4f}, 2 ranks {two[-1]:.4f}\n")
    apart = statistics.fmean(two) - statistics.fmean(one)
    return {
        "example": example,
        "seeds": seeds,
        "oneProcess": round(statistics.fmean(one), 4),
        "twoRanks": round(statistics.fmean(two), 4),
        "difference": round(apart, 4),
        "accuracies": {"oneProcess": one, "twoRanks": two},
        "holds": abs(apart) <= POINT,
    }


def _accuracy(directory: Path) -> float:
    return float(json.loads((directory / "result.json").read_bytes())["accuracy"])


def _write(example: str, path: Path, **training: object) -> None:
    """The example's manifest with changes to its training; its code is Esper's own."""
    documents = list(yaml.safe_load_all(Path(f"examples/{example}/session.yaml").read_text()))
    documents[0]["spec"]["training"] |= training
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump_all(documents))


def _train(manifest: Path, directory: Path, processes: int) -> None:
    with Worker(manifest, directory, processes, directory.with_suffix(".log")) as worker:
        status = worker.wait()
        if status != 0:
            said = worker.log.read_text(errors="replace")[-1000:]
            raise WorkerEnded(f"{directory.name} ended with {status}: {said}")


if __name__ == "__main__":
    sys.exit(main())
