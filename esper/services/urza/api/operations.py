"""Whether the hub lives, is ready, and what it counts; open to everyone, and free of secrets."""

from __future__ import annotations

from typing import Literal

from fastapi import Request, Response

from esper.contracts.base import Contract
from esper.errors import HubUnavailable
from esper.services.urza.api.routes import answer, documented, public, router, urza_of
from esper.services.urza.metrics import CONTENT_TYPE

operations = router("", "operations")


class Health(Contract):
    """The process answers."""

    status: Literal["ok"] = "ok"


@operations.get("/healthz", **public(documented({200: Health})))
async def healthz() -> Response:
    """Whether the process lives; nothing else is asked."""
    return answer(Health())


@operations.get("/readyz", **public(documented({200: Health}, 503)))
async def readyz(request: Request) -> Response:
    """Whether database, object store and Redis answer; one that doesn't is named by its setting."""
    problems = await urza_of(request).problems()
    if problems:
        said = (t if t.startswith(name) else f"{name}: {t}" for name, t in problems.items())
        raise HubUnavailable("; ".join(said))
    return answer(Health())


@operations.get(
    "/metrics",
    **public({200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}),
)
async def metrics(request: Request) -> Response:
    """Counts since the process began, in Prometheus' text form."""
    return Response(urza_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})
