"""Writes run directories as a run leaves them: same files, same formats, plausible figures."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml

from esper.contracts.enums import DecisionAction, SeedState, SessionOutcome, SystemHealth
from esper.contracts.operational import (
    AdaptationDecision,
    HealthSignal,
    Measurement,
    SeedObservation,
    SeedTransition,
    SessionEvent,
)

START = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)
LAYERS = ("layers.0", "layers.2", "layers.4")
BASE = 1098
SIZES = {"bottleneck-mlp": 2052, "widen-16": 924, "low-rank": 448, "noop": 0}

S = SeedState
Step = tuple[int, str, str, int, SeedState, SeedState, str | None, Measurement | None, str]


def measured(mean: float, margin: float = 0.012, rent: float = 0.004) -> Measurement:
    return Measurement(mean=mean, lower=mean - margin, upper=mean + margin, rent=rent, samples=500)


def told(m: Measurement) -> str:
    relation = "above" if m.passes() else "not above"
    return (
        f"gain {m.mean:+.4f} nats, at least {m.lower:+.4f}, {relation} the rent of {m.rent:.4f}"
        f" ({m.samples} samples)"
    )


def trial(layer: str, blueprint: str, start: int, mean: float, cycle: int = 0) -> list[Step]:
    """A trial that its shadow measurements end after six epochs."""
    m = measured(mean)
    return [
        (start, layer, blueprint, cycle, S.DORMANT, S.GERMINATED, None, None, "decision"),
        (start + 1, layer, blueprint, cycle, S.GERMINATED, S.TRAINING, None, None, "its turn"),
        (start + 6, layer, blueprint, cycle, S.TRAINING, S.CULLED, None, m, told(m)),
        (start + 8, layer, blueprint, cycle, S.CULLED, S.DORMANT, None, None, "embargo over"),
    ]


def graft(
    layer: str, blueprint: str, start: int, mean: float, kept: bool, cycle: int
) -> list[Step]:
    m = measured(mean)
    r = measured(mean * (0.8 if kept else -0.2))
    end = S.FOSSILIZED if kept else S.CULLED
    return [
        (start, layer, blueprint, cycle, S.DORMANT, S.GERMINATED, None, None, "decision"),
        (start + 1, layer, blueprint, cycle, S.GERMINATED, S.TRAINING, None, None, "its turn"),
        (start + 7, layer, blueprint, cycle, S.TRAINING, S.GRAFTING, None, m, told(m)),
        (
            start + 13,
            layer,
            blueprint,
            cycle,
            S.GRAFTING,
            end,
            None,
            r,
            f"recovery trial: {told(r)}",
        ),
    ]


def story() -> list[Step]:
    steps = [
        *trial(LAYERS[0], "noop", 2, 0.0001),
        *trial(LAYERS[1], "low-rank", 8, 0.0102),
        *trial(LAYERS[2], "bottleneck-mlp", 14, 0.0131),
        *graft(LAYERS[1], "widen-16", 20, 0.0503, False, 1),
        *graft(LAYERS[0], "bottleneck-mlp", 34, 0.0842, True, 1),
        *trial(LAYERS[2], "widen-16", 50, 0.0110, 1),
        *graft(LAYERS[1], "bottleneck-mlp", 58, 0.0391, True, 2),
    ]
    return sorted(steps, key=lambda step: step[0])


def write_run(
    directory: Path,
    *,
    epochs: int = 100,
    reached: int | None = None,
    outcome: SessionOutcome = SessionOutcome.SUCCEEDED,
    name: str = "mnist1d-mlp",
    torn: bool = False,
    steps: list[Step] | None = None,
    reason: str | None = None,
) -> Path:
    """Write a run that has reached an epoch; `torn` leaves half a line at the end of each log."""
    directory.mkdir(parents=True, exist_ok=True)
    reached = epochs if reached is None else reached
    steps = [step for step in (story() if steps is None else steps) if step[0] <= reached]
    manifest = {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "TrainingSession",
        "metadata": {"name": name},
        "spec": {
            "model": {"entrypoint": "esper.zoo.mlp:mlp", "arguments": {"width": 16}},
            "data": {"entrypoint": "esper.zoo.mnist1d:datasets"},
            "training": {"epochs": epochs, "batchSize": 64, "seed": 7},
            "growth": {"budget": {"parametersPercent": 400}},
        },
    }
    text = "# A small MLP that grows.\n" + yaml.safe_dump(manifest, sort_keys=False)
    (directory / "manifest.yaml").write_text(text)
    rows, flops = metrics(name, reached, steps)
    _lines(directory / "metrics.jsonl", rows, torn)
    _lines(directory / "events.jsonl", events(name, steps, reason), torn)
    _lines(directory / "decisions.jsonl", decisions(name, reached, steps), torn)
    parameters = rows[-1]["parameters"] if rows else BASE
    status = {
        "conditions": [
            {
                "type": "Succeeded",
                "status": {"Succeeded": "True", "Running": "Unknown"}.get(outcome.value, "False"),
                "reason": outcome.value,
                "message": "loss not finite after 3 rollbacks" if outcome == "Failed" else "",
            }
        ],
        "epoch": reached,
        "epochs": epochs,
        "parametersBase": BASE,
        "parameters": parameters,
        "flops": flops,
        "layers": [{"name": layer, "kind": "Linear", "seeds": 1} for layer in LAYERS],
        "refusedLayers": [{"name": "attention.out_proj", "reason": "its forward is never called"}],
    }
    (directory / "status.yaml").write_text(yaml.safe_dump({**manifest, "status": status}))
    if outcome is SessionOutcome.SUCCEEDED:
        (directory / "grown.py").write_text("")
        (directory / "model.safetensors").write_bytes(b"")
        kept = [step for step in steps if step[5] is S.FOSSILIZED]
        result = {
            "session": name,
            "outcome": outcome.value,
            "accuracy": 0.6013,
            "parametersBase": BASE,
            "parameters": parameters,
            "flops": flops,
            "epochs": reached,
            "seconds": 61.2,
            "seeds": {"dormant": 1, "fossilized": len(kept)},
            "grown": [
                {
                    "layer": step[1],
                    "slot": 0,
                    "blueprint": step[2],
                    "epoch": step[0],
                    "contribution": {"mean": step[7].mean, "lower": step[7].lower},
                    "rent": step[7].rent,
                    "samples": step[7].samples,
                }
                for step in kept
                if step[7] is not None
            ],
        }
        (directory / "result.json").write_text(json.dumps(result))
    return directory


def metrics(name: str, reached: int, steps: list[Step]) -> tuple[list[dict[str, object]], int]:
    """The lines of metrics.jsonl up to an epoch, and the FLOPs spent."""
    noise = random.Random(3)
    rows: list[dict[str, object]] = []
    flops = trials = 0
    accuracy = 0.1
    for epoch in range(1, reached + 1):
        now = _states(steps, epoch)
        kept = [s for s in now.values() if s[5] in (S.FOSSILIZED, S.GRAFTING)]
        parameters = BASE + sum(SIZES[s[2]] for s in kept)
        ceiling = 0.50 + 0.055 * len([s for s in kept if s[5] is S.FOSSILIZED])
        accuracy += (ceiling - accuracy) * 0.12 + noise.gauss(0, 0.004)
        tried = [s for s in now.values() if s[5] in (S.TRAINING, S.GERMINATED, S.GRAFTING)]
        spent = sum(SIZES[s[2]] for s in tried) * 6 * 3600
        flops += parameters * 6 * 3600 + spent
        trials += spent
        signals = [
            HealthSignal(
                session=name,
                epoch=epoch,
                layer=layer,
                gradient_norm=0.3 / math.sqrt(epoch) + noise.random() * 0.02,
                gradient_variance=1e-5,
                gradient_to_weight_ratio=2e-3 / math.sqrt(epoch),
                activation_rank=min(1.0, 0.5 + 0.15 * index + 0.02 * noise.random()),
                dead_fraction=max(0.0, 0.3 - 0.1 * index - epoch * 1e-3),
            )
            for index, layer in enumerate(LAYERS)
        ]
        seeds = [
            SeedObservation(
                layer=s[1],
                slot=0,
                state=s[5],
                blueprint=s[2],
                alpha=1.0
                if s[5] is S.FOSSILIZED
                else min(1, (epoch - s[0]) / 3)
                if s[5] is S.GRAFTING
                else 0.0,
                age_epochs=epoch - s[0],
                cycle=s[3],
                parameters=SIZES[s[2]],
                measurement=s[7] or (measured(0.02) if s[5] is S.TRAINING else None),
            )
            for s in now.values()
            if s[5] is not S.DORMANT
        ]
        counts: dict[str, int] = {}
        for seed in seeds:
            counts[seed.state.value] = counts.get(seed.state.value, 0) + 1
        rows.append(
            {
                "epoch": epoch,
                "time": (START + timedelta(seconds=0.6 * epoch)).isoformat(),
                "seconds": 0.61,
                "trainLoss": 2.3 * math.exp(-epoch / 30) + 1.02 - accuracy * 0.4,
                "validationLoss": 2.2 * math.exp(-epoch / 30) + 1.21 - accuracy * 0.4,
                "validationMetric": accuracy,
                "learningRate": 5e-3,
                "parameters": parameters,
                "flops": flops,
                "flopsTrials": trials,
                "seeds": counts,
                "health": SystemHealth.HEALTHY.value,
                "layers": [{**s.to_wire(), "healthScore": s.health_score()} for s in signals],
                "active": [seed.to_wire() for seed in seeds],
            }
        )
    return rows, flops


def events(name: str, steps: list[Step], reason: str | None = None) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for epoch, layer, blueprint, cycle, previous, current, kernel, m, why in steps:
        transition = SeedTransition(
            session=name,
            epoch=epoch,
            layer=layer,
            slot=0,
            cycle=cycle,
            previous=previous,
            current=current,
            blueprint=blueprint,
            kernel=kernel,
            reason=reason or why,
            measurement=m,
        )
        lines.append({"time": _time(epoch), "type": "transition", **transition.to_wire()})
    told_event = SessionEvent(
        session=name, epoch=1, reason="HealthChanged", message="degraded, after healthy"
    )
    lines.append({"time": _time(1), "type": "event", **told_event.to_wire()})
    return lines


def decisions(name: str, reached: int, steps: list[Step]) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    germinated = {step[0]: step for step in steps if step[5] is S.GERMINATED}
    grafted = {step[0]: step for step in steps if step[5] is S.GRAFTING}
    for epoch in range(1, reached + 1):
        step = germinated.get(epoch) or grafted.get(epoch)
        action = DecisionAction.WAIT
        why = "One trial is under way."
        if step:
            action = DecisionAction.GRAFT if epoch in grafted else DecisionAction.GERMINATE
            why = f"Trial of this survey: {step[2]} at {step[1]} for {SIZES[step[2]]} parameters."
        decision = AdaptationDecision(
            id=f"{epoch:032x}",
            session=name,
            epoch=epoch,
            action=action,
            layer=step[1] if step else None,
            slot=0 if step else None,
            blueprint=step[2] if step else None,
            confidence=0.97,
            reason=why,
        )
        lines.append(
            {
                "time": _time(epoch),
                **decision.to_wire(),
                "applied": step is not None,
                "outcome": "germinated" if step else "nothing to do",
            }
        )
    return lines


def _states(steps: list[Step], epoch: int) -> dict[str, Step]:
    now: dict[str, Step] = {}
    for step in steps:
        if step[0] < epoch:
            now[step[1]] = step
    return now


def _time(epoch: int) -> str:
    return (START + timedelta(seconds=0.6 * epoch)).isoformat()


def _lines(path: Path, records: list[dict[str, object]], torn: bool) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text + ('{"epoch": 99, "tra' if torn else ""))
