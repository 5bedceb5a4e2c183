"""`make images`: what the images hold, whom they run as, what a change of the code costs."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.e2e.clusters import module
from tools.images.building import ROOT, BuildahImages
from tools.images.recipes import RECIPES, arguments
from tools.servers.process import ServerError

RUNTIME, CONTROL, REDIS = (RECIPES[name].image() for name in ("runtime", "control", "redis"))
SMALL_BYTES = 20_000_000

TRAINS = """
import torch, torch.distributed as dist
assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
compiled = torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()))
compiled(torch.ones(2, 4)).sum().backward()
assert torch.linalg.svdvals(torch.eye(3)).sum() == 3 and torch.fft.fft(torch.ones(4))[0] == 4
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29500", rank=0, world_size=1)
try:
    torch.ones(1).cuda()
except RuntimeError as error:
    print("no GPU:", str(error).splitlines()[0])
import esper.services.tamiyo.main, esper.services.tezzeret.main, esper.services.tolaria.main
import esper.zoo.data, esper.zoo.models
esper.zoo.data.digits(), esper.zoo.data.mnist1d()
print("trains")
"""
WHO = "import os, sys; print(os.getuid(), os.getgid(), sys.version_info[:2] >= (3, 11))"
TOOLS = "for t in {}; do command -v $t; done; true"


@pytest.fixture(autouse=True)
def built(images):
    """All of them are in the cluster."""


def test_each_image_is_built_and_loaded(images):
    for image in (RUNTIME, CONTROL, REDIS):
        assert re.search(rf"^{image}: built \(", images, re.MULTILINE)
        assert re.search(rf"^{image}: loaded \(", images, re.MULTILINE)


def test_the_runtime_trains_and_compiles_as_nobody_on_a_root_that_can_not_be_written(pods):
    said = pods.run("trains", RUNTIME, ["python", "-c", TRAINS])
    assert said.splitlines()[-1] == "trains"
    assert "no GPU: " in said
    assert pods.run("who", RUNTIME, ["python", "-c", WHO]).strip() == "65532 65532 True"
    assert "usage: esper worker" in pods.run("worker", RUNTIME, ["esper", "worker", "--help"])


def test_no_image_has_what_builds_it(pods):
    tools = "pip pip3 uv git make hatchling apt-get"
    for name, image, more in (("runtime", RUNTIME, ""), ("control", CONTROL, "g++ gcc cc ld")):
        found = pods.run(name, image, ["sh", "-c", TOOLS.format(f"{tools} {more}")])
        assert set(found.split()) <= {"/usr/bin/apt-get"}  # Debian's own, of no use to nobody


def test_the_control_image_runs_the_operator_and_the_hub_without_pytorch(pods):
    said = pods.run("operator", CONTROL, ["esper-operator", "--help"])
    assert "usage: esper-operator" in said
    code = (
        "import esper.services.urza.main, esper_operator.main, importlib.util as i;"
        "print([name for name in ('torch', 'numpy') if i.find_spec(name)])"
    )
    assert pods.run("hub", CONTROL, ["python", "-c", code]).strip() == "[]"
    assert pods.run("who", CONTROL, ["python", "-c", WHO]).strip() == "65532 65532 True"


def test_redis_is_one_that_tells_rights_of_reading_and_writing_apart(pods):
    said = pods.run("redis", REDIS, ["redis-server", "--version"])
    assert int(re.search(r"v=(\d+)", said)[1]) >= 7


def test_a_change_of_the_code_rebuilds_and_loads_little(cluster, tmp_path):
    context = tmp_path / "context"
    context.mkdir()
    for name in ("esper", "images"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements-bootstrap.txt"):
        shutil.copy(ROOT / name, context / name)
    changed = context / "esper" / "__init__.py"
    changed.write_text(changed.read_text() + f"CHANGED = {time.time()}\n")
    said = []
    builder, recipe = BuildahImages(said.append), RECIPES["runtime"]
    given = arguments(
        recipe, base=builder.base_of(recipe), accelerator="cpu", environment=os.environ
    )
    builder.build(recipe.file, recipe.image("changed"), context, given)
    builder.load(recipe.image("changed"), cluster.layout)
    (megabytes,) = re.findall(r"changed: ([\d.]+) MB were new", "\n".join(said))
    assert 0 < float(megabytes) * 1e6 < SMALL_BYTES


def test_users_models_come_as_an_image_on_the_runtime(cluster, pods):
    own = "localhost/own-model:dev"
    file = ROOT / "examples" / "03-own-model" / "Containerfile"
    words = (f"--file={file}", f"--image={own}")
    module("tools.images", *words, state=cluster.layout.state)
    code = "import model; print(model.__file__, sum(1 for _ in model.Spiral(6).parameters()) > 0)"
    said = pods.run("model", own, ["python", "-c", code])
    assert said.split() == ["/opt/esper/models/model.py", "True"]


def test_an_accelerator_that_is_not_known_is_refused(cluster):
    builder = BuildahImages(print)
    recipe = RECIPES["runtime"]
    given = {"BASE": recipe.base, "ACCELERATOR": "tpu"}
    with pytest.raises(ServerError, match="ACCELERATOR: got tpu; allowed: cuda, cpu"):
        builder.build(recipe.file, "localhost/never:dev", Path(ROOT), given)
