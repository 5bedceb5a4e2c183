"""Commands of `esper` as processes of their own that start at once.

A server imports what a run needs and then forks: every command is a process that can be killed
like any other, without the seconds that imports take. Run as a module, this file is the server: it
reads one request a line ({argv, folder, fault, plots}) and answers with the process's id, then
with its exit status and its streams.
"""

import gc
import io
import json
import os
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "esper.cli.embedded",
    "torch._dynamo",
    "torch._inductor.config",
    "sklearn.datasets",
    "matplotlib.backends.backend_agg",
    "mpl_toolkits.mplot3d",
    "sqlalchemy.ext.asyncio",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "aiosqlite",
    "alembic.command",
    "mako.ext.pygmentplugin",
    "esper.services.urza.store",
    "esper.services.urza.migrations.versions.r0001_tables",
)
"""What a run would import at its first need."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative for a signal, and what it wrote."""

    status: int
    out: str
    err: str


class Server:
    """Starts commands one after the other."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
            text=True,
        )

    def start(self, *argv, folder, fault=None, plots=False):
        """A command in a folder; `fault` is the name and the arguments of one in `faults.py`.

        To draw its report takes as long as a small session, so `plots` are drawn if asked for.
        """
        argv = [str(word) for word in argv]
        request = {"argv": argv, "folder": str(folder), "fault": fault, "plots": plots}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Started(int(self._process.stdout.readline()), self._process.stdout)

    def run(self, *argv, folder, fault=None, plots=False):
        """A command from its start to its end."""
        return self.start(*argv, folder=folder, fault=fault, plots=plots).wait()

    def close(self):
        """End the server."""
        self._process.stdin.close()
        self._process.wait(timeout=600)
        self._process.stdout.close()


class Started:
    """A command at work."""

    def __init__(self, pid, answers):
        self.pid = pid
        self._answers = answers

    def signal(self, number):
        """Send a signal; a command that has ended gets none."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self):
        """Wait for its end."""
        return Ended(**json.loads(self._answers.readline()))


def environment():
    """The environment of a process that finds Esper and computes on one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def until(condition, process_ended=lambda: False, seconds=600, look_seconds=0.001):
    """Look every millisecond, or as often as is said, until `condition` holds.

    Raises:
        TimeoutError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or process_ended():
            raise TimeoutError("what was waited for did not happen")
        time.sleep(look_seconds)


def preload():
    """Import what a run needs, before this process forks for the first time."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    # Of what is here already no process has to look for garbage.
    gc.collect()
    gc.freeze()
    # A fork takes along the calling thread alone.
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"


def _serve():
    _draw()
    preload()
    for line in sys.stdin:
        request = json.loads(line)
        pipes = {name: os.pipe() for name in ("out", "err")}
        pid = os.fork()
        if pid == 0:
            _become(request, [end for _, end in pipes.values()])
        _answer(pid)
        _, status = os.waitpid(pid, 0)
        ended = {"status": os.waitstatus_to_exitcode(status)}
        for name, (reading, writing) in pipes.items():
            os.close(writing)
            with open(reading, encoding="utf-8") as stream:
                ended[name] = stream.read()
        _answer(json.dumps(ended))


def _answer(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _draw():
    """Look up fonts and formats once, not in every process."""
    from matplotlib.figure import Figure

    from esper.cli.report_drawing import drawing

    with drawing():
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0, 1], label="line")
        axes.set_title("title")
        axes.legend()
        for kind in ("svg", "png"):
            figure.savefig(io.BytesIO(), format=kind)


def _become(request, streams):
    """Be the command, in the forked process. A pipe holds more than a quiet command says."""
    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
        os.chdir(request["folder"])
        from esper.cli.main import main
        from tests.integration import faults

        if not request["plots"]:
            faults.empty_plots()
        if request["fault"]:
            name, *arguments = request["fault"]
            getattr(faults, name)(*arguments)
        try:
            status = main(request["argv"])
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
