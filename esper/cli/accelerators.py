"""Whether a worker has the GPUs that its session asks for."""

from __future__ import annotations

import ctypes

from esper.contracts.resources import TrainingSession
from esper.contracts.resources.cluster import GPU
from esper.errors import AcceleratorMissing

DRIVER = "libcuda.so.1"
"""The library of NVIDIA's driver, on WSL and Tegra too. Without it PyTorch counts no GPU."""


def require_accelerators(session: TrainingSession, present: int) -> None:
    """Refuse a session that asks for more GPUs a worker than are `present`.

    Raises:
        AcceleratorMissing: it does.
    """
    asked = session.spec.workers.resources.limits.get(GPU)
    if asked is not None and int(asked) > present:
        raise AcceleratorMissing(
            f"spec.workers.resources.limits[{GPU}]", asked, f"at most {present}, as this worker has"
        )


def require_any_accelerator(session: TrainingSession, driver: str = DRIVER) -> None:
    """Refuse a session that asks for GPUs where CUDA has no driver, before anything is imported.

    Ranks count them with PyTorch, which they have only once they have found each other. Files of
    devices decide nothing: their names are the system's matter.

    Raises:
        AcceleratorMissing: there is none.
    """
    try:
        ctypes.CDLL(driver)
    except OSError:
        require_accelerators(session, 0)
