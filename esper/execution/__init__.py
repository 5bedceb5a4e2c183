"""What runs inside the model: layers, seeds' state, kernels. Names load when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.execution.kernel_cache import KernelCache
    from esper.execution.state_layout import KasminaStateLayout, SeedLifecycleState

__all__ = ["KasminaLayer", "KasminaStateLayout", "KernelCache", "SeedLifecycleState"]

_HOMES = {
    "KasminaLayer": "kasmina_layer",
    "KasminaStateLayout": "state_layout",
    "KernelCache": "kernel_cache",
    "SeedLifecycleState": "state_layout",
}


def __getattr__(name: str) -> object:
    """The exported `name`, from its module.

    Raises:
        AttributeError: nothing is exported under that name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
