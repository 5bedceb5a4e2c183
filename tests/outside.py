"""Code in a process of its own that has torch but can't import Esper, without the wait for torch.

A process that has imported torch forks for each piece of code. Run as a program this file is that
process: it reads one request a line ({folder, code}) and answers with the exit status.
"""

import json
import os
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path


def run_outside(code: str, folder: Path) -> None:
    """Run `code` in `folder`, whose modules it finds.

    Raises:
        AssertionError: it ended with an error, which the message tells.
    """
    process = _zygote()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"folder": str(folder), "code": code}) + "\n")
    process.stdin.flush()
    status = int(process.stdout.readline())
    assert status == 0, (folder / "outside.log").read_text()


@cache
def _zygote() -> "subprocess.Popen[str]":
    """The process that forks; it ends when its input does, with the process of the tests."""
    return subprocess.Popen(
        [sys.executable, "-I", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _serve() -> None:
    import torch

    # What is loaded on first use would be loaded in every fork anew.
    torch.save(torch.zeros(1), os.devnull)
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(**request)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _become(folder: str, code: str) -> None:
    status = 1
    try:
        os.chdir(folder)
        log = os.open("outside.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.modules["esper"] = None  # type: ignore[assignment]
        sys.path.insert(0, folder)
        try:
            exec(compile(code, "<outside>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
