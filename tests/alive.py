"""Whether a process is at work, by its id."""

import psutil


def alive(pid: int) -> bool:
    """Whether there is such a process, and it does not only wait for someone to ask how it ended.

    What has lost its parent waits for that until the system comes round to it, or for ever.
    """
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
