"""What sessions keep in the hub's object store, and how it goes."""

from __future__ import annotations

import asyncio

from esper.utils.object_store import ObjectStore

FOLDER = "sessions"
MAX_OBJECTS = 10_000
"""Of one session."""
_AT_ONCE = 16


def object_key(uid: str, name: str) -> str:
    """Where an object of that session lies; the store refuses a name that leads elsewhere."""
    return f"{FOLDER}/{uid}/{name}"


async def objects_of(store: ObjectStore, uid: str) -> dict[str, int]:
    """The names of a session's objects with their sizes in bytes, in the order of the names."""
    place = f"{FOLDER}/{uid}"
    found = await store.listed(place)
    return {key.removeprefix(f"{place}/"): size for key, size in found.items()}


async def remove_objects(store: ObjectStore, uid: str) -> int:
    """Remove all objects of a session; returns how many there were."""
    keys = list(await store.listed(f"{FOLDER}/{uid}"))
    for start in range(0, len(keys), _AT_ONCE):
        await asyncio.gather(*[store.delete(key) for key in keys[start : start + _AT_ONCE]])
    return len(keys)
