"""A library that gives way to one with the same names and nothing behind them."""

import importlib.util
import signal
import subprocess
import sys

import pytest

from tools.images.building import ROOT

SOURCE = """
#include <string.h>
int variable = 7;
int called(void) { return variable; }
int other(void) { return 1; }
char ballast[1 << 20] = {1};
"""
VERSIONS = "ONE { called; variable; }; TWO { other; ballast; };"
USER = "int called(void); int main(int count, char **_) { return count > 1 ? called() : 0; }"


@pytest.fixture(scope="module")
def empty_cuda():
    spec = importlib.util.spec_from_file_location("empty_cuda", ROOT / "images" / "empty_cuda.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def compiled(folder, name, text, *words):
    source = folder / f"{name}.c"
    source.write_text(text)
    made = folder / name
    subprocess.run(["g++", "-x", "c", str(source), "-x", "none", *words, "-o", made], check=True)
    return made


@pytest.mark.parametrize("versions", [VERSIONS, "{ global: *; };"])
def test_who_is_linked_against_it_runs_on_but_for_its_functions(empty_cuda, tmp_path, versions):
    (tmp_path / "map").write_text(versions)
    library = compiled(
        *(tmp_path, "libone.so.1", SOURCE, "-shared", "-fPIC", "-Wl,-soname,libone.so.1"),
        f"-Wl,--version-script={tmp_path / 'map'}",
    )
    user = compiled(tmp_path, "user", USER, str(library), f"-Wl,-rpath,{tmp_path}")
    assert subprocess.run([user, "call"]).returncode == 7
    asked = {symbol.name for symbol in empty_cuda.symbols(user, "--undefined-only")}
    defined = empty_cuda.symbols(library, "--defined-only")
    before = library.stat().st_size
    empty_cuda.empty(library, [symbol for symbol in defined if symbol.name in asked])
    assert library.stat().st_size < before / 10
    assert subprocess.run([user]).returncode == 0
    assert subprocess.run([user, "call"]).returncode in {-signal.SIGILL, -signal.SIGTRAP}
    left = {symbol.name for symbol in empty_cuda.symbols(library, "--defined-only")}
    assert "called" in left
    assert not {"other", "variable", "ballast"} & left
