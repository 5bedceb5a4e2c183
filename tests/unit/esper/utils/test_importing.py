import gc
import sys

import pytest

from esper.utils.importing import importing

NAME = "of_no_use"


@pytest.fixture(autouse=True)
def _as_before():
    frozen = gc.get_freeze_count()
    yield
    sys.modules.pop(NAME, None)
    if gc.get_freeze_count() != frozen:
        gc.unfreeze()
        gc.collect()
        gc.freeze()


def test_nothing_is_collected_while_modules_come_and_they_are_not_looked_through_later(
    monkeypatch, tmp_path
):
    (tmp_path / f"{NAME}.py").write_text("KEPT = [[] for _ in range(10_000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    frozen, collected = gc.get_freeze_count(), sum(s["collections"] for s in gc.get_stats())
    with importing():
        assert not gc.isenabled()
        __import__(NAME)
    assert gc.isenabled()
    assert sum(s["collections"] for s in gc.get_stats()) == collected
    assert gc.get_freeze_count() - frozen > 10_000


def test_where_nothing_came_nothing_is_kept_for_good():
    frozen = gc.get_freeze_count()
    with importing():
        import json  # noqa: F401
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_who_collects_nothing_goes_on_so_and_an_error_changes_nothing():
    gc.disable()
    try:
        with pytest.raises(ModuleNotFoundError), importing():
            __import__("of_no_use_at_all")
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ModuleNotFoundError), importing():
        __import__("of_no_use_at_all")
    assert gc.isenabled()
