"""A run that is killed at any moment ends as if it had not been: same metrics, same model.

Each test starts a process, lets it die, and goes on with `esper run --resume`.
"""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.integration.processes import ROOT, environment, until
from tests.integration.spirals import SESSION, changed, files, left, lines, status, write_session

RUNS, KILLS = 4, 5
ENGINE = "esper.services.tolaria.engine"
TRAINER = "esper.services.tolaria.trainer"
GROWTH = "esper.services.tolaria.growth:Growth"
RUN = "esper.services.tolaria.run_directory"


class Folder:
    """A session's manifest, and the run of it that nothing disturbs."""

    def __init__(self, path, server, *documents, modules=None):
        self.path = path
        self.server = server
        self.manifest = write_session(path, *documents, modules=modules)
        started = server.start(*self.argv("undisturbed"), folder=path)
        until((path / "undisturbed" / "manifest.yaml").exists)
        begun = time.monotonic()
        ended = started.wait()
        self.seconds = time.monotonic() - begun
        assert (ended.status, ended.err) == (0, "")
        self.expected = left(path / "undisturbed")

    def argv(self, directory):
        return "run", self.manifest, "--output-dir", directory, "--quiet"

    def run(self, directory, fault=None):
        return self.server.run(*self.argv(directory), folder=self.path, fault=fault)

    def resume(self, directory, fault=None):
        return self.server.run(
            "run", "--resume", directory, "--quiet", folder=self.path, fault=fault
        )

    def same_in_the_end(self, directory):
        """Whether the run in `directory`, resumed, ends as the undisturbed one."""
        ended = self.resume(directory)
        assert (ended.status, ended.err) == (0, "")
        found = left(self.path / directory)
        for name, value in self.expected.items():
            assert found[name] == value, name
        assert status(self.path / directory)[1]["reason"] == "Succeeded"
        return True


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("spirals"), server)


def test_the_session_sees_every_kind_of_trial(folder):
    events = [json.loads(line) for line in folder.expected["events"]]
    moves = {(event["previous"], event["current"]) for event in events}
    assert {("germinated", "training"), ("training", "grafting")} <= moves
    assert {("grafting", "fossilized"), ("grafting", "culled")} <= moves


def test_the_same_manifest_twice_gives_the_same_run(folder):
    assert folder.run("again").status == 0
    assert left(folder.path / "again") == folder.expected


@pytest.mark.parametrize("number", range(RUNS))
def test_killed_at_random_moments(folder, number):
    """One run after the other; each is killed so many times, and each time goes on."""
    chance, directory, kills = random.Random(number), f"moments-{number}", 0
    seconds, argv = folder.seconds, folder.argv(directory)
    while kills < KILLS:
        started = folder.server.start(*argv, folder=folder.path)
        until((folder.path / directory / "manifest.yaml").exists)
        begun = time.monotonic()
        time.sleep(chance.uniform(0, 2 * seconds / KILLS))
        started.signal(signal.SIGKILL)
        ended = started.wait()
        assert ended.status in (-signal.SIGKILL, 0), ended.err
        if ended.status == 0 and kills:
            break
        if ended.status == 0:  # the machine is faster than when the undisturbed run was timed
            seconds = min(seconds, time.monotonic() - begun) / 2
            directory = f"{directory}-sooner"
            argv = folder.argv(directory)
        else:
            kills += 1
            argv = "run", "--resume", directory, "--quiet"
    assert folder.same_in_the_end(directory)


FAULTS = {
    # In the trials.
    "first shadow batch": ["kill_before", f"{ENGINE}:shadow_gradients", 1],
    "later shadow batch": ["kill_after", f"{ENGINE}:shadow_gradients", 47],
    "shadow measurement": ["kill_before", f"{GROWTH}.judge_trials", 3],
    "recovery trial, with the seed": ["kill_in_arm", "with", 7],
    "recovery trial, between its arms": ["kill_in_arm", "with", 20],
    "recovery trial, without the seed": ["kill_in_arm", "without", 7],
    "recovery trial, at its verdict": ["kill_before", f"{GROWTH}.judge_recovery", 2],
    "fossilized and not yet told": ["kill_after", f"{GROWTH}.fossilize", 1],
    # At a boundary.
    "between decision and its doing": ["kill_before", f"{GROWTH}.apply", 3],
    "decided and not yet trained": ["kill_before", f"{GROWTH}.begin_trials", 2],
    "kernel being compiled": ["kill_before", "esper.services.tezzeret.compiler:compile_kernel", 1],
    "kernel stored and not yet told": [
        "kill_before",
        "esper.services.urza.store:UrzaHub.complete_kernel",
        2,
    ],
    "half a line of metrics": ["kill_in_line", "metrics.jsonl", 4],
    "half a line of events": ["kill_in_line", "events.jsonl", 5],
    "half a line of decisions": ["kill_in_line", "decisions.jsonl", 2],
    # In a checkpoint.
    "checkpoint, handed over": ["kill_before", f"{RUN}:RunLog._write_checkpoint", 3],
    "checkpoint, logs being synced": ["kill_before", f"{RUN}:sync", 8],
    "checkpoint, half its tensors": ["kill_in_file", "tensors.safetensors", 4],
    "checkpoint, half its structure": ["kill_in_file", "structure.json", 4],
    "checkpoint, half its state": ["kill_in_file", "state.json", 4],
    "checkpoint, half its manifest": ["kill_in_file", "checkpoint.json", 4],
    "first checkpoint, not yet renamed": ["kill_at_rename", "epoch-000001", 1],
    "checkpoint, not yet renamed": ["kill_at_rename", "epoch-000006", 1],
    "checkpoint, just renamed": ["kill_at_rename", "epoch-000006", 1, True],
    "checkpoint, old ones being dropped": ["kill_in_removal", "epoch-000003"],
    # In the other files.
    "status not yet in its place": ["kill_at_rename", "status.yaml", 5],
    "last epoch's checkpoint written": ["kill_before", f"{TRAINER}:TolariaTrainer._finish", 1],
    "model being exported": ["kill_before", "esper.core.export:write_atomically", 1],
    "model exported, its source not": ["kill_at_rename", "grown.py", 1],
    "result not yet in its place": ["kill_at_rename", "result.json", 1],
    "result without its report": ["kill_before", "esper.cli.embedded:write_report", 1],
}


@pytest.mark.parametrize(("name", "fault"), FAULTS.items(), ids=FAULTS)
def test_killed_at_an_exact_place(folder, name, fault):
    directory = name.replace(" ", "-").replace(",", "")
    assert folder.run(directory, fault).status == -signal.SIGKILL
    assert folder.same_in_the_end(directory)


def test_killed_three_times_over(folder):
    assert folder.run("thrice", ["kill_in_arm", "without", 3]).status == -signal.SIGKILL
    for fault in (
        ["kill_before", f"{RUN}:RunLog.open", 1],
        ["kill_in_file", "state.json", 2],
    ):
        assert folder.resume("thrice", fault).status == -signal.SIGKILL
    assert folder.same_in_the_end("thrice")


def test_killed_before_its_first_file(folder):
    fault = ["kill_at_rename", "manifest.yaml", 1]
    assert folder.run("unborn", fault).status == -signal.SIGKILL
    refused = folder.resume("unborn")
    assert refused.status == 2
    assert "--resume: got unborn; allowed: the output directory of a run" in refused.err
    # It holds nothing of value: the same command may have it.
    assert folder.run("unborn").status == 0
    assert left(folder.path / "unborn") == folder.expected


def test_a_finished_run_is_not_trained_again(folder):
    before = (folder.path / "undisturbed" / "metrics.jsonl").stat().st_mtime_ns
    ended = folder.server.run(
        "run", "--resume", "undisturbed", "--json", "--quiet", folder=folder.path
    )
    assert ended.status == 0
    result = json.loads(ended.out)
    assert {k: v for k, v in result.items() if k != "seconds"} == folder.expected["result"]
    assert (folder.path / "undisturbed" / "metrics.jsonl").stat().st_mtime_ns == before


STOPS = {
    "in an epoch": ["kill_before", f"{ENGINE}:Engine._step", 47],
    "in the first epoch": ["kill_before", f"{ENGINE}:Engine._step", 3],
    "without the seed": ["kill_in_arm", "without", 7],
    "at a boundary": ["kill_before", f"{GROWTH}.apply", 3],
}


@pytest.mark.parametrize(
    ("name", "number"), list(zip(STOPS, [signal.SIGINT, signal.SIGTERM] * 2, strict=True))
)
def test_asked_to_stop(folder, name, number):
    directory = f"{number.name}-{name.replace(' ', '-')}"
    ended = folder.run(directory, [*STOPS[name], number])
    assert ended.status == 130
    assert ended.err == (
        "esper: interrupted; a checkpoint was written. Go on with: "
        f"esper run --resume {directory}\n"
    )
    found, summary = status(folder.path / directory)
    assert (summary["status"], summary["reason"]) == ("Unknown", "Interrupted")
    assert (folder.path / directory / found["checkpoint"]["name"] / "state.json").is_file()
    assert folder.same_in_the_end(directory)


REPLACED = {
    "not yet moved away": ["kill_at_rename", ".epoch-000004.replaced", 1],
    "being dropped": ["kill_in_removal", "epoch-000004"],
    "not yet in its place": ["kill_at_rename", "epoch-000004", 1],
}


@pytest.mark.parametrize(("name", "fault"), REPLACED.items(), ids=REPLACED)
def test_killed_while_a_stop_writes_its_checkpoint_anew(folder, name, fault):
    directory = f"stopped-{name.replace(' ', '-')}"
    # Epoch 5's third step; resumed and stopped once more before its end, the run writes the
    # checkpoint of epoch 4 again, and that is the end.
    stop = ["kill_before", f"{ENGINE}:Engine._step", 4 * 20 + 3, signal.SIGTERM]
    assert folder.run(directory, stop).status == 130
    stop = ["kill_before", f"{ENGINE}:Engine._step", 3, signal.SIGTERM]
    assert folder.resume(directory, ["both", stop, fault]).status == -signal.SIGKILL
    assert folder.same_in_the_end(directory)


def test_checkpoints_further_apart(server, tmp_path):
    """Decisions since the last checkpoint are replayed, epochs since then trained again."""
    session = changed(
        SESSION,
        spec__training__checkpoint={"everyEpochs": 4, "keep": 1},
        spec__growth__controller={"policy": "heuristic", "intervalEpochs": 2},
        spec__growth__seedsPerLayer=2,
    )
    apart = Folder(tmp_path, server, session)
    assert [name for name in files(tmp_path / "undisturbed") if name.endswith("state.json")] == [
        "checkpoints/epoch-000008/state.json"
    ]
    assert apart.run("D", ["kill_in_line", "metrics.jsonl", 7]).status == -signal.SIGKILL
    assert len(lines(tmp_path / "D" / "decisions.jsonl")) > 0
    assert apart.same_in_the_end("D")


@pytest.mark.slow
def test_processes_of_their_own(folder):
    """The same over processes that start from nothing, as people start them."""
    command = [sys.executable, "-m", "esper"]
    started = subprocess.Popen(
        [*command, *map(str, folder.argv("plain"))], cwd=folder.path, env=environment()
    )
    metrics = folder.path / "plain" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 4)
    started.kill()
    assert started.wait() == -signal.SIGKILL
    stopped = subprocess.Popen(
        [*command, "run", "--resume", "plain"],
        cwd=folder.path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: metrics.read_bytes().count(b"\n") >= 6)
    stopped.terminate()
    _, err = stopped.communicate(timeout=600)
    assert stopped.returncode == 130
    assert err.endswith("Go on with: esper run --resume plain\n")
    assert str(ROOT) not in err
    assert folder.same_in_the_end("plain")
