"""What `elastic_agent` does on one node, without torch's seconds: PARENT FOLDER OPTIONS… PROGRAM….

That torchrun does the same is shown by `tests/integration/test_worker_torchrun.py`.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from esper.cli.elastic_agent import CRASHED, tell_crash
from esper.cli.outcomes import Outcomes
from esper.cli.process_tree import die_with_parent


class AskedError(Exception):
    """A signal has come."""


def main():
    die_with_parent(int(sys.argv[1]))
    parser = argparse.ArgumentParser()
    parser.add_argument("--nproc-per-node", type=int)
    parser.add_argument("--max-restarts", type=int)
    at = sys.argv.index("--no-python")
    options, _ = parser.parse_known_args(sys.argv[3:at])
    signal.signal(signal.SIGTERM, stop)
    ranks = []
    try:
        for _ in range(options.max_restarts + 1):
            first = int(os.environ.get("FIRST_RANK", "0"))
            numbers = range(first, first + options.nproc_per_node)
            ranks = [start(sys.argv[at + 1 :], rank) for rank in numbers]
            crashed = first_crash(ranks)
            if crashed is None:
                return 0
            end(ranks)
        code = ranks[crashed].returncode
        name = signal.Signals(-code).name if code < 0 else ""
        tell_crash(Outcomes(Path(sys.argv[2])), first + crashed, code, name)
        return CRASHED
    except AskedError:
        end(ranks)
        return 143


def stop(*_):
    raise AskedError


def start(program, rank):
    return subprocess.Popen(program, env=os.environ | {"RANK": str(rank)}, start_new_session=True)


def first_crash(ranks):
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.01)


def end(ranks):
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGTERM)
    for rank in ranks:
        rank.wait()


if __name__ == "__main__":
    sys.exit(main())
