"""Checks that need more than one field's own type, usable as functions and inside pydantic."""

from __future__ import annotations

from esper.errors import BadInput


class SeedIdError(BadInput, ValueError):
    """A seed id of the wrong form, or outside the model.

    Also a `ValueError`, so that pydantic turns it into a validation error of the field it guards.
    """


def validate_seed_id(seed_id: object, num_layers: int, num_slots: int) -> tuple[int, int]:
    """The seed id (layer, slot), checked against a model of `num_layers` hosts.

    A layer counts host layers in execution order, a slot the seeds within one; both from 0. The
    first thing found wrong is the one reported.

    Raises:
        SeedIdError: not a pair of integers (a bool is none), or one of them is out of bounds.
    """
    if not isinstance(seed_id, tuple) or len(seed_id) != 2:
        raise SeedIdError("seedId", seed_id, "a pair (layer, slot)")
    layer, slot = seed_id
    return (
        _within("seedId.layer", layer, num_layers),
        _within("seedId.slot", slot, num_slots),
    )


def _within(field: str, value: object, count: int) -> int:
    if count < 1:
        raise SeedIdError(field, value, "nothing, the model has none")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise SeedIdError(field, value, f"an integer from 0 to {count - 1}")
    return value
