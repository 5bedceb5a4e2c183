"""What must hold of a session that was disturbed: the same logs, and all that was said of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from esper.configs import HubConfig
from esper.contracts.enums import BlueprintState
from esper.contracts.messages import OonaMessage
from esper.contracts.operational import SeedTransition
from esper.errors import Unavailable
from esper.services.tolaria.checkpoint_manifest import LOGS
from esper.services.urza.http_client import HttpUrza

_OPEN = (BlueprintState.PROPOSED, BlueprintState.COMPILING)

MODEL = "model.safetensors"

Result = TypeVar("Result")


@dataclass
class Outcome:
    """What a chaos run came to; `broken` names what did not hold, in a line each."""

    faults: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def check(self, holds: bool, what: str) -> None:
        """Note `what` unless it holds."""
        if not holds:
            self.broken.append(what)


def compare(undisturbed: Path, disturbed: Path, outcome: Outcome) -> None:
    """The logs of both are the same, line by line, but for times."""
    for name in LOGS:
        one, two = (timeless(directory / name) for directory in (undisturbed, disturbed))
        outcome.figures[name] = len(two)
        pairs = enumerate(zip(one, two, strict=False))
        first = next((n for n, (expected, found) in pairs if expected != found), None)
        outcome.check(
            one == two,
            f"{disturbed.name}/{name}: {len(one)} lines without faults, {len(two)} with; "
            f"the first difference: {first}",
        )


def differences(one: Path, other: Path) -> list[str]:
    """Which files of two finished runs differ."""
    differing = [name for name in LOGS if timeless(one / name) != timeless(other / name)]
    return differing if same_model(one, other) else [*differing, MODEL]


def same_model(one: Path, other: Path) -> bool:
    """Whether two finished runs have left a model, to the bit the same."""
    models = [path / MODEL for path in (one, other)]
    return all(path.exists() for path in models) and len({p.read_bytes() for p in models}) == 1


def check_transitions(published: Sequence[OonaMessage], directory: Path, outcome: Outcome) -> None:
    """What the log tells was on the bus, in its order, under one id each.

    Others may be between: sent again, or told by an attempt that was lost after its checkpoint.
    """
    told = [
        SeedTransition.model_validate(
            {name: value for name, value in line.items() if name not in ("time", "type")}
        ).to_wire()
        for line in lines(directory / "events.jsonl")
        if line["type"] == "transition"
    ]
    heard = [(message.id, message.open().to_wire()) for message in published]
    outcome.figures |= {"transitions": len(told), "transitionsPublished": len(published)}
    rest = iter([item for _, item in heard])
    lost = next((each for each in told if each not in rest), None)  # what is passed over is gone
    outcome.check(lost is None, f"of {len(told)} transitions one did not come in its turn: {lost}")
    pairs: list[tuple[str, object]] = []
    for pair in heard:
        if pair not in pairs:
            pairs.append(pair)
    names, items = {name for name, _ in pairs}, {str(item) for _, item in pairs}
    outcome.check(
        len(names) == len(items) == len(pairs),
        f"{len(items)} transitions were told under {len(names)} ids in {len(pairs)} ways",
    )


async def check_kernels(config: HubConfig, kernels: Sequence[str], outcome: Outcome) -> None:
    """Wait for every kernel, and verify every artifact in the hub."""
    async with HttpUrza(config) as hub:
        deadline = time.monotonic() + 120
        for kernel in kernels:
            state = BlueprintState.PROPOSED
            while state in _OPEN and time.monotonic() < deadline:
                state = (await patiently(partial(hub.kernel, kernel))).state
                await asyncio.sleep(0.05)
            outcome.check(state is BlueprintState.CHARACTERIZED, f"kernel {kernel} is {state}")
        compiled = await hub.kernels([BlueprintState.CHARACTERIZED])
        for made in compiled:
            data = await patiently(partial(hub.artifact, made.kernel))
            found = hashlib.sha256(data).hexdigest()
            outcome.check(
                found == made.artifact_digest,
                f"kernel {made.kernel}: its artifact has digest {found}",
            )
        outcome.figures["kernels"] = len(compiled)


async def patiently(ask: Callable[[], Awaitable[Result]]) -> Result:
    """What the hub answers, once it does."""
    for _ in range(600):
        try:
            return await ask()
        except Unavailable:
            await asyncio.sleep(0.1)
    return await ask()


def condition(found: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition of an object; empty where it has none of that kind."""
    conditions = found.get("status", {}).get("conditions", ())
    return next((item for item in conditions if item["type"] == kind), {})


def was_compiled(kernel: dict[str, Any]) -> bool:
    """Whether a CompiledKernel is ready and a Job made it: else its message says who had it."""
    ready = condition(kernel, "Ready")
    made: bool = ready.get("message", "").startswith("Job ")
    return made and ready.get("status") == "True"


def kernels_of(place: Path) -> list[str]:
    """The kernels of all seeds of a session, whoever has them compiled."""
    told = lines(place / "events.jsonl")
    return sorted({line["kernel"] for line in told if line.get("kernel")})


def timeless(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without when they were written."""
    return [
        {name: value for name, value in line.items() if name not in ("time", "seconds")}
        for line in lines(path)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a log that is not there has none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
