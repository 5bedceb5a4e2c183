"""Whether a worker has the GPUs that its session asks for."""

from __future__ import annotations

from pathlib import Path

from esper.contracts.resources import TrainingSession
from esper.contracts.resources.cluster import GPU
from esper.errors import AcceleratorMissing

_FILES = ("nvidia[0-9]*", "nvidia-caps/*", "dxg", "nvhost*", "nvmap", "nvgpu/*")
"""By which CUDA reaches a GPU: of a driver, a part of one, Windows' and Tegra's."""


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


def require_any_accelerator(session: TrainingSession, devices: Path = Path("/dev")) -> None:
    """Refuse a session that asks for GPUs where the system shows none, before anything is imported.

    Ranks count them with PyTorch, which they have only once they have found each other.

    Raises:
        AcceleratorMissing: there is none.
    """
    if not any(True for pattern in _FILES for _ in devices.glob(pattern)):
        require_accelerators(session, 0)
