"""The supervisor over torch's own elastic agent, which takes seconds of processor time to start.

Whatever needs no torch is tested with a smaller agent, in tests/unit/esper/cli/test_supervising.py.
"""

import json
import os
import signal
import socket
import time

from tests.unit.esper.cli.supervised import TORCHRUN, Worker


def test_torchrun_starts_killed_ranks_again_and_its_end_is_told(tmp_path):
    # Rank 1 is killed, then rank 0 raises; both are stopped with the other and started again.
    plan = {
        "0": ["meet store wait interrupted", "meet store raise", "meet store done"],
        "1": ["meet kill", "meet wait interrupted", "meet done"],
    }
    worker = Worker(tmp_path, plan, agent=TORCHRUN, processes=2, restarts=2)
    assert worker.wait() == 0, worker.err
    assert worker.ended["outcome"] == "done"
    assert len(worker.lines("starts-0")) == len(worker.lines("starts-1")) == 3
    # Ranks write to the worker's own standard output, untouched.
    assert sorted(map(json.loads, worker.out.splitlines()), key=str) == [{"rank": 0}, {"rank": 1}]
    assert "what nobody foresaw" in worker.err
    # In one that torchrun keeps, ranks would find the addresses of those that were killed.
    assert worker.lines("stores") == ["False"] * 3
    assert worker.living() == []


def test_nodes_survive_the_loss_of_another_and_stop_with_a_checkpoint(tmp_path):
    plan = {"0": ["wait interrupted"], "1": ["wait interrupted"]}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"agent": TORCHRUN, "nodes": 2, "restarts": 1, "port": port}
    first = Worker(tmp_path, plan, name="-a", node=0, **settings)
    second = Worker(tmp_path, name="-b", node=1, **settings)
    first.until("starts-0")
    first.until("starts-1")
    ((kept,), (lost,)) = (children_of(node.process.pid) for node in (first, second))
    (peer,) = children_of(kept)
    os.kill(lost, signal.SIGKILL)
    # A real rank would find that its peer is gone, and crash.
    os.kill(peer, signal.SIGKILL)
    first.until("starts-0", 2)
    first.until("starts-1", 2)
    # The node with the store went on: its torchrun has met the other's new one.
    assert children_of(first.process.pid) == [kept]
    first.signal(signal.SIGTERM)
    second.signal(signal.SIGTERM)
    assert first.wait() == 75, first.err
    assert second.wait() == 75, second.err
    signals = [first.lines(f"signals-{rank}") for rank in (0, 1)]
    assert signals == [["SIGTERM"], ["SIGTERM"]]
    assert first.living() == []


def test_nothing_is_left_of_torchrun_when_its_supervisor_is_killed(tmp_path):
    worker = Worker(tmp_path, {"0": ["hang"]}, agent=TORCHRUN)
    worker.until("starts-0")
    (agent,) = children_of(worker.process.pid)
    worker.process.kill()
    worker.process.communicate()
    end = time.monotonic() + 60
    while worker.living() or os.path.exists(f"/proc/{agent}"):
        assert time.monotonic() < end
        time.sleep(0.02)


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(child) for child in children.read().split()]
