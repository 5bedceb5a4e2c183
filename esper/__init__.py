"""Esper trains PyTorch models that grow while they train.

The public names load when first asked for, so that importing a part that needs no torch, such as
`esper.contracts`, imports none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.configs import EsperConfig
    from esper.core.model_wrapper import MorphableModel, unwrap, wrap
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.execution.state_layout import SeedLifecycleState

__version__ = "0.3.0"

__all__ = [
    "EsperConfig",
    "KasminaLayer",
    "MorphableModel",
    "SeedLifecycleState",
    "__version__",
    "unwrap",
    "wrap",
]

_HOMES = {
    "EsperConfig": "esper.configs",
    "KasminaLayer": "esper.execution.kasmina_layer",
    "MorphableModel": "esper.core.model_wrapper",
    "SeedLifecycleState": "esper.execution.state_layout",
    "unwrap": "esper.core.model_wrapper",
    "wrap": "esper.core.model_wrapper",
}


def __getattr__(name: str) -> object:
    """The public `name`, from its module.

    Raises:
        AttributeError: Esper has no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
