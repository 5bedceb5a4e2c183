"""The Job that compiles one kernel: `esper compile`, as a worker of the forge would."""

from __future__ import annotations

from esper_operator.children import names, pods
from esper_operator.children.connections import SETTINGS_FILE
from esper_operator.children.objects import Json, child, labels_of, owner_of
from esper_operator.options import Options
from esper_operator.views import ATTEMPT_LABEL, CONTAINER, KERNEL_LABEL, KernelView

_BAD_INPUT = (2, 78)
_INTERRUPTED = 130
"""Exit codes of `esper compile`: settings that can't be used, or a kernel that can't be compiled;
and a signal. For what else ends it, as a service that is away, a later try may help."""
RETRIES = 3


def manifest(kernel: KernelView, attempt: int, options: Options) -> Json:
    """The Job of an attempt; what was killed, and what a service away has ended, it tries again."""
    numbered = {KERNEL_LABEL: kernel.name, ATTEMPT_LABEL: str(attempt)}
    labels = {**labels_of(role="compile"), **numbered}
    container: Json = {
        "image": options.image,
        "command": ["esper", "compile"],
        "args": [
            *("--kernel", kernel.name),
            *("--config", f"{pods.SETTINGS_FOLDER}/{SETTINGS_FILE}"),
            *("--termination-log", pods.TERMINATION_LOG),
        ],
        "env": pods.environment(),
        "resources": {
            "requests": dict(options.compile_requests),
            "limits": dict(options.compile_limits),
        },
        "volumeMounts": [pods.settings_mount(), *pods.temporary_mounts()],
    }
    volumes = [pods.settings_volume(names.COMPILE), *pods.temporary_volumes()]
    pod = pods.pod_spec(container, volumes, options)
    pod["restartPolicy"] = "Never"
    pod["tolerations"] = pods.not_ready_tolerations()
    spec: Json = {
        "backoffLimit": RETRIES,
        "activeDeadlineSeconds": options.compile_deadline_seconds,
        "ttlSecondsAfterFinished": options.compile_ttl_seconds,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {"action": "Ignore", "onExitCodes": _codes(_INTERRUPTED)},
                {"action": "FailJob", "onExitCodes": _codes(*_BAD_INPUT)},
            ]
        },
        "template": {
            "metadata": {"labels": {**dict(options.pod_labels), **labels}},
            "spec": pod,
        },
    }
    return child(
        "batch/v1",
        "Job",
        kernel.namespace,
        names.compile_job(kernel.name),
        {"spec": spec},
        labels=labels,
        owners=(owner_of("CompiledKernel", kernel),),
    )


def _codes(*values: int) -> Json:
    return {"containerName": CONTAINER, "operator": "In", "values": list(values)}
