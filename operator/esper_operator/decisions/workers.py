"""Whether the workers are ready, and if not, what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass

from esper.errors import Conflict, one_line
from esper_operator.children import names, secret
from esper_operator.conditions import Kind, Reason, Truth, found
from esper_operator.decisions import attempts, suspension
from esper_operator.decisions.scene import Scene
from esper_operator.pod_view import PodView
from esper_operator.views import JobView, MetaView, Said

IMAGE_REASONS = frozenset(
    {
        *("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"),
        *("ImageInspectError", "RegistryUnavailable", "SignatureValidationFailed"),
    }
)
CONTAINER_REASONS = frozenset(
    {
        *("CreateContainerConfigError", "CreateContainerError", "RunContainerError"),
        *("PreCreateHookError", "PreStartHookError", "PostStartHookError"),
    }
)
_PERMANENT = frozenset({"Invalid", "BadRequest"})
_MESSAGE = 400
"""Characters of a refusal beside which there is more to say."""
NOT_OURS = "AlreadyExists"
"""The reason where a child's name is taken."""
_UNTYPED = "failed to create typed patch object"
"""What the API server says of a field that no pod has."""


@dataclass(frozen=True)
class Readiness:
    """The condition WorkersReady."""

    status: Truth
    reason: Reason
    message: str = ""

    @property
    def ready(self) -> bool:
        """Whether all workers are."""
        return self.status == "True"


def readiness(scene: Scene) -> Readiness:
    """What there is to say of the workers now."""
    job = scene.job
    missing = refusal(scene)
    if missing is not None and job is None:
        return _refused(*missing)
    if job is None:
        return _without_job(scene)
    if suspension.is_queued(scene):
        return Readiness("False", Reason.WAITING_IN_QUEUE, f"Job {job.name} is suspended")
    return _of_pods(scene, job)


def refusal(scene: Scene) -> tuple[str, Said] | None:
    """The child of the workers that the API server has refused, and what it said."""
    wanted = (
        f"Job/{scene.job_name}",
        f"Secret/{names.secret(scene.session.name)}",
        f"Service/{names.service(scene.session.name)}",
        f"NetworkPolicy/{names.network_policy(scene.session.name)}",
    )
    refusals = scene.observed.refusals
    return next(((key, refusals[key]) for key in wanted if key in refusals), None)


def refused(scene: Scene) -> tuple[str, ...]:
    """What the API server has said against Seeds and CompiledKernels: the first of each kind."""
    snapshot = scene.observed.snapshot
    told = () if snapshot is None else snapshot.seeds
    wanted = {f"Seed/{names.seed(scene.session.name, s.layer, s.slot)}" for s in told}
    found: dict[str, str] = {}
    for key, said in sorted(scene.observed.refusals.items()):
        kind = key.partition("/")[0]
        if kind == "CompiledKernel" or key in wanted:
            found.setdefault(kind, one_line(_refused_text(key, said), _MESSAGE))
    return tuple(found.values())


def permanent_refusal(scene: Scene) -> str | None:
    """The message of a refusal that stays one, however often it is tried."""
    missing = refusal(scene)
    if missing is None or scene.job is not None:
        return None
    key, said = missing
    if key.startswith("NetworkPolicy/"):
        return None  # its rules are the installation's, and may be mended there
    if said.reason in _PERMANENT or _UNTYPED in said.message:
        return _refused_text(*missing)
    return None


def has_secret(scene: Scene) -> bool:
    """Whether the session's Secret is there, of this spec, and its credentials last.

    The hub also knows what is to become of what the session keeps.
    """
    return credentials_last(scene) > 0


def credentials_last(scene: Scene) -> float:
    """Seconds until the session's Secret has to be applied anew; 0: now."""
    meta = _secret(scene)
    wanted = secret.digest(scene.session, scene.options)
    if meta is None or meta.digest != wanted or policy_is_news(scene):
        return 0.0
    return max(0.0, meta.renew_after - scene.now)


def policy_is_news(scene: Scene) -> bool:
    """Whether the hub, which knows the session, has to be told of another deletion policy.

    Also of a session that has ended or is suspended: what it keeps there goes by what the hub was
    told last. One whose credentials were revoked can't be told of any more.
    """
    meta = _secret(scene)
    if meta is None:
        return False
    refused = scene.observed.refusals.get(f"Secret/{meta.name}")
    if refused is not None and refused.reason == Conflict.__name__:
        return False
    # Of a Secret that was refused nobody knows whether the hub was told before.
    return refused is not None or meta.deletion_policy != scene.spec.run_policy.deletion_policy


def policy_was_told(scene: Scene) -> bool:
    """Whether the hub knows the policy though the Secret does not: the API server refuses that.

    The hub is asked first, and its own refusals are other ones.
    """
    refused = scene.observed.refusals.get(f"Secret/{names.secret(scene.session.name)}")
    return refused is not None and refused.reason in _PERMANENT | {"Forbidden"}


def _secret(scene: Scene) -> MetaView | None:
    name = names.secret(scene.session.name)
    found = (m for m in scene.observed.metas if m.kind == "Secret" and m.name == name)
    return next((meta for meta in found if not meta.deleting), None)


def is_going(scene: Scene, kind: str, name: str) -> bool:
    """Whether the child of that name is being deleted, which a finalizer may draw out.

    Until it has gone, which is heard, an apply would change nothing.
    """
    return any(m.kind == kind and m.name == name and m.deleting for m in scene.observed.metas)


def num_ready(scene: Scene) -> int:
    """Workers of the attempt that are ready."""
    job = scene.job
    if job is None or job.ended:
        return 0
    return sum(1 for pod in scene.living(job).values() if pod.ready)


def _without_job(scene: Scene) -> Readiness:
    if attempts.due(scene) > scene.now:
        number = scene.record.attempt
        return Readiness("False", Reason.BACKING_OFF, f"attempt {number} begins after a pause")
    for kind, name in (
        ("Service", names.service(scene.session.name)),
        ("NetworkPolicy", names.network_policy(scene.session.name)),
        ("Secret", names.secret(scene.session.name)),
    ):
        if is_going(scene, kind, name):
            return Readiness("False", Reason.STARTING, f"{kind} {name} is being deleted")
    # The same for every step on the way to it: each change would be one more write a session.
    return Readiness("False", Reason.STARTING, f"Job {scene.job_name} is being made")


def _of_pods(scene: Scene, job: JobView) -> Readiness:
    if job.ended:
        return Readiness("False", Reason.FINISHED, f"Job {job.name} has ended")
    living = scene.living(job)
    ready = sum(1 for pod in living.values() if pod.ready)
    count = f"{ready} of {job.completions} workers are ready"
    if ready >= job.completions:
        return Readiness("True", Reason.WORKERS_READY, count)
    kept = _before(scene)
    for pod in living.values():
        trouble = _trouble(pod, kept)
        if trouble is not None:
            return trouble
    pods_refused = scene.observed.refusals.get(f"Pod/{job.name}")
    missing = refusal(scene)
    if missing is not None:
        return _refused(*missing)
    if len(living) < job.completions and pods_refused is not None:
        text = f"Job {job.name}: {pods_refused.message}"
        return Readiness("False", Reason.PODS_REFUSED, text)
    return Readiness("False", Reason.WORKERS_STARTING, count)


def _refused(key: str, said: Said) -> Readiness:
    asked = key.startswith("Secret/") and said.reason != NOT_OURS
    reason = Reason.CREDENTIALS_MISSING if asked else Reason.CHILD_REFUSED
    return Readiness("False", reason, _refused_text(key, said))


def _trouble(pod: PodView, before: Readiness | None) -> Readiness | None:
    if pod.waiting is not None and pod.waiting.reason in IMAGE_REASONS:
        # A pull that is backed off says less than the one that failed before it.
        backed_off = pod.waiting.reason == "ImagePullBackOff"
        if backed_off and before is not None and before.reason == Reason.IMAGE_PULL_FAILED:
            return before
        return Readiness("False", Reason.IMAGE_PULL_FAILED, _waiting_text(pod, pod.waiting))
    if pod.waiting is not None and pod.waiting.reason in CONTAINER_REASONS:
        return Readiness("False", Reason.CONTAINER_REFUSED, _waiting_text(pod, pod.waiting))
    if pod.unanswered:
        text = f"pod {pod.name}: node {pod.node} does not answer"
        return Readiness("False", Reason.NODE_NOT_READY, text)
    if pod.unschedulable and not pod.node:
        return Readiness("False", Reason.UNSCHEDULABLE, f"pod {pod.name}: {pod.unschedulable}")
    return None


def _before(scene: Scene) -> Readiness | None:
    condition = found(scene.record.conditions, Kind.WORKERS_READY)
    if condition is None or condition.reason not in set(Reason):
        return None
    return Readiness(condition.status, Reason(condition.reason), condition.message)


def _waiting_text(pod: PodView, waiting: Said) -> str:
    return f"pod {pod.name}: {waiting.reason}: {waiting.message}"


def _refused_text(key: str, said: Said) -> str:
    return f"{key}: {said.reason}: {said.message}"
