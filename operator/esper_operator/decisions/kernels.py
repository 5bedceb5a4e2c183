"""A CompiledKernel: asked of the hub, compiled by a Job, and what came of it."""

from __future__ import annotations

from pydantic import ValidationError

from esper.contracts.assets import CompiledKernel as StoredKernel
from esper.contracts.blueprints import CATALOGUE, kernel_id
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import artifact_key
from esper.contracts.refusals import first_refusal
from esper.contracts.resources import CompiledKernelSpec, CompiledKernelStatus
from esper.errors import BlueprintError, one_line
from esper_operator.children import compile_job, names, secret
from esper_operator.conditions import Kind, Reason, Truth, condition, found, merged
from esper_operator.decisions.blueprints import document_of
from esper_operator.observed import KernelObserved
from esper_operator.options import Options
from esper_operator.plans import KernelOrder, Plan
from esper_operator.status import to_apply
from esper_operator.views import JobView, KernelView

ASK_SECONDS = 5.0
"""Between two questions whether it is compiled."""
AGAIN_SECONDS = 600.0
"""Until a compilation is tried again that failed without the kernel being at fault."""

_MESSAGE = 1024


def decide(observed: KernelObserved, options: Options) -> Plan:
    """What is to be done about a CompiledKernel now."""
    view = observed.kernel
    if view.deleting or _is_settled(view, options):
        return Plan()
    try:
        spec = view.spec()
    except ValidationError as error:
        refused = first_refusal(error, CompiledKernelSpec)
        message = f"spec.{refused.field}: got {refused.came}; allowed: {refused.allowed}"
        return _said(observed, "False", Reason.KERNEL_MISMATCH, message)
    stored = observed.stored
    if stored is None:
        return _ordered(observed, spec)
    if stored.state is BlueprintState.FAILED:
        return _said(observed, "False", Reason.COMPILATION_FAILED, stored.error or "")
    if stored.state is BlueprintState.CHARACTERIZED:
        return _compiled(observed, stored)
    return _compiling(observed, options)


def digest_of_blueprint(observed: KernelObserved, spec: CompiledKernelSpec) -> str | None:
    """The digest of the blueprint that the spec names: an object's, else the catalogue's."""
    if observed.blueprint is not None:
        try:
            return document_of(observed.blueprint).digest
        except BlueprintError:
            return None
    documents = {entry.name: entry.document for entry in CATALOGUE}
    return documents[spec.blueprint].digest if spec.blueprint in documents else None


def _ordered(observed: KernelObserved, spec: CompiledKernelSpec) -> Plan:
    """The hub is asked for the kernel, which has to be that of its blueprint and target."""
    digest = digest_of_blueprint(observed, spec)
    name = observed.kernel.name
    if digest is None:
        message = f"no Blueprint {spec.blueprint} that could be compiled"
        plan = _said(observed, "False", Reason.BLUEPRINT_MISSING, message)
        return Plan(plan.status, again_in=AGAIN_SECONDS)
    wanted = kernel_id(digest, spec.target)
    if wanted != name:
        message = f"metadata.name: got {name}; allowed: {wanted}, the kernel of this spec"
        return _said(observed, "False", Reason.KERNEL_MISMATCH, message)
    order = KernelOrder(name, digest, spec.target.to_wire())
    if observed.refused is not None:
        said = f"{observed.refused.reason}: {observed.refused.message}"
        plan = _said(observed, "Unknown", Reason.REQUESTED, said)
        return Plan(plan.status, order=order, again_in=ASK_SECONDS)
    plan = _said(observed, "Unknown", Reason.REQUESTED, "the hub has not answered yet")
    return Plan(plan.status, order=order)


def _compiling(observed: KernelObserved, options: Options) -> Plan:
    """A Job compiles it; the hub says what came of it."""
    view, job = observed.kernel, observed.job
    order = _asking_again(observed)
    wanted = (f"Job/{names.compile_job(view.name)}", f"Secret/{names.kernel_secret(view.name)}")
    refused = next((key for key in wanted if key in observed.refusals), None)
    if job is not None and job.failed is not None:
        message = _why(observed) or f"Job {job.name}: {job.failed.reason}: {job.failed.message}"
        return _after_failure(observed, job, message, order, options)
    if job is not None:
        plan = _said(observed, "Unknown", Reason.COMPILING, f"Job {job.name}")
        # Its pod may have yet to read the Secret.
        missing = observed.secret is None
        return Plan(plan.status, order=order, again_in=ASK_SECONDS, credentials=missing)
    if refused is not None:
        said = observed.refusals[refused]
        text = f"{refused}: {said.reason}: {said.message}"
        plan = _said(observed, "False", Reason.CHILD_REFUSED, text)
    else:
        plan = _said(observed, "Unknown", Reason.REQUESTED, "its Job is being made")
    if observed.secret is not None and observed.secret.deleting:
        return Plan(plan.status, again_in=ASK_SECONDS)
    if not secret.compiles(observed.secret, view, options, observed.now):
        # The hub may know the kernel no more, and without it gives no credentials.
        return Plan(plan.status, credentials=True, order=None if refused is None else order)
    return Plan(
        plan.status,
        apply=(compile_job.manifest(view, _before(view).failed_attempts + 1, options),),
        again_in=None if refused is None else AGAIN_SECONDS,
    )


def _after_failure(
    observed: KernelObserved,
    job: JobView,
    message: str,
    order: KernelOrder | None,
    options: Options,
) -> Plan:
    """Another attempt once the Job's TTL has taken it away, or the end after the last.

    The attempt's number is the Job's own, so that it counts once, whoever decides again.
    """
    failed = max(_before(observed.kernel).failed_attempts, job.attempt, 1)
    counted: dict[str, object] = {"failed_attempts": failed}
    if failed >= options.compile_attempts:
        text = (
            f"{message} (attempt {failed}; operator.compile_attempts: {options.compile_attempts})"
        )
        return _said(observed, "False", Reason.BACKOFF_LIMIT_EXCEEDED, text, counted)
    plan = _said(observed, "False", Reason.COMPILATION_FAILED, message, counted)
    return Plan(plan.status, order=order, again_in=AGAIN_SECONDS)


def _asking_again(observed: KernelObserved) -> KernelOrder | None:
    spec = observed.kernel.spec()
    digest = digest_of_blueprint(observed, spec)
    if digest is None:
        stored = observed.stored
        digest = None if stored is None else stored.blueprint_digest
    if digest is None:
        return None
    return KernelOrder(observed.kernel.name, digest, spec.target.to_wire())


def _compiled(observed: KernelObserved, stored: StoredKernel) -> Plan:
    changes: dict[str, object] = {
        "digest": stored.artifact_digest,
        "bytes": stored.artifact_bytes,
    }
    if stored.artifact_digest is not None:
        changes["artifact"] = artifact_key(stored.artifact_digest)
    if observed.figures is not None:
        changes["parameters"] = observed.figures.parameters
        changes["latency_microseconds"] = round(observed.figures.latency_microseconds)
    job = observed.job
    by = "the hub had it" if job is None else f"Job {job.name}"
    return _said(observed, "True", Reason.COMPILED, by, changes)


def _why(observed: KernelObserved) -> str | None:
    """What the Job's last pod has said."""
    ended = [pod for pod in observed.pods if pod.exit_code not in (None, 0)]
    last = max(ended, key=lambda pod: pod.finished or 0.0, default=None)
    if last is None or last.ended is None:
        return None
    text = last.ended.message or last.ended.reason
    return f"pod {last.name}, exit code {last.exit_code}: {text}"


def _said(
    observed: KernelObserved,
    ready: Truth,
    reason: Reason,
    message: str,
    changes: dict[str, object] | None = None,
) -> Plan:
    view, before = observed.kernel, _before(observed.kernel)
    condition_ = condition(
        Kind.READY,
        ready,
        reason,
        one_line(message, _MESSAGE) if message else "",
        now=observed.now,
        generation=view.generation,
    )
    status = before.model_copy(
        update={
            "observed_generation": view.generation,
            "conditions": merged(before.conditions, (condition_,)),
            **(changes or {}),
        }
    )
    return Plan(to_apply(view, status))


def _is_settled(view: KernelView, options: Options) -> bool:
    """Whether nothing more will come of it; a spec never changes."""
    before = _before(view)
    ready = found(before.conditions, Kind.READY)
    if ready is None:
        return False
    given_up = ready.reason == Reason.BACKOFF_LIMIT_EXCEEDED
    return ready.status == "True" or (
        given_up and before.failed_attempts >= options.compile_attempts
    )


def _before(view: KernelView) -> CompiledKernelStatus:
    try:
        return CompiledKernelStatus.model_validate(view.status(), by_alias=True, by_name=False)
    except ValidationError:
        return CompiledKernelStatus()
