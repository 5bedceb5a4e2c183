import json

import pytest

from esper.cli.run_reading import read_run
from esper.contracts.enums import SeedState, SessionOutcome
from esper.errors import OutputError
from tests.unit.esper.cli.run_directories import BASE, LAYERS, write_run


def test_a_finished_run(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert (run.name, run.outcome, run.reached, run.epochs) == (
        "mnist1d-mlp",
        SessionOutcome.SUCCEEDED,
        100,
        100,
    )
    assert run.parameters_base == BASE
    assert run.layers == LAYERS
    assert [part.layer for part in run.grown] == ["layers.0", "layers.2"]
    assert [life.state for life in run.lives].count(SeedState.FOSSILIZED) == 2
    assert run.refused == (("attention.out_proj", "its forward is never called"),)
    assert run.classification
    assert run.exported
    assert len(run.decisions) == 100


def test_a_run_under_way_with_half_written_lines(tmp_path):
    whole = read_run(write_run(tmp_path / "a", reached=43, outcome=SessionOutcome.RUNNING))
    torn = read_run(
        write_run(tmp_path / "b", reached=43, outcome=SessionOutcome.RUNNING, torn=True)
    )
    assert torn == whole
    assert torn.outcome is SessionOutcome.RUNNING
    assert (torn.result, torn.exported) == (None, False)


def test_a_line_cut_inside_a_character(tmp_path):
    directory = write_run(tmp_path / "run")
    path = directory / "events.jsonl"
    path.write_bytes(path.read_bytes() + '{"message": "α'.encode()[:-1])
    assert len(read_run(directory).events) == 1


def test_only_a_manifest(tmp_path):
    full = write_run(tmp_path / "full")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "manifest.yaml").write_bytes((full / "manifest.yaml").read_bytes())
    run = read_run(bare)
    assert (run.rows, run.lives, run.decisions, run.grown) == ((), (), (), ())
    assert (run.outcome, run.epochs, run.parameters_base) == (SessionOutcome.RUNNING, 100, None)


def test_an_epoch_recorded_twice_counts_once_and_the_later_stands(tmp_path):
    directory = write_run(tmp_path / "run")
    before = read_run(directory)
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    again = json.loads(rows[50]) | {"validationLoss": 9.0}
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    with (directory / "events.jsonl").open("a") as file:
        file.write((directory / "events.jsonl").read_text())
    with (directory / "decisions.jsonl").open("a") as file:
        file.write((directory / "decisions.jsonl").read_text())
    after = read_run(directory)
    assert len(after.rows) == 100
    assert after.rows[50].validation_loss == 9.0
    assert (after.lives, after.events, after.decisions) == (
        before.lives,
        before.events,
        before.decisions,
    )


def test_figures_that_are_not_finite_are_read(tmp_path):
    directory = write_run(tmp_path / "run", reached=3, outcome=SessionOutcome.FAILED)
    row = {"epoch": 4, "validationLoss": "NaN", "trainLoss": "Infinity"}
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    run = read_run(directory)
    assert run.rows[3].train_loss == float("inf")
    assert run.message == "loss not finite after 3 rollbacks"


def test_the_session_may_stand_among_other_documents(tmp_path):
    directory = write_run(tmp_path / "run")
    path = directory / "manifest.yaml"
    path.write_text("kind: Blueprint\n---\n" + path.read_text())
    assert read_run(directory).name == "mnist1d-mlp"


@pytest.mark.parametrize(
    ("condition", "outcome"),
    [
        ({"status": "True", "reason": "Done"}, SessionOutcome.SUCCEEDED),
        ({"status": "False", "reason": "Evicted"}, SessionOutcome.FAILED),
        ({"status": "Unknown", "reason": "Waiting"}, SessionOutcome.RUNNING),
        ({"status": "False", "reason": "Interrupted"}, SessionOutcome.INTERRUPTED),
    ],
)
def test_the_summary_condition_tells_the_outcome(tmp_path, condition, outcome):
    directory = write_run(tmp_path / "run", reached=2, outcome=SessionOutcome.RUNNING)
    status = {"status": {"conditions": [{"type": "Succeeded", **condition}]}}
    (directory / "status.yaml").write_text(json.dumps(status))
    assert read_run(directory).outcome is outcome


def test_the_result_tells_the_outcome_where_the_status_does_not(tmp_path):
    directory = write_run(tmp_path / "run")
    (directory / "status.yaml").unlink()
    assert read_run(directory).outcome is SessionOutcome.SUCCEEDED


def test_layers_come_from_the_status_before_the_first_epoch(tmp_path):
    directory = write_run(tmp_path / "run", reached=0, outcome=SessionOutcome.RUNNING)
    assert read_run(directory).layers == LAYERS


def no_directory(path):
    return path / "nowhere"


def a_file(path):
    path.joinpath("file").write_text("")
    return path / "file"


def nothing_inside(path):
    return path


def foreign_manifest(path):
    path.joinpath("manifest.yaml").write_text("kind: Deployment\n")
    return path


def broken_manifest(path):
    path.joinpath("manifest.yaml").write_text("kind: [\n")
    return path


def binary_manifest(path):
    path.joinpath("manifest.yaml").write_bytes(b"\xff" * 100)
    return path


def manifest_is_a_directory(path):
    path.joinpath("manifest.yaml").mkdir()
    return path


@pytest.mark.parametrize(
    "make",
    [
        no_directory,
        a_file,
        nothing_inside,
        foreign_manifest,
        broken_manifest,
        binary_manifest,
        manifest_is_a_directory,
    ],
)
def test_a_directory_that_is_no_run_is_refused(tmp_path, make):
    with pytest.raises(OutputError) as caught:
        read_run(make(tmp_path))
    assert caught.value.field == "directory"
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", "nonsense\n"),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"epoch": "many"}\n'),
        ("events.jsonl", '{"type": "transition"}\n'),
        ("decisions.jsonl", '\n{"id": 3}\n'),
        ("result.json", "{"),
        ("result.json", '{"accuracy": "high"}'),
        ("status.yaml", "status: ["),
    ],
)
def test_a_file_that_is_malformed_is_named(tmp_path, name, text):
    directory = write_run(tmp_path / "run", reached=2)
    (directory / name).write_text(text)
    with pytest.raises(OutputError, match=name.replace(".", r"\.")):
        read_run(directory)
