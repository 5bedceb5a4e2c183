"""Do births that look at data help? Default and gradient initialisation, seed by seed.

python -m benchmarks.births [--quick] [--pairs N] [--first-seed N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bars import write_results
from benchmarks.growth import CASES
from benchmarks.growth_arms import Document, grown, merged, read_case, seeded
from esper.contracts.blueprints import BlueprintDocument, builtin, lower
from esper.contracts.enums import SeedState
from esper.contracts.ir import source_of
from esper.contracts.manifests import parse_manifest
from esper.core import wrap
from esper.errors import BlueprintError
from esper.execution.builders import build
from esper.execution.state_layout import SeedLifecycleState
from esper.services.tolaria.births import give_birth
from esper.services.tolaria.config import TolariaConfig
from esper.services.tolaria.data import gathered
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.entrypoints import build_datasets, build_model, build_objective
from esper.services.tolaria.randomness import stable_seed
from esper.services.tolaria.seeds import SeedBook, SeedRecord

CASE = "mnist1d-mlp"
ARMS = ("default", "gradient")
UNITS = {"bottleneck-mlp": 36, "widen": 36}
BORN_AFTER = (2, 10, 30)
AGES = (1, 2, 5, 10)
# Seeds of its own: none of the growth benchmark's, on which hyperparameters were fixed.
FIRST_SEED = 20_000
PAIRS = 24
QUICK_PAIRS = 2
DRAWS = 10_000


def main() -> int:
    """Measure, print and write the results."""
    arguments = _arguments()
    jobs = [(arguments.first_seed + n, arguments.quick) for n in range(arguments.pairs)]
    context = multiprocessing.get_context("spawn")
    pairs = []
    with context.Pool(arguments.processes, torch.set_num_threads, (1,)) as pool:
        for pair in pool.imap(_measured, jobs):
            pairs.append(pair)
            sys.stderr.write(f"pair {len(pairs)} of {len(jobs)}\n")
    name = "births-quick" if arguments.quick else "births"
    path = write_results(name, summary(pairs), {})
    sys.stdout.write(json.dumps({"results": str(path.relative_to(Path.cwd()))}) + "\n")
    return 0


def measure_pair(seed: int, quick: bool) -> dict[str, Any]:
    """Shadow trials from each start, and whole sessions, of one paired seed."""
    document, _ = read_case(CASES[CASE])
    document = seeded(document, seed)
    trials: dict[str, Any] = {}
    for born_after in BORN_AFTER[:1] if quick else BORN_AFTER:
        trials |= shadow_gains(document, born_after, AGES[:2] if quick else AGES)
    epochs = 20 if quick else document["spec"]["training"]["epochs"]
    document = merged(document, {"spec": {"training": {"epochs": epochs}}})
    sessions = {
        blueprint: {arm: _session(document, blueprint, arm) for arm in ARMS} for blueprint in UNITS
    }
    return {"seed": seed, "trials": trials, "sessions": sessions}


def shadow_gains(
    document: Document, born_after: int, ages: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """What seeds of either arm contribute in nats a sample at these ages, in epochs.

    Both arms of every blueprint at every layer learn beside one host, which feels none of them:
    the pairs differ in nothing but the first weights that data could choose.
    """
    config = TolariaConfig.from_resource(parse_manifest(json.dumps(document), "benchmark").session)
    torch.set_num_threads(config.training.threads)
    datasets = build_datasets(config)
    example, _ = gathered(datasets.train, torch.arange(2))
    places = len(UNITS) * len(ARMS)
    model = wrap(build_model(config), example, seeds_per_layer=places)
    engine = Engine(config, model, datasets, build_objective(config, datasets), SeedBook())
    for epoch in range(1, born_after + 1):
        engine.train_epoch(epoch)
    records = {}
    for layer in model.morphology.layers:
        for slot, (blueprint, arm) in enumerate((b, a) for b in UNITS for a in ARMS):
            record = _germinated(engine, layer, slot, _blueprint(blueprint, arm))
            if record is not None:
                records[f"{blueprint} at {layer} after {born_after}", arm] = record
    gains: dict[str, dict[str, list[float]]] = {place: {} for place, _ in records}
    for age in range(1, max(ages) + 1):
        engine.train_epoch(born_after + age)
        if age in ages:
            baseline = np.array(engine.sample_nats())
            for (place, arm), record in records.items():
                nats = np.array(engine.sample_nats(trying=record.site))
                gains[place].setdefault(arm, []).append(float((baseline - nats).mean()))
    return gains


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of both arms and paired differences, gradient minus default, with 95 % intervals."""
    trials = {}
    for place in pairs[0]["trials"]:
        gains = {arm: np.array([pair["trials"][place][arm] for pair in pairs]) for arm in ARMS}
        trials[place] = [
            {"age": age} | _compared(gains["default"][:, n], gains["gradient"][:, n])
            for n, age in enumerate(AGES[: gains["default"].shape[1]])
        ]
    sessions = {}
    for blueprint in UNITS:
        found = [pair["sessions"][blueprint] for pair in pairs]
        sessions[blueprint] = {
            figure: _compared(*(np.array([one[arm][figure] for one in found]) for arm in ARMS))
            for figure in ("accuracy", "parameters", "flops", "flops_trials")
        }
    return {"shadowGainNats": trials, "sessions": sessions, "pairs": len(pairs), "runs": pairs}


def _compared(
    default: np.ndarray[Any, Any], gradient: np.ndarray[Any, Any]
) -> dict[str, float | list[float]]:
    difference = gradient - default
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(difference), (DRAWS, len(difference)))
    low, high = np.quantile(difference[drawn].mean(axis=1), (0.025, 0.975))
    return {
        "default": float(default.mean()),
        "gradient": float(gradient.mean()),
        "difference": float(difference.mean()),
        "interval": [float(low), float(high)],
    }


def _germinated(
    engine: Engine, layer: str, slot: int, document: BlueprintDocument
) -> SeedRecord | None:
    """A seed in training, its draw the same in both arms; None where the blueprint can't live."""
    morphology = engine.model.morphology
    target = morphology.target(layer)
    try:
        graph = lower(document, target)
    except BlueprintError:
        return None
    seed = engine.config.training.seed
    drawn = stable_seed(seed, layer, document.name)
    module = build(graph, target, generator_seed=drawn)
    record = SeedRecord(layer=layer, slot=slot, state=SeedState.TRAINING, cycle=0, kernel=str(slot))
    give_birth(engine, record, module, graph)
    morphology.germinate(
        layer, slot, module, kernel=record.kernel, source=source_of(graph), graph=graph
    )
    morphology.transition(layer, slot, SeedLifecycleState.TRAINING)
    engine.book.records[record.site] = record
    engine.start_learning(record.site)
    return record


def _session(document: Document, blueprint: str, arm: str) -> dict[str, float]:
    """A whole session in which the heuristic may grow this blueprint alone."""
    only = {"blueprints": {"matchLabels": {"esper.dev/blueprint": blueprint}}}
    outcome = grown(
        merged(document, {"spec": {"growth": only}}),
        [
            {
                "apiVersion": "esper.dev/v1alpha1",
                "kind": "Blueprint",
                "metadata": {"name": blueprint},
                "spec": {"builtin": blueprint, "arguments": _arguments_of(blueprint, arm)},
            }
        ],
    )
    return {
        "accuracy": outcome.accuracy,
        "parameters": outcome.parameters,
        "flops": outcome.flops,
        "flops_trials": outcome.flops_trials,
    }


def _arguments_of(blueprint: str, arm: str) -> dict[str, int | float | str]:
    return {"units": UNITS[blueprint], "initialisation": arm}


def _blueprint(blueprint: str, arm: str) -> BlueprintDocument:
    return builtin(blueprint, _arguments_of(blueprint, arm))


def _measured(job: tuple[int, bool]) -> dict[str, Any]:
    return measure_pair(*job)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two pairs, short training")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.pairs = arguments.pairs or (QUICK_PAIRS if arguments.quick else PAIRS)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
