import json
from pathlib import Path

import pytest
import yaml

from esper.cli.main import main

REPOSITORY = Path(__file__).parents[4]
EXAMPLE = REPOSITORY / "examples/01-mnist1d-mlp/session.yaml"


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_crds_are_printed_as_yaml_documents(capsys):
    assert main(["crds"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert {document["kind"] for document in documents} == {"CustomResourceDefinition"}
    kinds = {document["spec"]["names"]["kind"] for document in documents}
    assert {"TrainingSession", "Blueprint"} <= kinds


def test_crds_written_are_up_to_date_until_one_changes(empty_directory, capsys):
    folder = empty_directory / "deep" / "crds"
    assert main(["crds", "--output-dir", str(folder)]) == 0
    assert main(["crds", "--check", str(folder)]) == 0
    first, *_ = sorted(folder.iterdir())
    first.write_text(first.read_text() + "# edited\n")
    (folder / "old.yaml").write_text("{}")
    capsys.readouterr()
    assert main(["crds", "--check", str(folder)]) == 1
    error = capsys.readouterr().err
    assert first.name in error
    assert "old.yaml" in error
    assert error.count("\n") == 2


def test_crds_check_of_an_empty_folder_fails(empty_directory):
    assert main(["crds", "--check", str(empty_directory)]) == 1


def test_crds_need_a_folder_to_write_in(empty_directory, capsys):
    (empty_directory / "taken").write_text("")
    assert main(["crds", "--output-dir", "taken"]) == 2
    assert "--output-dir: got taken" in capsys.readouterr().err


def test_a_report_needs_a_run(empty_directory, capsys):
    assert main(["report", str(empty_directory)]) == 2
    assert "manifest.yaml" in capsys.readouterr().err
    assert list(empty_directory.iterdir()) == []


@pytest.mark.parametrize("option", [["--output-dir", "b"], ["--overwrite"]])
def test_a_resumed_run_has_its_directory_and_keeps_it(option, capsys):
    assert main(["run", "--resume", "a", *option]) == 2
    assert option[0] in capsys.readouterr().err


def test_resuming_what_is_no_run_is_bad_input(empty_directory, capsys):
    assert main(["run", "--resume", str(empty_directory)]) == 2
    assert capsys.readouterr().err.startswith("esper: error: ")
    assert list(empty_directory.iterdir()) == []


def test_a_missing_manifest_is_bad_input(empty_directory, capsys):
    for command in ("run", "validate"):
        assert main([command, "nowhere.yaml"]) == 2
        assert "nowhere.yaml" in capsys.readouterr().err
    assert list(empty_directory.iterdir()) == []


def test_a_shipped_example_is_valid(empty_directory, capsys):
    assert main(["validate", str(EXAMPLE)]) == 0
    assert capsys.readouterr().out == f"{EXAMPLE}: valid\n"
    assert main(["validate", str(EXAMPLE), "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out.splitlines()[-1]), dict)
    assert list(empty_directory.iterdir()) == []
