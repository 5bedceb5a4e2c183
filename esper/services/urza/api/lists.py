"""Lists in pages: what can be asked of one, and how one is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from fastapi import Response
from pydantic import Field

from esper.contracts.assets import Asset
from esper.contracts.base import Contract
from esper.services.contracts import (
    DEFAULT_PAGE_ITEMS,
    MAX_PAGE_ITEMS,
    BlueprintFilter,
    KernelFilter,
    Page,
    SessionFilter,
    Stored,
)
from esper.services.urza.api.routes import answer

MAX_PAGE_SESSIONS = 100
"""Some 10 MB with as many seeds as may be."""

View = Literal["outline", "full"]


class Paged(Contract):
    """Which part of a list to show."""

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE_ITEMS, description="Items of one page.")] = (
        DEFAULT_PAGE_ITEMS
    )
    cursor: Annotated[
        str | None, Field(max_length=256, description="The nextCursor of the page before.")
    ] = None


class BlueprintQuery(Paged, BlueprintFilter):
    """Which blueprints to list."""

    view: View = "outline"


class KernelQuery(Paged, KernelFilter):
    """Which kernels to list."""

    view: View = "outline"


class SessionQuery(Paged, SessionFilter):
    """Which sessions to list; each may have many seeds, so a page has fewer of them."""

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE_SESSIONS, description="Items of one page.")] = (
        DEFAULT_PAGE_ITEMS
    )


Filter = TypeVar("Filter", bound=Contract)
Item = TypeVar("Item", bound=Asset)
Shown = TypeVar("Shown", bound=Contract)


def filter_of(query: Contract, kind: type[Filter]) -> Filter:
    """The filter that a query is, without what is about pages."""
    return kind.model_validate({name: getattr(query, name) for name in kind.model_fields})


def page(
    found: Page[Stored[Item]], kind: type[Page[Shown]], show: Callable[[Item], Shown]
) -> Response:
    """A page of the hub's list, each item as `show` shows it."""
    items = tuple(show(stored.item) for stored in found.items)
    return answer(kind.model_construct(items=items, next_cursor=found.next_cursor))
