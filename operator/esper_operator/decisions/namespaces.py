"""What the sessions of a namespace share: its controller, and the Secret of all its controllers."""

from __future__ import annotations

from esper_operator.children import names, secret, tamiyo
from esper_operator.decisions.controller import if_changed, is_dedicated, removed
from esper_operator.observed import NamespaceObserved
from esper_operator.options import Options
from esper_operator.plans import Deletion, Plan
from esper_operator.status import is_finished, is_ours, record_of
from esper_operator.views import SessionView

IDLE_SECONDS = 300.0
"""How long a namespace's controller, and its Secret, stay after its last session has ended."""


def decide(observed: NamespaceObserved, options: Options) -> Plan:
    """What is to be done about the controller that the sessions of a namespace share.

    Its Secret is that of controllers of their own too.
    """
    running = [view for view in observed.sessions if _runs(view)]
    if not running:
        return _idle(observed)
    wanted = secret.settings_digest(names.TAMIYO, options, observed.now)
    if observed.secret is not None and observed.secret.deleting:
        return Plan()  # until it has gone, which is heard
    if observed.secret is None or observed.secret.digest != wanted:
        return Plan(credentials=True)
    if all(is_dedicated(view.spec()) for view in running):
        return Plan(delete=removed(observed.tamiyo))
    manifest = tamiyo.shared(observed.namespace, options)
    return Plan(apply=if_changed(manifest, observed.tamiyo))


def _idle(observed: NamespaceObserved) -> Plan:
    """The plan while no session runs: what opens hub and bus goes with who needed it."""
    waiting, view = _idle_for(observed), observed.secret
    if waiting > 0 and (observed.tamiyo or view):
        return Plan(again_in=waiting)
    gone = removed(observed.tamiyo)
    if view is not None and not view.deleting:
        gone = (*gone, Deletion("v1", "Secret", view.namespace, view.name, view.uid))
    return Plan(delete=gone)


def _runs(view: SessionView) -> bool:
    """Whether the session may come to ask a controller; one that can't be read does not."""
    if view.deleting or is_finished(record_of(view)):
        return False
    try:
        spec = view.spec()
    except ValueError:
        return False
    return is_ours(view) and not spec.run_policy.suspend


def _idle_for(observed: NamespaceObserved) -> float:
    """Seconds until the namespace has been idle for long enough."""
    ends = [record_of(view).completion_time for view in observed.sessions]
    latest = max((end.timestamp() for end in ends if end is not None), default=0.0)
    return latest + IDLE_SECONDS - observed.now
