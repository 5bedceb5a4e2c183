"""What Urza does: keep blueprints, hand out work to compile, keep kernels and sessions.

All of it is idempotent: blueprints and kernels are addressed by content, a claim has one winner,
and a kernel that is compiled, or has failed, stays so.
"""

from __future__ import annotations

from esper.contracts.kernels import artifact_key
from esper.services.urza.store_blueprint_leases import HubBlueprintLeases
from esper.services.urza.store_blueprints import HubBlueprints
from esper.services.urza.store_kernel_leases import HubKernelLeases
from esper.services.urza.store_kernels import HubKernels
from esper.services.urza.store_rows import MAX_ERROR_CHARACTERS
from esper.services.urza.store_sessions import HubSessions

__all__ = ["MAX_ERROR_CHARACTERS", "UrzaHub", "artifact_key"]


class UrzaHub(HubBlueprints, HubKernels, HubKernelLeases, HubBlueprintLeases, HubSessions):
    """The hub over a database and an object store.

    Every method raises HubUnavailable, StoreUnavailable or StorageFull when what lies beneath
    doesn't answer or has no room, and BadInput for a value that the database has no room for.
    """
