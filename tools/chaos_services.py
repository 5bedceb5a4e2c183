"""`make chaos-services`: a session trains and kernels compile while their services fail.

Every service in turn, and then at random, is killed or frozen and started again, while one session
trains with unlimited patience and workers compile blueprints. In the end nothing may be lost:

- the session's metrics, transitions and decisions are those of a run without faults;
- each transition was published, in order, and no receiver that drops what it has heard already
  applies one twice;
- the database has accepted one result for each kernel, by the note that a trigger took of every
  one that it ever accepted, and every artifact has its digest.

Then sessions with finite patience run, one without any controller and others through as many
faults: they end, and every decision that they stopped waiting for is in their record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import yaml

from esper.configs import EsperConfig
from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin
from esper.contracts.enums import DecisionAction
from esper.contracts.messages import OonaMessage, TopicNames
from esper.services.oona_client import OonaClient
from esper.services.urza.http_client import HttpUrza
from tools.chaos_checks import (
    Outcome,
    check_kernels,
    check_transitions,
    compare,
    lines,
    patiently,
)
from tools.servers.postgres import PostgresServer
from tools.servers.process import ServerProcess, dismiss, keeper_of
from tools.stack import DATABASE, ENVIRONMENT, Stack

FAULTS = ("kill", "freeze")
IMPATIENT = 0.5
SESSION_SECONDS = 1800.0
WAITED = "waited for a decision"
SETTINGS = {
    "tezzeret": {"poll_seconds": 0.2, "lease_seconds": 3},
    "tolaria": {"republish_seconds": 1, "kernel_poll_seconds": 0.2},
    "redis": {
        "discovery_seconds": 0.2,
        "claim_idle_seconds": 3,
        "read_timeout_seconds": 1,
        "max_backoff_seconds": 1,
    },
    "hub": {
        "read_timeout_seconds": 2,
        "max_backoff_seconds": 1,
        "breaker_reset_seconds": 0.5,
    },
}
"""Times short enough that faults of a second are felt."""


@dataclass(frozen=True)
class Plan:
    """How much chaos: `faults` in all, blueprints compiling meanwhile, and what chance starts with.

    A fault lasts between `shortest` and `longest` seconds; as long at most is the time between two.
    """

    faults: int = 50
    blueprints: int = 20
    seed: int = 0
    shortest: float = 0.1
    longest: float = 1.5


def run(
    stack: Stack, manifest: Path, folder: Path, plan: Plan, say: Callable[[str], None] = print
) -> Outcome:
    """Train `manifest` over a fresh stack without faults, then through `plan`, and compare."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    note_results(stack.postgres)
    with Session(stack, manifest, folder / "undisturbed") as undisturbed:
        outcome.check(undisturbed.wait() == 0, "the undisturbed session did not end well")
    say("the undisturbed session has ended")
    config = EsperConfig.load(file=stack.client_settings)
    started = time.monotonic()
    with _Sessions(stack, manifest, folder) as sessions:
        kernels = _disturb(stack, plan, config, sessions, outcome, say)
        outcome.check(sessions.wait(), "a disturbed session did not end well")
    say(f"the last disturbed session has ended after {time.monotonic() - started:.0f} s")
    for directory in sessions.directories:
        compare(folder / "undisturbed", directory, outcome)
        check_transitions(asyncio.run(_heard(config, directory)), directory, outcome)
    asyncio.run(check_kernels(config.hub, kernels, outcome))
    check_database(stack.postgres, outcome)
    outcome.figures |= {
        "seconds": round(time.monotonic() - started, 1),
        "sessions": len(sessions.directories),
    }
    return outcome


class Session:
    """A session over the stack, as a process; a context manager that it does not outlive.

    Nor does it outlive this process, however that ends.
    """

    def __init__(self, stack: Stack, manifest: Path, directory: Path) -> None:
        """Start it; what it says is kept beside its directory."""
        with (directory.parent / f"{directory.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command(stack, manifest, directory),
                env=os.environ | ENVIRONMENT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._keeper = keeper_of(self._process)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it is at work."""
        return self._process.poll() is None

    def wait(self) -> int | None:
        """Its exit status, once it has ended; None where it took longer than any session may."""
        try:
            return self._process.wait(SESSION_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        self._process.kill()
        self._process.wait()
        dismiss(self._keeper)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _command(self, stack: Stack, manifest: Path, directory: Path) -> Sequence[str]:
        return [
            *(sys.executable, "-m", "esper", "run", str(manifest), "--quiet"),
            *("--output-dir", str(directory), "--config", str(stack.client_settings)),
        ]


class _Sessions:
    """Equal sessions, one after the other, so that one is always at work."""

    def __init__(self, stack: Stack, manifest: Path, folder: Path) -> None:
        self._stack = stack
        self._manifest = manifest
        self._folder = folder
        self._sessions: list[Session] = []
        self.directories: list[Path] = []

    def go_on(self) -> bool:
        """See to it that one is at work; whether another had to be begun."""
        if self._sessions and self._sessions[-1].running:
            return False
        self.directories.append(self._folder / f"disturbed-{len(self.directories) + 1}")
        self._sessions.append(Session(self._stack, self._manifest, self.directories[-1]))
        return True

    def wait(self) -> bool:
        """Wait for the last one; whether all ended well."""
        return all(session.wait() == 0 for session in self._sessions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._sessions:
            session.kill()


def run_impatient(
    stack: Stack, manifest: Path, folder: Path, plan: Plan, say: Callable[[str], None] = print
) -> Outcome:
    """Train `manifest` with `IMPATIENT` seconds' patience: it ends, and says what it waited for.

    First the controller is away from beginning to end, so no decision comes at all; then all
    services go through `plan`.
    """
    outcome = Outcome()
    documents = list(yaml.safe_load_all(manifest.read_text()))
    growth = documents[0]["spec"].setdefault("growth", {})
    growth.setdefault("controller", {})["patienceSeconds"] = IMPATIENT
    boundaries = documents[0]["spec"]["training"]["epochs"] - 1
    # A copy, with the code beside it: the manifest's own folder is somebody's.
    impatient = shutil.copytree(manifest.parent, folder / "session") / manifest.name
    impatient.write_text(yaml.safe_dump_all(documents))
    stack.tamiyo.kill()
    with Session(stack, impatient, folder / "without-controller") as session:
        ended_well = session.wait() == 0
    outcome.check(ended_well, "the session without a controller did not end well")
    stack.tamiyo.start()
    config = EsperConfig.load(file=stack.client_settings)
    with _Sessions(stack, impatient, folder) as sessions:
        _disturb(stack, replace(plan, blueprints=0), config, sessions, outcome, say)
        outcome.check(sessions.wait(), "an impatient session did not end well")
    waited = _check_waiting(folder / "without-controller", boundaries, outcome)
    outcome.check(waited == boundaries, f"{waited} of {boundaries} decisions came from nowhere")
    through = [_check_waiting(one, boundaries, outcome) for one in sessions.directories]
    outcome.figures |= {"waitedOut": waited, "waitedOutThroughFaults": sum(through)}
    say(f"the impatient sessions recorded {waited} and {through} waited-out decisions")
    return outcome


def _check_waiting(directory: Path, boundaries: int, outcome: Outcome) -> int:
    """A decision at each boundary, and in the record each that the log says was given up."""
    decisions = lines(directory / "decisions.jsonl")
    recorded = [one for one in decisions if WAITED in one["reason"]]
    log = directory.with_suffix(".log").read_text()
    given_up = len(set(re.findall(r"packet (\d+) got no decision:", log)))
    name = directory.name
    decided = len({one["epoch"] for one in decisions})
    outcome.check(decided == boundaries, f"{name}: decisions at {decided} of {boundaries} ends")
    outcome.check(
        len(recorded) == given_up,
        f"{name}: {given_up} decisions were given up, {len(recorded)} of them are recorded",
    )
    outcome.check(
        all(one["action"] == DecisionAction.WAIT for one in recorded),
        f"{name}: a decision that never came is not to wait",
    )
    return len(recorded)


async def _request_kernels(config: EsperConfig, widths: Iterable[int]) -> list[str]:
    """Ask the hub for a kernel of a new blueprint each; returns their ids."""
    asked = []
    async with HttpUrza(config.hub) as hub:
        for width in widths:
            document = builtin("bottleneck-mlp", {"units": width + 2})
            layer = LayerGeometry(kind="Linear", inputs=8 + width, outputs=4)
            target = KernelTarget(layer=layer, input_shape=(8 + width,), output_shape=(4,))
            await patiently(partial(hub.put_blueprint, document))
            kernel = await patiently(partial(hub.request_kernel, document.digest, target))
            asked.append(kernel.kernel)
    return asked


def _disturb(
    stack: Stack,
    plan: Plan,
    config: EsperConfig,
    sessions: _Sessions,
    outcome: Outcome,
    say: Callable[[str], None],
) -> list[str]:
    """Each part once in each way, in turn, then any at random, until the faults are used up.

    Returns the kernels that were asked for meanwhile, some before each fault.
    """
    chance = random.Random(plan.seed)
    parts = list(stack.parts.items())
    in_turn = _in_turn(parts, chance)
    kernels: list[str] = []
    for number in range(plan.faults):
        if sessions.go_on():
            say(f"session {len(sessions.directories)} begins")
            _wait_for_progress(sessions.directories[-1])
        due = range(len(kernels), plan.blueprints * (number + 1) // plan.faults)
        kernels += asyncio.run(_request_kernels(config, due))
        name, part, fault = (
            in_turn[number]
            if number < len(in_turn)
            else (*chance.choice(parts), chance.choice(FAULTS))
        )
        seconds = chance.uniform(plan.shortest, plan.longest)
        say(f"fault {number + 1} of {plan.faults}: {fault} {name} for {seconds:.1f} s")
        _fault(part, fault, seconds)
        outcome.faults.append(f"{fault} {name}")
        time.sleep(chance.uniform(plan.shortest, plan.longest))
    return kernels


def _in_turn(
    parts: Sequence[tuple[str, ServerProcess]], chance: random.Random
) -> list[tuple[str, ServerProcess, str]]:
    """Every part once, in one way or the other; then every part in the way that is left."""
    first = [(name, part, chance.choice(FAULTS)) for name, part in parts]
    second = [(name, part, FAULTS[1 - FAULTS.index(fault)]) for name, part, fault in first]
    chance.shuffle(first)
    chance.shuffle(second)
    return first + second


def _wait_for_progress(directory: Path) -> None:
    """Wait until the session has reached its first boundary: before, there is nothing to lose."""
    deadline = time.monotonic() + 60
    while not lines(directory / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.05)


def _fault(part: ServerProcess, fault: str, seconds: float) -> None:
    if fault == "kill":
        part.kill()
        time.sleep(seconds)
        part.start()
    else:
        part.freeze()
        time.sleep(seconds)
        part.thaw()


async def _heard(config: EsperConfig, directory: Path) -> list[OonaMessage]:
    """Every transition of a run that the bus keeps, in its order, also those sent again."""
    annotations = yaml.safe_load((directory / "manifest.yaml").read_text().split("---\n")[0])
    uid = annotations["metadata"]["annotations"]["esper.dev/uid"]
    bus = OonaClient(config.redis, scope=uid)
    try:
        return [message async for message in bus.history({TopicNames.TRANSITIONS}, uid)]
    finally:
        await bus.close()


def note_results(postgres: PostgresServer) -> None:
    """From now on the database keeps a note of every result that it accepts for a kernel."""
    for statement in (
        "CREATE TABLE accepted_results (kernel text, lease text)",
        "CREATE FUNCTION note_result() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN INSERT INTO accepted_results VALUES (NEW.kernel, NEW.lease_token); "
        "RETURN NEW; END'",
        "CREATE TRIGGER note_result AFTER UPDATE OF state ON compiled_kernels FOR EACH ROW "
        "WHEN (NEW.state = 'characterized') EXECUTE FUNCTION note_result()",
    ):
        postgres.execute(statement, DATABASE)


def check_database(postgres: PostgresServer, outcome: Outcome) -> None:
    """One accepted result a kernel, and no row in the middle of something."""
    rows = postgres.execute(
        "SELECT count(*), "
        "count(*) FILTER (WHERE artifact_digest IS NULL), "
        "count(*) FILTER (WHERE state <> 'characterized') FROM compiled_kernels",
        DATABASE,
    )
    kernels, without, unsettled = (int(value) for value in rows.split("|"))
    outcome.figures["rows"] = kernels
    outcome.check(without == unsettled == 0, f"{without} kernels without an artifact")
    accepted = postgres.execute(
        "SELECT k.kernel, count(a.kernel) FROM compiled_kernels k "
        "LEFT JOIN accepted_results a ON a.kernel = k.kernel AND a.lease = k.lease_token "
        "GROUP BY k.kernel",
        DATABASE,
    ).split()
    total = int(postgres.execute("SELECT count(*) FROM accepted_results", DATABASE))
    outcome.figures["acceptedResults"] = total
    for line in accepted:
        kernel, results = line.split("|")
        outcome.check(results == "1", f"kernel {kernel}: {results} accepted results of its lease")
    outcome.check(total == kernels, f"{total} results were accepted for {kernels} kernels")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chaos and print what it came to as JSON; 0 where everything held."""
    parser = argparse.ArgumentParser(prog="make chaos-services", description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--blueprints", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="what chance starts with")
    parser.add_argument(
        "--session", type=Path, default=Path("examples/01-mnist1d-mlp/session.yaml")
    )
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    plan = Plan(faults=arguments.faults, blueprints=arguments.blueprints, seed=arguments.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        with Stack(folder / "stack", workers=2, settings=SETTINGS) as stack:
            outcome = run(stack, arguments.session, folder / "patient", plan)
            impatient = run_impatient(stack, arguments.session, folder / "impatient", plan)
    result = {
        "faults": outcome.faults + impatient.faults,
        "figures": outcome.figures | impatient.figures,
        "broken": outcome.broken + impatient.broken,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
