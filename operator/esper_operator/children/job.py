"""The Job of one attempt: an Indexed Job whose pods run `esper worker`."""

from __future__ import annotations

from esper.contracts.resources import StorageSpec, TrainingSessionSpec
from esper_operator.children import names, pods, references
from esper_operator.children.connections import MANIFEST_FILE, SETTINGS_FILE
from esper_operator.children.objects import Json, child, labels_of, owner_of
from esper_operator.options import Options
from esper_operator.views import CONTAINER, SessionView

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
QUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
RUN_FOLDER = "/var/lib/esper"
"""Where the run's directory lies, with its pod; what outlives a pod lies elsewhere."""
CLAIM_FOLDER = "/var/lib/esper-claim"

INTERRUPTED = 75
BAD_INPUT = (2, 78)
"""Exit codes of `esper worker`: a command line or settings, or a session, that can't be used."""

_STORAGE_KEYS = {
    "ESPER_STORAGE__ACCESS_KEY_ID": "accessKeyId",
    "ESPER_STORAGE__SECRET_ACCESS_KEY": "secretAccessKey",
    "ESPER_STORAGE__ENDPOINT_URL": "endpointUrl",
    "ESPER_STORAGE__REGION": "region",
}
"""Settings that the Secret of `storage.secretName` gives, with its keys."""


def manifest(session: SessionView, attempt: int, replicas: int, options: Options) -> Json:
    """The Job; in a queue it is made suspended, and from then on the queue alone starts it.

    Raises:
        pydantic.ValidationError: the session's spec is none.
    """
    spec = session.spec()
    policy = spec.run_policy
    labels = labels_of(session, role="worker", attempt=attempt)
    template_labels = {**dict(options.pod_labels), **labels}
    job: Json = {
        "completionMode": "Indexed",
        "completions": replicas,
        "parallelism": replicas,
        # An attempt fails as a whole, and the operator counts attempts.
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules()},
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
        "template": {
            "metadata": {"labels": template_labels},
            "spec": _pod(session, spec, attempt, replicas, options),
        },
    }
    job_labels = dict(labels)
    if policy.queue_name is not None:
        job["suspend"] = True
        job_labels[QUEUE_LABEL] = policy.queue_name
        if policy.queue_priority_class is not None:
            job_labels[QUEUE_PRIORITY_LABEL] = policy.queue_priority_class
    return child(
        "batch/v1",
        "Job",
        session.namespace,
        names.job(session.name, session.uid, attempt),
        {"spec": job},
        labels=job_labels,
        owners=(owner_of("TrainingSession", session),),
    )


def refused(spec: TrainingSessionSpec, namespace: str, options: Options) -> str | None:
    """What the spec takes that is the operator's or the installation's; None if nothing."""
    template = spec.workers.pod_template
    given = {item["name"] for item in _storage_environment(spec.storage)}
    for index, item in enumerate(template.env):
        if item.name in given:
            place = f"spec.workers.podTemplate.env[{index}].name"
            return f"{place}: got {item.name}; allowed: others, spec.storage.secretName gives it"
    return pods.refused_extra(template) or references.refused(spec, namespace, options)


def _failure_rules() -> list[Json]:
    """A disruption is no failure, nor is an interruption; bad input stays bad.

    The first rule that fits counts, so that a pod that was evicted is never taken for a failed one.
    """
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": _codes(INTERRUPTED)},
        {"action": "FailJob", "onExitCodes": _codes(*BAD_INPUT)},
    ]


def _codes(*values: int) -> Json:
    return {"containerName": CONTAINER, "operator": "In", "values": list(values)}


def _pod(
    session: SessionView, spec: TrainingSessionSpec, attempt: int, replicas: int, options: Options
) -> Json:
    workers, template = spec.workers, spec.workers.pod_template
    shared_memory = template.shared_memory or options.shared_memory
    container: Json = {
        "image": workers.image or options.image,
        "imagePullPolicy": workers.image_pull_policy,
        "command": ["esper", "worker", f"{pods.SETTINGS_FOLDER}/{MANIFEST_FILE}"],
        "args": _arguments(session, attempt, replicas, workers.processes_per_worker),
        "env": [
            *pods.environment(),
            {"name": "ESPER_TOLARIA__ATTEMPT", "value": str(attempt)},
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            *_storage_environment(spec.storage),
        ],
        "volumeMounts": [
            pods.settings_mount(),
            *pods.temporary_mounts(shared_memory=True),
            {"name": "esper-run", "mountPath": RUN_FOLDER},
            *_claim_mount(spec.storage),
        ],
    }
    resources = workers.resources.to_wire()
    if any(resources.values()):
        container["resources"] = {name: value for name, value in resources.items() if value}
    volumes = [
        pods.settings_volume(names.secret(session.name)),
        *pods.temporary_volumes(shared_memory),
        {"name": "esper-run", "emptyDir": {}},
        *_claim_volume(spec.storage),
    ]
    pod = pods.pod_spec(container, volumes, options)
    pod["restartPolicy"] = "Never"
    # With it the pods of an Indexed Job have names within the Service.
    pod["subdomain"] = names.service(session.name)
    pod["terminationGracePeriodSeconds"] = options.grace_seconds
    return pods.with_template(pod, template)


def _arguments(session: SessionView, attempt: int, replicas: int, processes: int) -> list[str]:
    options = {
        "--config": f"{pods.SETTINGS_FOLDER}/{SETTINGS_FILE}",
        "--output-dir": f"{RUN_FOLDER}/{session.name}",
        "--nodes": str(replicas),
        "--processes": str(processes),
        "--rendezvous": names.rendezvous(session.name, session.uid, attempt),
        "--rendezvous-id": f"{session.uid}-{attempt}",
        # Known at once, whereas a name may take the cluster's DNS half a minute.
        "--local-address": "$(POD_IP)",
        "--termination-log": pods.TERMINATION_LOG,
    }
    return [word for option in options.items() for word in option]


def _claim_volume(storage: StorageSpec) -> list[Json]:
    """The session's claim, which others may share: below it each session has a place of its own."""
    if storage.claim_name is None:
        return []
    return [{"name": "esper-claim", "persistentVolumeClaim": {"claimName": storage.claim_name}}]


def _claim_mount(storage: StorageSpec) -> list[Json]:
    mount = {"name": "esper-claim", "mountPath": CLAIM_FOLDER}
    return [] if storage.claim_name is None else [mount]


def _storage_environment(storage: StorageSpec) -> list[Json]:
    """Where checkpoints and results go, and the keys of a bucket.

    No settings file can take those from a Secret of the user's.
    """
    if storage.uri is None:
        place = "hub" if storage.claim_name is None else f"file://{CLAIM_FOLDER}"
        return [{"name": "ESPER_TOLARIA__STORAGE", "value": place}]
    if storage.secret_name is None:
        return []
    return [
        {
            "name": variable,
            "valueFrom": {
                "secretKeyRef": {"name": storage.secret_name, "key": key, "optional": True}
            },
        }
        for variable, key in _STORAGE_KEYS.items()
    ]
