"""Kernels that sessions ask for on the bus: a CompiledKernel each, as far as a session may.

What asks is a pod that nobody trusts: a request has to name the kernel of its own blueprint and
target, and a session has a number of them.
"""

from __future__ import annotations

import re

from esper.contracts.blueprints import kernel_id
from esper.contracts.messages import KernelRequested
from esper.contracts.resources.common import LABEL_1035_PATTERN
from esper.errors import BlueprintError
from esper_operator.children import kernel
from esper_operator.conditions import Reason
from esper_operator.decisions.blueprints import document_of
from esper_operator.observed import RequestsObserved
from esper_operator.options import Options
from esper_operator.plans import Manifest, Notice, Plan
from esper_operator.views import BlueprintView

_NAME = re.compile(LABEL_1035_PATTERN)
_MOST_CHARACTERS = 63


def decide(observed: RequestsObserved, options: Options) -> Plan:
    """The CompiledKernels that are to be made."""
    session = observed.session
    there = {view.name for view in observed.kernels}
    own = sum(1 for view in observed.kernels if view.session_uid == session.uid)
    apply: dict[str, Manifest] = {}
    refused = 0
    for request in observed.requests:
        if request.kernel in there or request.kernel in apply or not _is_true(request):
            continue
        if own + len(apply) >= options.kernels_per_session:
            refused += 1
            continue
        owner = _owner(observed, request)
        apply[request.kernel] = kernel.manifest(session, request, owner)
    if session.deleting:
        return Plan()
    notices: tuple[Notice, ...] = ()
    if refused:
        message = f"{refused} kernels more than the {options.kernels_per_session} of a session"
        notices = (Notice("Warning", Reason.TOO_MANY_KERNELS, message),)
    return Plan(apply=tuple(apply.values()), notices=notices)


def _is_true(request: KernelRequested) -> bool:
    """Whether its kernel is that of its blueprint and target, and objects can be named so."""
    if len(request.blueprint) > _MOST_CHARACTERS or not _NAME.match(request.blueprint):
        return False
    return kernel_id(request.blueprint_digest, request.target) == request.kernel


def _owner(observed: RequestsObserved, request: KernelRequested) -> BlueprintView | None:
    """The Blueprint of that name, if it is the one that was asked for."""
    for view in observed.blueprints:
        if view.name == request.blueprint and not view.deleting:
            try:
                same = document_of(view).digest == request.blueprint_digest
            except BlueprintError:
                same = False
            return view if same else None
    return None
