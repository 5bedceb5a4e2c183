"""The controller: a Tamiyo of the session's own, its namespace's, or none."""

from __future__ import annotations

from esper.contracts.enums import ControllerPolicy
from esper.contracts.resources import TrainingSessionSpec
from esper_operator.children import names, secret, tamiyo
from esper_operator.children.objects import Json, digest_in
from esper_operator.conditions import Reason, Truth
from esper_operator.observed import NamespaceObserved, Refusals
from esper_operator.options import Options
from esper_operator.plans import Deletion, Manifest, Plan
from esper_operator.status import is_finished, is_ours, record_of
from esper_operator.views import DeploymentView, SessionView

IDLE_SECONDS = 300.0
"""How long a namespace's controller stays after its last session has ended."""


def is_needed(spec: TrainingSessionSpec) -> bool:
    """Whether anybody decides for the session."""
    return spec.growth.controller.policy is not ControllerPolicy.NONE


def is_dedicated(spec: TrainingSessionSpec) -> bool:
    """Whether the session has a controller of its own."""
    return is_needed(spec) and spec.growth.controller.dedicated


def standing(
    spec: TrainingSessionSpec, name: str, view: DeploymentView | None, refusals: Refusals
) -> tuple[Truth, Reason, str]:
    """The condition ControllerReady of a session whose controller is called `name`."""
    if not is_needed(spec):
        return "True", Reason.NOT_NEEDED, "growth.controller.policy is none"
    refused = refusals.get(f"Deployment/{name}")
    if refused is not None:
        return "False", Reason.CONTROLLER_FAILED, f"Deployment {name}: {refused.message}"
    if view is None or view.deleting:
        return "False", Reason.CONTROLLER_STARTING, f"Deployment {name} is being made"
    if view.available:
        return "True", Reason.CONTROLLER_AVAILABLE, f"Deployment {name}"
    if view.failure is not None:
        text = f"Deployment {name}: {view.failure.reason}: {view.failure.message}"
        return "False", Reason.CONTROLLER_FAILED, text
    return "False", Reason.CONTROLLER_STARTING, f"Deployment {name} has no pod that is ready"


def dedicated(
    session: SessionView, view: DeploymentView | None, options: Options
) -> tuple[Manifest, ...]:
    """The session's own controller, where it is missing or of another form."""
    return _if_changed(tamiyo.dedicated(session, options), view)


def removed(view: DeploymentView | None) -> tuple[Deletion, ...]:
    """The deletion of a controller that nobody needs."""
    if view is None or view.deleting:
        return ()
    return (Deletion("apps/v1", "Deployment", view.namespace, view.name, view.uid),)


def of_namespace(observed: NamespaceObserved, options: Options) -> Plan:
    """What is to be done about the controller that the sessions of a namespace share.

    Its Secret is that of controllers of their own too.
    """
    running = [view for view in observed.sessions if _runs(view)]
    specs = [view.spec() for view in running]
    needing = [spec for spec in specs if is_needed(spec)]
    if not needing:
        waiting = _idle_for(observed)
        if waiting > 0 and observed.tamiyo is not None:
            return Plan(again_in=waiting)
        return Plan(delete=removed(observed.tamiyo))
    wanted = secret.settings_digest(names.TAMIYO, options, observed.now)
    if observed.secret is None or observed.secret.deleting or observed.secret.digest != wanted:
        return Plan(credentials=True)
    if all(spec.growth.controller.dedicated for spec in needing):
        return Plan(delete=removed(observed.tamiyo))
    manifest = tamiyo.shared(observed.namespace, options)
    return Plan(apply=_if_changed(manifest, observed.tamiyo))


def _runs(view: SessionView) -> bool:
    """Whether the session may come to ask a controller; one that can't be read does not."""
    if view.deleting or is_finished(record_of(view)):
        return False
    try:
        spec = view.spec()
    except ValueError:
        return False
    return is_ours(spec) and not spec.run_policy.suspend


def _idle_for(observed: NamespaceObserved) -> float:
    """Seconds until the namespace has been idle for long enough."""
    ends = [record_of(view).completion_time for view in observed.sessions]
    latest = max((end.timestamp() for end in ends if end is not None), default=0.0)
    return latest + IDLE_SECONDS - observed.now


def _if_changed(manifest: Json, view: DeploymentView | None) -> tuple[Manifest, ...]:
    if view is not None and view.digest == digest_in(manifest):
        return ()
    return (manifest,)
