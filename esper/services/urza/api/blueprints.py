"""`/api/v1/blueprints/`: what can grow."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request, Response

from esper.contracts.assets import Blueprint, SessionUid
from esper.contracts.blueprints import BlueprintDocument
from esper.contracts.kernels import Digest
from esper.errors import BlueprintNotFound
from esper.services.contracts import BlueprintFilter, Page, SimpleBlueprintContract, Stored
from esper.services.urza.api.conditions import IfMatch, match_of, tagged, unless_known
from esper.services.urza.api.lists import BlueprintQuery, filter_of, page
from esper.services.urza.api.reach import reached_uses
from esper.services.urza.api.routes import (
    JSON,
    allowed,
    answer,
    caller_of,
    documented,
    router,
    urza_of,
)
from esper.services.urza.auth import Permission
from esper.services.urza.wire import BlueprintChange

ROOT = "/api/v1/blueprints"
blueprints = router(ROOT, "blueprints")

BlueprintDigest = Annotated[Digest, Path(description="The blueprint's digest.")]
UsedBy = Annotated[
    SessionUid | None,
    Query(description="The uid of a live session that uses it: it can't be deleted meanwhile."),
]


@blueprints.get(
    "/",
    **allowed(Permission.LIST, documented({200: Page[SimpleBlueprintContract] | Page[Blueprint]})),
)
async def list_blueprints(request: Request, query: Annotated[BlueprintQuery, Query()]) -> Response:
    """Blueprints that pass the filter, the oldest first; archived ones only where asked for.

    A session's token lists what it uses, a token of a namespace what sessions in it use.
    """
    where = await reached_uses(request, filter_of(query, BlueprintFilter))
    if where is None:
        return answer(Page[SimpleBlueprintContract](items=()))
    found = await urza_of(request).hub.list_blueprints(
        where, limit=query.limit, cursor=query.cursor, namespace=caller_of(request).own_namespace
    )
    if query.view == "full":
        return page(found, Page[Blueprint], lambda item: item)
    return page(found, Page[SimpleBlueprintContract], SimpleBlueprintContract.of)


@blueprints.post(
    "/",
    **allowed(
        Permission.PROPOSE,
        documented({200: Blueprint, 201: Blueprint}, 404, etag=True),
        takes=JSON,
    ),
)
async def create_blueprint(
    request: Request, document: BlueprintDocument, session: UsedBy = None
) -> Response:
    """Put a blueprint: 201 where it is new, 200 where one of that content is there.

    The first name that a content came with stays.
    """
    if session is not None:
        caller_of(request).require_session(session)
    stored, made = await urza_of(request).hub.add_blueprint(document, session=session)
    return tagged(
        stored,
        status=201 if made else 200,
        location=f"{ROOT}/{stored.item.digest}",
    )


@blueprints.get(
    "/{digest}",
    **allowed(Permission.READ, documented({200: Blueprint, 304: None}, 404, etag=True)),
)
async def read_blueprint(request: Request, digest: BlueprintDigest) -> Response:
    """One blueprint with its graph."""
    return unless_known(request, await urza_of(request).hub.read_blueprint(digest))


@blueprints.patch(
    "/{digest}",
    **allowed(Permission.ADMINISTER, documented({200: Blueprint}, 404, 412, etag=True), takes=JSON),
)
async def update_blueprint(
    request: Request, digest: BlueprintDigest, change: BlueprintChange, if_match: IfMatch = None
) -> Response:
    """Give a blueprint another name or description."""
    stored = await urza_of(request).hub.update_blueprint(
        digest,
        name=change.name,
        description=change.description,
        match=match_of(if_match),
    )
    return tagged(stored)


@blueprints.post(
    "/{digest}/archive",
    **allowed(Permission.ADMINISTER, documented({200: Blueprint}, 404, 412, etag=True)),
)
async def archive_blueprint(
    request: Request, digest: BlueprintDigest, if_match: IfMatch = None
) -> Response:
    """Take a blueprint out of lists and of work; whoever puts it again brings it back."""
    hub = urza_of(request).hub
    stored: Stored[Blueprint] = await hub.archive_blueprint(digest, match=match_of(if_match))
    return tagged(stored)


@blueprints.delete(
    "/{digest}",
    status_code=204,
    **allowed(Permission.ADMINISTER, documented({204: None}, 404, 409, 412)),
)
async def delete_blueprint(
    request: Request, digest: BlueprintDigest, if_match: IfMatch = None
) -> Response:
    """Delete a blueprint, its kernels and their artifacts; not while a live session uses them."""
    if not await urza_of(request).hub.delete_blueprint(digest, match=match_of(if_match)):
        raise BlueprintNotFound("blueprint digest", digest, "a blueprint that the hub has")
    return Response(status_code=204)
