"""CompiledKernel objects: one for each kernel that a session has asked for."""

from __future__ import annotations

from esper.contracts.messages import KernelRequested
from esper.contracts.resources import API_VERSION
from esper_operator.children.objects import Json, child, labels_of, owner_of
from esper_operator.views import BlueprintView, SessionView


def manifest(
    session: SessionView, request: KernelRequested, blueprint: BlueprintView | None
) -> Json:
    """The object, owned by its blueprint; by the session where the blueprint is only in the hub.

    It carries the labels of the session that has asked first.
    """
    if blueprint is not None:
        owner = owner_of("Blueprint", blueprint)
    else:
        owner = owner_of("TrainingSession", session)
    spec = {"blueprint": request.blueprint, "target": request.target.to_wire()}
    return child(
        API_VERSION,
        "CompiledKernel",
        session.namespace,
        request.kernel,
        {"spec": spec},
        labels=labels_of(session),
        owners=(owner,),
    )
