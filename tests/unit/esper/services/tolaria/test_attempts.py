"""Attempts of one session: the newer one goes on, and the older one changes nothing any more."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from esper.errors import Superseded
from esper.services.tolaria.checkpoint_manifest import (
    MANIFEST,
    attempt_of,
    epoch_of,
    newest_first,
)
from esper.services.tolaria.checkpoints import Checkpoints
from tests.unit.esper.services.tolaria.checkpointing import OWNER, newest, snapshot
from tests.unit.esper.services.tolaria.places import Place
from tests.unit.esper.services.tolaria.test_checkpoints import LOG_BYTES, found, wrote


def attempt(place: Place, number: int, keep: int = 2) -> Checkpoints:
    """What a pod of that attempt has, once it has begun."""
    checkpoints = place.open(keep, replace(OWNER, attempt=number))
    checkpoints.begin()
    return checkpoints


def checkpoints_in(place: Place) -> list[str]:
    return [name for name in place.names() if epoch_of(name) is not None]


def test_names_tell_epoch_and_attempt_and_order_by_the_attempt_first() -> None:
    names = {
        "epoch-000009": (9, 0),
        "epoch-000009-20260301t120000000000-0011aabb": (9, 0),
        "epoch-000004-a000002": (4, 2),
        "epoch-000003-a000002-20260301t120000000000-0011aabb": (3, 2),
        "epoch-000001-a1234567": (1, 1_234_567),
    }
    assert {name: (epoch_of(name), attempt_of(name)) for name in names} == names
    assert newest_first(names) == [
        "epoch-000001-a1234567",
        "epoch-000004-a000002",
        "epoch-000003-a000002-20260301t120000000000-0011aabb",
        "epoch-000009-20260301t120000000000-0011aabb",
        "epoch-000009",
    ]
    assert epoch_of("attempts") is None


def test_the_next_attempt_goes_on_from_the_newest_checkpoint(place: Place) -> None:
    first = attempt(place, 1)
    wrote(first, 1, 2)
    second = attempt(place, 2)
    assert newest(second).epoch == 2
    wrote(second, 3)
    assert [(epoch_of(n), attempt_of(n)) for n in newest_first(checkpoints_in(place))] == [
        (3, 2),
        (2, 1),
    ]
    manifest = json.loads(place.files()[place.file_of(3, MANIFEST)])
    assert (manifest["attempt"], manifest["epoch"]) == (2, 3)


def test_an_older_attempt_neither_writes_nor_removes(place: Place) -> None:
    older = attempt(place, 1, keep=1)
    wrote(older, 1)
    newer = attempt(place, 2)
    before = place.files()
    for what in (
        lambda: older.write(snapshot(2), LOG_BYTES),
        lambda: older.keep({"result.json": b"{}"}) if older.portable else older.begin(),
        lambda: attempt(place, 1),
    ):
        with pytest.raises(Superseded, match="attempt 2 has taken over from attempt 1"):
            what()
    assert place.files() == before
    assert newest(newer).epoch == 1


def test_what_an_older_attempt_wrote_last_counts_less_than_what_a_newer_one_did(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = attempt(place, 1), attempt(place, 2)
    wrote(newer, 5, which="newer")
    # It had looked just before the newer one began.
    monkeypatch.setattr(older, "_refuse_superseded", lambda: None)
    monkeypatch.setattr(older, "_drop_old", lambda _: None)
    wrote(older, 6, which="older")
    assert newest(attempt(place, 3)).state["which"] == "newer"


def test_one_that_was_frozen_after_its_look_removes_nothing_of_a_newer_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = attempt(place, 1, keep=1)
    wrote(older, 1)
    wrote(attempt(place, 2), 2, 3)
    before = place.files()
    monkeypatch.setattr(older, "_refuse_superseded", lambda: None)
    wrote(older, 2)
    assert before.items() <= place.files().items()
    assert newest(attempt(place, 3)).epoch == 3


def test_a_restart_within_an_attempt_writes_on(place: Place) -> None:
    wrote(attempt(place, 3), 1, which="first")
    again = attempt(place, 3)
    assert newest(again).epoch == 1
    wrote(again, 1, 2, which="again")
    assert newest(attempt(place, 3)).state["which"] == "again"
    assert len(checkpoints_in(place)) == 2


def test_one_that_an_attempt_did_not_finish_is_none_and_goes(place: Place) -> None:
    wrote(attempt(place, 1), 1)
    cut = place.change(1, MANIFEST, lambda _: None)
    second = attempt(place, 2)
    assert second.newest() is None, "there never was any"
    wrote(second, 1)
    assert cut not in place.names()
    assert newest(attempt(place, 3)).epoch == 1


def test_a_manifest_of_another_attempt_than_its_name_says_is_passed_over(place: Place) -> None:
    wrote(attempt(place, 1), 1, 2)
    place.change(2, MANIFEST, lambda data: json.dumps(json.loads(data) | {"attempt": 9}).encode())
    result = found(attempt(place, 2))
    assert result.snapshot.epoch == 1
    assert "checkpoint.json of attempt 9; allowed: the attempt in its name" in result.passed[0]


def test_without_attempts_nothing_is_left_but_checkpoints(place: Place) -> None:
    plain = place.open()
    plain.begin()
    wrote(plain, 1)
    (name,) = place.names()
    assert attempt_of(name) == 0
    assert "attempt" not in json.loads(place.files()[place.file_of(1, MANIFEST)])
    assert newest(attempt(place, 1)).epoch == 1


def test_results_take_the_place_of_earlier_ones(place: Place) -> None:
    checkpoints = attempt(place, 1)
    checkpoints.portable = True
    for number in (b"1", b"2"):
        checkpoints.keep({"result.json": number, "grown.py": b""})
    beside = place.beside("results")
    assert beside == {"result.json": b"2", "grown.py": b""}
    assert place.open().kept() == beside


def test_of_a_run_that_has_not_finished_nothing_is_kept(place: Place) -> None:
    wrote(attempt(place, 1), 3)
    assert place.open().kept() == {}
