"""What must hold of the repository as a whole."""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import esper
from esper.cli import main as cli

ROOT = Path(__file__).parents[2]

# Written in parts, so that this file does not hold what it looks for.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download.pytorch", "org"),
        ("registry.npmjs", "org"),
        ("proxy.golang", "org"),
        ("crates", "io"),
    )
]
ADDRESS_OPTIONS = re.compile(r"--(extra-)?index-url|--find-links")
MACHINE_PATHS = re.compile(r"(^|[^A-Za-z0-9_.])/(work|farm|root|home|Users)/")

PUBLIC_NAMES = {
    "EsperConfig",
    "KasminaLayer",
    "MorphableModel",
    "SeedLifecycleState",
    "__version__",
    "unwrap",
    "wrap",
}

COMMON_OPTIONS = {"-h", "--help", "--config", "--set", "--debug"}
COMMANDS = {
    "run": {
        *("--resume", "--output-dir", "--overwrite", "--json", "--no-live", "--quiet", "FILE"),
        *("--hub", "--bus"),
    },
    "validate": {"--json", "FILE"},
    "report": {"--json", "D"},
    "crds": {"--output-dir", "--check"},
    "doctor": {"--json"},
    "serve": {"SERVICE", "FILE", "--output-dir", "--session"},
    "worker": {
        *("FILE", "--output-dir", "--processes", "--nodes", "--node-rank", "--rendezvous"),
        *("--rendezvous-id", "--local-address", "--restarts", "--termination-log", "--json"),
    },
    "compile": {"--kernel", "--json", "--termination-log"},
    "fetch": {
        *("SESSION", "--namespace", "-n", "--output-dir", "--overwrite", "--hub", "--json"),
    },
    "token": {"--role", "--subject", "--namespace", "--days", "--json"},
}

HEAVY = {"torch", "numpy", "pydantic", "rich", "yaml", "sqlalchemy", "matplotlib", "asyncio"}


def repository_files():
    """Files that are committed or would be: all but those that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def texts():
    for path in repository_files():
        try:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_no_file_names_a_registry():
    found = [
        f"{path}: {address}" for path, text in texts() for address in REGISTRIES if address in text
    ]
    assert not found


def test_no_file_but_the_ones_that_check_name_a_way_to_reach_one():
    found = {str(path) for path, text in texts() if ADDRESS_OPTIONS.search(text)}
    assert found <= {"tests/architecture/test_repository.py"}


def test_no_file_names_a_path_of_a_machine():
    found = [
        f"{path}:{number}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert not found


def test_the_repository_holds_no_files_that_mislead_tools():
    names = {str(path.relative_to(ROOT)) for path in repository_files()}
    assert "uv.lock" not in names
    assert "operator/__init__.py" not in names
    assert not [name for name in names if name.startswith("tests/") and "/operator/" in name]
    assert not [name for name in names if re.match(r"tests/.*__init__\.py$", name)]


def test_modules_can_be_read_in_one_sitting():
    sizes = {path: len(path.read_text().splitlines()) for path in (ROOT / "esper").rglob("*.py")}
    assert not {str(path): size for path, size in sizes.items() if size > 500}


def test_one_file_reads_the_environment():
    reading = re.compile(r"\bos\.(environ|getenv)\b")
    found = [p.name for p in (ROOT / "esper").rglob("*.py") if reading.search(p.read_text())]
    assert found == ["configs.py"]


def test_public_names_are_frozen():
    assert set(esper.__all__) == PUBLIC_NAMES
    assert all(getattr(esper, name) for name in PUBLIC_NAMES)


def test_commands_and_their_options_are_frozen():
    (commands,) = [
        action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
    ]
    found = {
        name: {
            option
            for action in command._actions
            for option in (action.option_strings or [action.metavar])
        }
        for name, command in commands.choices.items()
    }
    assert found == {name: options | COMMON_OPTIONS for name, options in COMMANDS.items()}


def test_contracts_import_without_what_they_must_not_need():
    done = run_python(
        """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "numpy", "sqlalchemy", "redis", "safetensors"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import esper, esper.configs, esper.contracts, esper.cli.main
for module in pkgutil.walk_packages(esper.contracts.__path__, "esper.contracts."):
    importlib.import_module(module.name)
"""
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy():
    done = run_python(
        f"""
import sys
from esper.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
sys.exit(",".join({HEAVY!r} & set(sys.modules)))
"""
    )
    assert done.stderr.strip() == ""
    assert done.stdout.startswith("usage: esper")


def test_help_is_there_at_once():
    # Time on the processor, so that what else runs here does not count.
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "esper", "--help"], cwd=ROOT, check=True, capture_output=True
        )
        after = os.times()
        user = after.children_user - before.children_user
        seconds.append(user + after.children_system - before.children_system)
    assert min(seconds) < 0.3


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements():
    extras = project()["optional-dependencies"]
    lines = [*project()["dependencies"], *(line for extra in extras.values() for line in extra)]
    return [requirement for line in lines if (requirement := Requirement(line)).name != "esper"]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_each_requirement_is_bounded_and_locked_within_its_bounds(requirement):
    assert {"<", ">="} <= {specifier.operator for specifier in requirement.specifier}
    lock = (ROOT / "requirements.lock").read_text()
    name = requirement.name.lower().replace("_", "-")
    versions = re.findall(rf"^{re.escape(name)}==([^ \n]+)", lock, re.MULTILINE)
    assert versions
    assert all(requirement.specifier.contains(version) for version in versions)


def test_every_locked_package_is_pinned_by_hash():
    for name in ("requirements.lock", "requirements-bootstrap.txt"):
        text = re.sub(r"^ *#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE)
        entries = re.split(r"\n(?=\S)", text.strip())
        assert entries
        assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)


def test_the_commands_of_the_readme_and_of_ci_are_targets():
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        named = re.findall(
            r"^make ([a-z0-9-]+)|`make ([a-z0-9-]+)", (ROOT / document).read_text(), re.M
        )
        assert {first or second for first, second in named} <= targets
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
