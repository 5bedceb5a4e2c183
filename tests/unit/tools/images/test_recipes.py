"""How images are built: names, arguments, command lines."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.images import __main__ as images
from tools.images.__main__ import main
from tools.images.building import ROOT, build
from tools.images.recipes import RECIPES, Buildah, arguments, debian, docker_build
from tools.images.store import ImageStore, chain
from tools.servers.process import ServerError

RUNTIME, CONTROL, REDIS = (RECIPES[name] for name in ("runtime", "control", "redis"))
BUILDAH = Buildah(Path("/images"), Path("/cache/uv"))


def given(command):
    return dict(re.findall(r"--build-arg=([A-Z_]+)=(\S+)", " ".join(command)))


def test_every_image_has_its_name_and_its_containerfile():
    assert RUNTIME.image() == "localhost/esper-runtime:dev"
    assert CONTROL.image("1.2") == "localhost/esper-control:1.2"
    for recipe in RECIPES.values():
        text = (ROOT / recipe.file).read_text()
        assert re.search(r"^ARG BASE=docker\.io/library/", text, re.MULTILINE)
        assert "USER 65532:65532" in text
        assert "FROM ${BASE}" in text


def test_arguments_are_those_that_the_containerfile_takes():
    found = {
        recipe.name: arguments(
            recipe,
            base="localhost/base:1",
            accelerator="cpu",
            environment={"SSL_CERT_FILE": "/etc/ca", "PIP_CERT": "/etc/ca", "HOME": "/x"},
        )
        for recipe in RECIPES.values()
    }
    certificates = {"SSL_CERT_FILE", "PIP_CERT"}
    assert set(found["runtime"]) == {"BASE", "ACCELERATOR", *certificates}
    assert set(found["control"]) == {"BASE", *certificates}
    assert set(found["redis"]) == {"BASE"}
    for name, names in found.items():
        text = (ROOT / RECIPES[name].file).read_text()
        assert all(re.search(rf"^ARG {argument}\b", text, re.MULTILINE) for argument in names)


def test_without_a_base_the_containerfiles_own_is_taken():
    assert arguments(REDIS, base=None, accelerator="cpu", environment={}) == {}


def test_buildah_needs_no_namespaces_and_asks_no_registry():
    command = BUILDAH.build(RUNTIME.file, RUNTIME.image(), Path("/x"), {"BASE": "b"})
    assert {"--isolation=chroot", "--pull=false", "--layers"} <= set(command)
    assert "--volume=/cache/uv:/uv-cache" in command
    assert given(command) == {"BASE": "b", "UV_CACHE_DIR": "/uv-cache"}
    assert command[-1] == "/x"
    assert "--file=/x/images/runtime.Containerfile" in command
    for words in (command, BUILDAH.new_container(), BUILDAH.commit("c", "i")):
        assert "--root=/images/store" in words


def test_docker_builds_the_same_file():
    command = docker_build(RUNTIME.file, "esper", Path("/x"), {"ACCELERATOR": "cuda"})
    assert command[:2] == ["docker", "build"]
    assert "--file=/x/images/runtime.Containerfile" in command
    assert given(command) == {"ACCELERATOR": "cuda"}


def test_bases_have_what_is_not_installed_later():
    assert {"g++", "python3-dev", "python3-venv"} <= set(RUNTIME.packages)
    assert not {"g++", "python3-dev"} & set(CONTROL.packages)
    command = debian(REDIS.packages, Path("/x/root.tar"))
    assert "--include=redis-server" in command
    assert command[-2:] == ["bookworm", "/x/root.tar"]


class Builder:
    """Takes down what it is asked to build."""

    def __init__(self):
        self.built = []

    def base_of(self, recipe):
        return recipe.base

    def build(self, file, image, context, given):
        self.built.append((file, image, given))

    def load(self, image, cluster):
        raise AssertionError


def test_a_base_that_is_asked_for_wins():
    builder = Builder()
    for base in (None, "mine:1"):
        build(builder, REDIS, base=base, accelerator="cpu", tag="t")
    assert [given["BASE"] for _, _, given in builder.built] == [REDIS.base, "mine:1"]
    assert {image for _, image, _ in builder.built} == {"localhost/esper-redis:t"}


@pytest.mark.parametrize("name", ["runtimes", "base"])
def test_an_image_that_there_is_not_is_refused(name, capsys):
    assert main([name]) == 1
    allowed = "runtime, control, redis"
    assert capsys.readouterr().out == f"error: NAME: got {name}; allowed: {allowed}\n"


@pytest.mark.parametrize("way", ["kind", "source"])
def test_images_for_a_cluster_to_come_are_loaded_into_none(way, monkeypatch):
    asked, builder = [], Builder()  # whose `load` fails
    monkeypatch.setattr(images, "_images", lambda way: asked.append(way) or builder)
    monkeypatch.setattr(images, "layout", lambda _: SimpleNamespace(way="source"))  # one runs
    assert main([f"--build-for={way}"]) == 0
    assert asked == [way]
    assert len(builder.built) == len(RECIPES)


def test_layers_come_the_lowest_first():
    layers = [{"id": "c", "parent": "b"}, {"id": "a"}, {"id": "b", "parent": "a"}, {"id": "d"}]
    assert [layer["id"] for layer in chain(layers, "c")] == ["a", "b", "c"]


def test_an_image_is_read_from_the_store_as_it_is(tmp_path, monkeypatch):
    """`containers-storage` is stood for by a script that answers as it does."""
    answers = {
        "images": [{"id": "i1", "names": ["localhost/one:dev"], "layer": "l2"}, {"id": "i2"}],
        "layers": [
            {"id": "l2", "parent": "l1", "diff-digest": "sha256:22", "diff-size": 6},
            {"id": "l1", "diff-digest": "sha256:11", "diff-size": 5},
        ],
    }
    for name, answer in answers.items():
        (tmp_path / name).write_text(json.dumps(answer))
    program = tmp_path / "containers-storage"
    program.write_text(
        f"#!/bin/sh\nshift 6\ncase $1 in images|layers) cat {tmp_path}/$1 ;;\n"
        'get-image-data) printf %s "config of $2 $3" ;;\n'
        "diff) [ $3 = l1 ] && printf lower || { printf up; exit 1; } ;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    store = ImageStore(tmp_path)
    assert store.has("localhost/one:dev")
    assert not store.has("localhost/two:dev")
    assert store.identity("localhost/one:dev") == "sha256:i1"
    image = store.image("localhost/one:dev")
    assert image.config == b"config of i1 sha256:i1"
    assert [(layer.digest, layer.size) for layer in image.layers] == [
        ("sha256:11", 5),
        ("sha256:22", 6),
    ]
    with image.layers[0].read() as content:
        assert content.read() == b"lower"
    with pytest.raises(ServerError, match="diff --uncompressed l2: exit code 1"):  # noqa: SIM117
        with image.layers[1].read() as content:
            content.read()
    with pytest.raises(ServerError, match="localhost/two:dev: there is no such image"):
        store.image("localhost/two:dev")
