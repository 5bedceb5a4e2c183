"""The controller: a Tamiyo of the session's own, its namespace's, or none."""

from __future__ import annotations

from esper.contracts.resources import TrainingSessionSpec
from esper_operator.children import names, tamiyo
from esper_operator.children.objects import Json, digest_in
from esper_operator.conditions import Reason, Truth
from esper_operator.observed import Refusals
from esper_operator.options import Options
from esper_operator.plans import Deletion, Manifest
from esper_operator.views import DeploymentView, SessionView


def is_dedicated(spec: TrainingSessionSpec) -> bool:
    """Whether the session has a controller of its own.

    Every session has one that decides, with the policy `none` too: its worker asks at each interval
    like any other, and is told to wait.
    """
    return spec.growth.controller.dedicated


def standing(
    spec: TrainingSessionSpec, name: str, view: DeploymentView | None, refusals: Refusals
) -> tuple[Truth, Reason, str]:
    """The condition ControllerReady of a session whose controller is called `name`."""
    refused = refusals.get(f"Deployment/{name}")
    if refused is not None:
        return "False", Reason.CONTROLLER_FAILED, f"Deployment {name}: {refused.message}"
    there = view is not None and not view.deleting and view.name == name
    if view is not None and there and view.available:
        return "True", Reason.CONTROLLER_AVAILABLE, f"Deployment {name}"
    without = refusals.get(f"Secret/{names.TAMIYO}")
    if without is not None:
        text = f"Secret {names.TAMIYO}: {without.reason}: {without.message}"
        return "False", Reason.CONTROLLER_FAILED, text
    if view is None or not there:
        return "False", Reason.CONTROLLER_STARTING, f"Deployment {name} is being made"
    if view.failure is not None:
        text = f"Deployment {name}: {view.failure.reason}: {view.failure.message}"
        return "False", Reason.CONTROLLER_FAILED, text
    return "False", Reason.CONTROLLER_STARTING, f"Deployment {name} has no pod that is ready"


def dedicated(
    session: SessionView, view: DeploymentView | None, options: Options
) -> tuple[Manifest, ...]:
    """The session's own controller, where it is missing or of another form."""
    return if_changed(tamiyo.dedicated(session, options), view)


def removed(view: DeploymentView | None) -> tuple[Deletion, ...]:
    """The deletion of a controller that nobody needs."""
    if view is None or view.deleting:
        return ()
    return (Deletion("apps/v1", "Deployment", view.namespace, view.name, view.uid),)


def if_changed(manifest: Json, view: DeploymentView | None) -> tuple[Manifest, ...]:
    """The manifest, unless what is there was rendered from the same, or has yet to go."""
    there = view is not None and view.name == manifest["metadata"]["name"]
    if view is not None and there and (view.deleting or view.digest == digest_in(manifest)):
        return ()
    return (manifest,)
