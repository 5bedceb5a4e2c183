"""What each child is called: always the same for the same parent.

A session has a name of at most 48 characters, so that the host names of its pods, the longest, stay
DNS labels. Whatever it is called, no child of it has the name of another's, or of one that a
namespace shares.
"""

from __future__ import annotations

import base64
import hashlib

TAMIYO = "esper-tamiyo"
"""The Deployment of a namespace's controller, and the Secret of all its controllers."""
RENDEZVOUS_PORT = 29400


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def service(session: str) -> str:
    """The headless Service through which a session's workers meet."""
    return f"{session}-workers"


def network_policy(session: str) -> str:
    """What a session's workers may reach, and who reaches them."""
    return f"{session}-workers"


def secret(session: str) -> str:
    """The Secret with a session's settings and credentials, and its manifest."""
    return f"{session}-esper"


def job(session: str, uid: str, attempt: int) -> str:
    """The Job of one attempt.

    Four characters tell sessions of one name apart: the Job of one that was deleted may still be
    there when the next one begins.
    """
    tag = base64.b32encode(_hash(uid)).decode().lower()[:4]
    return f"{session}-{tag}-{attempt}"


def tamiyo(session: str) -> str:
    """The controller of a session that has its own; never that of a namespace."""
    return f"{session}-controller"


def seed(session: str, layer: str, slot: int) -> str:
    """The Seed of one slot of a layer; layers have names of any form."""
    return f"{session}-{_hash(layer).hex()[:8]}-{slot}"


def compile_job(kernel: str) -> str:
    """The Job that compiles a kernel."""
    return f"compile-{kernel}"


def kernel_secret(kernel: str) -> str:
    """The Secret with which that Job asks the hub."""
    return f"{kernel}.esper"


def rendezvous(session: str, uid: str, attempt: int) -> str:
    """Where the workers of an attempt meet: its first pod."""
    return f"{job(session, uid, attempt)}-0.{service(session)}:{RENDEZVOUS_PORT}"
