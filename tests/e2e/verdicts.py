"""Whether what `intruder.py` tried was refused: by whoever was asked, and for the right reason.

A server that broke, or that nobody reached, has refused nothing.
"""

import re

REFUSALS = frozenset({400, 401, 403, 404, 405, 409, 412, 422})
"""Statuses of the hub and of the API server by which they let nobody in."""
UNKNOWN = frozenset({401, 403})
"""Those of a kubelet to whom it does not know."""
NOTHING = '{"items":[]}'
"""A list of what is another's: it is as if it was not there."""
PROBE = "esper-probe"
"""Redis' user for probes: it has no password, and no right but to ask whether Redis is there."""
WITHOUT = re.compile(r"unknown command|command not allowed", re.IGNORECASE)
"""What Redis says of a command that it does not have."""


def opened(came):
    """Whether an attempt got what it was after."""
    return "answer" in came or came.get("status", 999) < 400


def refused(name, came):
    """Whether the attempt of that name was refused, by what came of it."""
    if name.startswith("bus "):
        return _by_redis(name, came)
    if name.startswith("node port "):
        # Either nobody listens there for pods, or who does knows nobody.
        return "error" in came or came["status"] in REFUSALS
    if name.startswith("node kubelet "):
        return came.get("status") in UNKNOWN
    return came.get("status") in REFUSALS or came.get("text") == NOTHING


def _by_redis(name, came):
    code = came.get("code")
    if name.startswith(f"bus as {PROBE} "):
        return code == "NOPERM"
    if name.startswith("bus as "):
        return code == "WRONGPASS"
    if name == "bus without a user":
        return code == "NOAUTH"
    # NOAUTH: to a pod that has no user of Redis.
    return code in {"NOPERM", "NOAUTH"} or bool(WITHOUT.search(came.get("text", "")))
