"""What goes wrong on one rank, or on some samples only: every rank takes the same way on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from esper.services.tolaria.distribution import Alone, Ranks
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
    whole = train(Alone(), made, fail_on_some)
    told = [message for _, reason, message in whole["events"] if reason == "CircuitOpened"]
    assert any("no way with" in message for message in told), whole["events"]
    for size in (2, 4):
        found = run_ranks(size, train, made, fail_on_some)
        assert {one["digest"] for one in found} == {whole["digest"]}
        assert found[0] == whole


def slow_store(ranks: Ranks) -> None:
    """Where checkpoints lie, rank 0 is answered later than a collective may take, twice each way."""
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
    (tmp_path / "D" / "manifest.yaml").write_bytes((tmp_path / "session.yaml").read_bytes())
    (checkpoint / "checkpoint.json").write_text("{}")
    found = run_ranks(2, run_in, tmp_path, nothing, failing=True)
    for one in found:
        assert "of which none can be used" in str(one), one
