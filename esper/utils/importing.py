"""Imports at which the garbage collector does not look on."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Inside, modules are imported that stay to the process's end.

    While torch and all that stands on it come, a sixth of the time would go to collections that
    find nothing. What has come is not looked through later either: with it, one whole collection
    would halt a training for a second.
    """
    known, collecting = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if collecting:
            gc.enable()
