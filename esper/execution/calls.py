"""How a layer is called: what it reads, and that its calls are seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def host_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a host reads, as its hooks are given it: by position, or by its name in torch."""
    return args[0] if args else kwargs["input"]


@contextmanager
def unfused() -> Iterator[None]:
    """Inside, transformer layers call the layers they hold, on ordinary tensors.

    In evaluation mode torch else computes a whole layer at once, on nested tensors where there is
    a padding mask; layers that are watched there take no nested tensors.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
