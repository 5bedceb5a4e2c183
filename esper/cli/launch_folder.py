"""The folder of a worker's launches: locked while the worker lives, cleared away after it.

A worker that is killed leaves its folder. The next one on the machine clears away all of those
whose lock nobody holds: a lock goes with its process, whatever numbers processes get later.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "esper-worker-"
_OWNER = "owner"


@contextmanager
def launch_folder() -> Iterator[Path]:
    """A new folder for temporary files, which is gone afterwards."""
    clear_away(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        hidden = folder / f".{_OWNER}"
        with hidden.open("w") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            # Only now can it be seen: an unlocked one would be taken for a dead worker's.
            hidden.rename(folder / _OWNER)
            yield folder


def clear_away(place: Path) -> None:
    """Delete the folders in `place` of this user's workers that are gone."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            with (folder / _OWNER).open("r+") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
