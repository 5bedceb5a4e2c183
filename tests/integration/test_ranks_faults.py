"""What goes wrong on one rank, or on some samples only: every rank takes the same way on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from esper.cli.preparing import SOURCE_ANNOTATION
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.parallel import Shard
from tests.integration.rank_sessions import MODULE, session, train
from tests.ranks import run_ranks


def fail_on_some(ranks: Ranks) -> None:
    """Seeds at one layer raise, and those at another are not finite, where samples are so."""
    del ranks
    from esper.execution.branches import Branch

    own = Branch.join

    def joined(branch: Any, out: Tensor, source: Tensor, host: Tensor) -> Tensor:
        if host.shape[-1] == 12 and source.shape[-1] == 64 and float(source[:, 20].sum()) > 35:
            raise RuntimeError(f"no way with {float(source[0].sum()):.6f}")
        found = own(branch, out, source, host)
        if host.shape[-1] == 10 and source.shape[-1] == 12:
            return found / (out[:, :1] < 2.5)
        return found

    Branch.join = joined  # type: ignore[method-assign]


def test_a_seed_that_fails_on_some_samples_is_culled_alike_by_any_number_of_ranks() -> None:
    made = session(logicalShards=4, epochs=8)
    (whole,) = run_ranks(1, train, made, fail_on_some)
    told = [message for _, reason, message in whole["events"] if reason == "CircuitOpened"]
    assert any("no way with" in message for message in told), whole["events"]
    for size in (2, 4):
        found = run_ranks(size, train, made, fail_on_some)
        assert {one["digest"] for one in found} == {whole["digest"]}
        assert found[0] == whole


def slow_store(ranks: Ranks) -> None:
    """Where checkpoints lie, rank 0 is answered later than a collective may take."""
    if ranks.rank:
        return
    from esper.services.tolaria.checkpoint_folder import FolderCheckpoints

    listed, calls = FolderCheckpoints.listed, [0]

    def listing(place: FolderCheckpoints) -> dict[str, dict[str, int]]:
        calls[0] += 1
        # First it is read; then, as each checkpoint is written, what is old is looked for.
        if calls[0] in (1, 2):
            time.sleep(4.5)
        return listed(place)

    FolderCheckpoints.listed = listing  # type: ignore[method-assign]


def run_in(ranks: Ranks, folder: Path, prepare: Callable[[Ranks], None]) -> dict[str, Any]:
    """The whole of a rank's work in a run's directory."""
    from esper.cli.ranks import run_rank
    from esper.configs import EsperConfig

    prepare(ranks)
    config = EsperConfig()
    run_rank(folder / "session.yaml", folder / "D", ranks, json_output=False, config=config)
    result: dict[str, Any] = json.loads((folder / "D" / "result.json").read_text())
    return result


def nothing(ranks: Ranks) -> None:
    """Nothing breaks."""
    del ranks


def write(folder: Path, made: dict[str, Any]) -> None:
    (folder / "of_ranks.py").write_text(MODULE)
    (folder / "session.yaml").write_text(yaml.safe_dump(made))


def test_the_others_wait_while_rank_0_reads_and_writes_in_a_slow_store(tmp_path: Path) -> None:
    write(tmp_path, session(epochs=1))
    found = run_ranks(2, run_in, tmp_path, slow_store, timeout_seconds=4.0)
    assert found[0]["outcome"] == "Succeeded"
    assert found[0] == found[1]


def test_no_rank_waits_on_where_the_newest_checkpoint_can_not_be_read(tmp_path: Path) -> None:
    write(tmp_path, session(epochs=1))
    checkpoint = tmp_path / "D" / "checkpoints" / "epoch-000001"
    checkpoint.mkdir(parents=True)
    made = session(epochs=1)
    made["metadata"]["annotations"] = {SOURCE_ANNOTATION: str(tmp_path)}
    (tmp_path / "D" / "manifest.yaml").write_text(yaml.safe_dump(made))
    (checkpoint / "checkpoint.json").write_text("{}")
    found = run_ranks(2, run_in, tmp_path, nothing, failing=True)
    for one in found:
        assert "of which none can be used" in str(one), one


def lose_finiteness(ranks: Ranks) -> None:
    """Once, in the third epoch, the loss on one rank's last samples is not finite."""
    from esper.services.tolaria.engine import Engine

    own_epoch, own_share = Engine.train_epoch, Engine._share_of
    tries: list[int] = []

    def train_epoch(engine: Engine, epoch: int, *, trial: bool = False) -> float:
        tries.append(epoch)
        return own_epoch(engine, epoch, trial=trial)

    def share_of(engine: Engine, value: Tensor, shard: Shard) -> Tensor:
        last = shard.number == engine.parallel.count - 1
        if last and tries.count(3) == 1 and tries[-1] == 3 and value.dim() == 0:
            value.data.fill_(math.nan)
        return own_share(engine, value, shard)

    Engine.train_epoch = train_epoch  # type: ignore[method-assign]
    Engine._share_of = share_of  # type: ignore[method-assign]


def rolled_back(found: dict[str, Any]) -> list[tuple[int, str]]:
    return [(epoch, told) for epoch, reason, told in found["events"] if reason == "RolledBack"]


def test_a_loss_that_is_not_finite_on_one_rank_rolls_back_all() -> None:
    made = session(logicalShards=4, epochs=4)
    (whole,) = run_ranks(1, train, made, lose_finiteness)
    ((epoch, told),) = rolled_back(whole)
    assert epoch == 2
    assert "the loss was not finite after epoch 2" in told
    found = run_ranks(2, train, made, lose_finiteness)
    assert {one["digest"] for one in found} == {whole["digest"]}
    assert found[0] == whole
    for sharding in ("data", "full"):
        made = session(epochs=4, sharding=sharding)
        made["spec"]["workers"] = {"processesPerWorker": 2}
        made["spec"]["training"]["optimizer"]["name"] = "rmsprop"
        replicas = run_ranks(2, train, made, lose_finiteness)
        assert len({one["digest"] for one in replicas}) == 1
        assert [epoch for epoch, _ in rolled_back(replicas[0])] == [2]
