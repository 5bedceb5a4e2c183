"""No process outlives the one that it works for: each test is a process with its own children."""

import signal
import subprocess
import sys

BEGIN = """
import os, signal, subprocess, sys, time
from esper.cli.process_tree import adopt_orphans, die_with_parent, kill_children, status_of

def alive(pid):
    return os.path.exists(f"/proc/{pid}")

def orphan():
    "A process whose parent has ended; its session is its own."
    reading, writing = os.pipe()
    if os.fork() == 0:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(600)
        os.write(writing, str(pid).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reading, 20))
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.returncode


def test_a_child_whose_parent_is_gone_before_it_could_ask_ends_itself():
    assert run("die_with_parent(os.getppid() + 1)") == -signal.SIGKILL
    assert run("die_with_parent(os.getppid())") == 0


def test_a_child_dies_with_its_parent():
    code = """
adopt_orphans()
reading, writing = os.pipe()
if os.fork() == 0:  # the parent
    child = os.fork()
    if child == 0:
        die_with_parent(os.getppid())
        os.write(writing, str(os.getpid()).encode())
        time.sleep(600)
    time.sleep(600)
child = int(os.read(reading, 20))
parent = int(open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[1])
os.kill(parent, signal.SIGKILL)
os.waitpid(parent, 0)
pid, status = os.waitpid(child, 0)  # it was adopted
sys.exit(os.WTERMSIG(status) != signal.SIGKILL)
"""
    assert run(code) == 0


def test_children_are_killed_with_their_groups_and_what_they_leave_behind():
    code = """
adopt_orphans()
adopted = orphan()
leader = subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600"], start_new_session=True)
while len(open(f"/proc/{leader.pid}/task/{leader.pid}/children").read().split()) < 2:
    time.sleep(0.01)
kill_children(30)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    sys.exit(alive(adopted) or alive(leader.pid))
sys.exit("a child is left")
"""
    assert run(code) == 0


def test_orphans_that_have_ended_are_reaped_while_a_process_is_waited_for():
    code = """
adopt_orphans()
working = subprocess.Popen(["sh", "-c", "sleep 0.5; exit 7"])
adopted = orphan()
os.kill(adopted, signal.SIGKILL)
status = None
while status is None:
    status = status_of(working)
    time.sleep(0.01)
sys.exit(alive(adopted) or status != 7 or status_of(working) != 7)
"""
    assert run(code) == 0


def test_without_children_there_is_nothing_to_do():
    assert run("kill_children(30)") == 0
