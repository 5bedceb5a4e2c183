from __future__ import annotations

import threading

import pytest

from esper.errors import StorageFull
from esper.services.tolaria.checkpoint_writer import CheckpointWriter
from esper.services.tolaria.snapshots import Snapshot
from tests.unit.esper.services.tolaria.checkpointing import snapshot


def test_one_is_written_at_a_time_and_training_goes_on_meanwhile() -> None:
    may_go_on, written = threading.Event(), []

    def write(one: Snapshot) -> None:
        may_go_on.wait(10)
        written.append((one.epoch, threading.current_thread() is not threading.main_thread()))

    writer = CheckpointWriter(write)
    writer.hand_over(snapshot(1))
    assert written == []  # and yet the call has returned
    may_go_on.set()
    writer.hand_over(snapshot(2))
    assert written[0] == (1, True)
    writer.drain()
    assert written == [(1, True), (2, True)]
    writer.drain()


def test_an_error_is_raised_once_at_the_next_hand_over_or_drain() -> None:
    written = []

    def write(one: Snapshot) -> None:
        if one.epoch in (1, 3):
            raise StorageFull(f"no room left for {one.epoch}")
        written.append(one.epoch)

    writer = CheckpointWriter(write)
    writer.hand_over(snapshot(1))
    with pytest.raises(StorageFull, match="no room left for 1"):
        writer.hand_over(snapshot(2))
    writer.drain()
    assert written == []
    writer.hand_over(snapshot(2))
    writer.hand_over(snapshot(3))
    with pytest.raises(StorageFull, match="no room left for 3"):
        writer.drain()
    writer.drain()
    assert written == [2]
