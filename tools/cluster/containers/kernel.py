"""What a cluster changes of the kernel for the whole machine: control groups, a few settings."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tools.servers.process import ServerError

CGROUPS = Path("/sys/fs/cgroup")
SETTINGS = Path("/proc/sys")
TUNED = (
    *("vm/overcommit_memory", "vm/panic_on_oom"),
    *("kernel/panic", "kernel/panic_on_oops"),
    *("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"),
)
"""A kubelet sets these when it starts."""
NOTES = Path("/run/esper-clusters")
"""Gone with the machine's next start, as the settings are."""
_FOUND = "settings.json"
_REMOVE_SECONDS = 10.0


def hierarchies(root: Path = CGROUPS) -> list[Path]:
    """The trees of control groups: one in version 2, one for each controller in version 1.

    Version 1 can have one of version 2 beside it, without controllers; kubelets write there too.
    """
    if (root / "cgroup.controllers").exists():
        return [root]
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())


def make_cgroup(name: str, root: Path = CGROUPS) -> None:
    """Make a control group such as ``/a/b`` in every tree, with all that children may use.

    Raises:
        ServerError: the machine has no trees of control groups.
    """
    trees = hierarchies(root)
    if not trees:
        raise ServerError(f"{root}: got no control groups; a kubelet needs them")
    for tree in trees:
        group = tree
        for part in name.strip("/").split("/"):
            _delegate(group)
            group = group / part
            group.mkdir(exist_ok=True)
            _inherit(group)
        _delegate(group)


def remove_cgroup(name: str, root: Path = CGROUPS) -> None:
    """Remove a control group with all below it, once the processes in it have ended.

    Raises:
        ServerError: one of it can't be removed.
    """
    for tree in hierarchies(root):
        top = tree / name.strip("/")
        deadline = time.monotonic() + _REMOVE_SECONDS
        while top.exists():
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
            if top.exists():
                if time.monotonic() > deadline:
                    raise ServerError(f"{top}: can't be removed; processes are left in it")
                time.sleep(0.05)


def save_settings(cluster: str, notes: Path = NOTES, root: Path = SETTINGS) -> None:
    """Note what the machine's settings were before the first of its clusters; once for each."""
    notes.mkdir(exist_ok=True)
    with _locked(notes):
        (notes / cluster.strip("/")).touch()
        if not (notes / _FOUND).exists():
            found = {name: (root / name).read_text().strip() for name in TUNED}
            (notes / _FOUND).write_text(json.dumps(found))


def restore_settings(cluster: str, notes: Path = NOTES, root: Path = SETTINGS) -> None:
    """Set what was noted, where this was the last of the machine's clusters."""
    if not notes.exists():
        return
    with _locked(notes):
        (notes / cluster.strip("/")).unlink(missing_ok=True)
        if [path.name for path in notes.iterdir()] == [_FOUND]:
            for name, value in json.loads((notes / _FOUND).read_text()).items():
                (root / name).write_text(f"{value}\n")
            shutil.rmtree(notes)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _delegate(group: Path) -> None:
    """Let the children of a group of version 2 have its controllers."""
    control = group / "cgroup.subtree_control"
    if control.exists():
        for controller in (group / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):  # one that can't be shared out
                control.write_text(f"+{controller}")


def _inherit(group: Path) -> None:
    """In version 1 a new group has no processors and no memory until it is told."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        own = group / name
        if own.exists() and not own.read_text().strip():
            with contextlib.suppress(OSError):
                own.write_text((group.parent / name).read_text())
