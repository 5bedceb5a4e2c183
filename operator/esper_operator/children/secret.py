"""Secrets: the settings with which pods reach hub and bus, and the manifest of their session."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache

from esper.contracts.blueprints import CATALOGUE
from esper.contracts.manifests import NAME_LABEL, document_data
from esper.contracts.resources import (
    Blueprint,
    PodTemplate,
    RunPolicySpec,
    TrainingSession,
)
from esper.contracts.resources.common import LabelledMeta, SessionMeta
from esper.services.contracts import IssuedCredentials, KernelCredentials
from esper_operator.children import names
from esper_operator.children.connections import (
    MANIFEST_FILE,
    connection_of,
    settings_files,
)
from esper_operator.children.objects import Json, child, labels_of, owner_of
from esper_operator.digests import digest_of_object
from esper_operator.options import Options
from esper_operator.times import text_of
from esper_operator.views import (
    KERNEL_LABEL,
    POLICY_ANNOTATION,
    RENEW_ANNOTATION,
    BlueprintView,
    KernelView,
    MetaView,
    SessionView,
)

RENEWED_SECONDS = 30 * 86_400.0
"""How long the token of a Secret that outlives sessions is used."""
USED_SHARE = 2 / 3
"""Of the time that a session's credentials have left, after which they are renewed."""
LEAST_SECONDS = 3600.0
"""Between two renewals, however soon what the hub gives ends."""

_CATALOGUE = frozenset(entry.name for entry in CATALOGUE)


def digest(session: SessionView, options: Options) -> str:
    """The mark of the Secret that a session is to have; credentials do not enter it.

    Raises:
        pydantic.ValidationError: the session's spec is none.
    """
    return _digest(session.namespace, session.name, session.uid, session.spec_text, options)


@lru_cache(maxsize=2048)
def _digest(namespace: str, name: str, uid: str, spec_text: bytes, options: Options) -> str:
    # Without the status, of which there are many in a session's life.
    bare = SessionView(namespace, name, uid, 0, deleting=False, spec_text=spec_text)
    return digest_of_object(_known_by(bare, options))


def manifest(
    session: SessionView,
    issued: IssuedCredentials,
    options: Options,
    now: float,
    blueprints: Iterable[BlueprintView] = (),
) -> Json:
    """The Secret of a session, with the blueprints of its namespace that it may grow.

    It says when its credentials are to be renewed: the hub gives the same user of the bus again,
    and a token that lasts longer; and which deletion policy the hub was told of with them.

    Raises:
        pydantic.ValidationError: the session's spec is none.
    """
    resources = (_resource(session), *offered(session, blueprints, options))
    return child(
        "v1",
        "Secret",
        session.namespace,
        names.secret(session.name),
        _opaque(
            {
                **settings_files(
                    options,
                    namespace=session.namespace,
                    token=issued.hub_token,
                    username=issued.redis_username,
                    password=issued.redis_password,
                ),
                # JSON is YAML, and written twenty times as fast.
                MANIFEST_FILE: "\n---\n".join(json.dumps(document_data(r)) for r in resources),
            }
        ),
        labels=labels_of(session),
        owners=(owner_of("TrainingSession", session),),
        known_by=_known_by(session, options),
        annotations={
            RENEW_ANNOTATION: _renewed(issued.expires_at.timestamp(), now),
            POLICY_ANNOTATION: session.spec().run_policy.deletion_policy,
        },
    )


def controller_manifest(
    namespace: str, issued: IssuedCredentials, options: Options, now: float
) -> Json:
    """The Secret of a namespace's controllers."""
    files = settings_files(
        options,
        namespace=namespace,
        token=issued.hub_token,
        username=issued.redis_username,
        password=issued.redis_password,
    )
    return _settings_secret(namespace, names.TAMIYO, files, options, now)


def compile_manifest(
    kernel: KernelView, issued: KernelCredentials, options: Options, now: float
) -> Json:
    """The Secret with which a kernel's compile Job asks the hub; the bus is not its.

    It opens the work on that kernel, and goes with the kernel's object.
    """
    files = settings_files(options, namespace=kernel.namespace, token=issued.hub_token, bus=False)
    return child(
        "v1",
        "Secret",
        kernel.namespace,
        names.kernel_secret(kernel.name),
        _opaque(files),
        labels={**labels_of(role="compile"), KERNEL_LABEL: kernel.name},
        owners=(owner_of("CompiledKernel", kernel),),
        known_by=_compiles_by(kernel, options),
        annotations={RENEW_ANNOTATION: _renewed(issued.expires_at.timestamp(), now)},
    )


def compiles(found: MetaView | None, kernel: KernelView, options: Options, now: float) -> bool:
    """Whether a kernel's Secret is there, of these settings, and its token lasts."""
    if found is None or found.deleting or found.renew_after <= now:
        return False
    return found.digest == digest_of_object(_compiles_by(kernel, options))


def settings_digest(name: str, options: Options, now: float) -> str:
    """The mark of a Secret that holds settings only; another one every month.

    Its token ends some time, and another one is given each day.
    """
    return digest_of_object(_settings_known_by(name, options, now))


def offered(
    session: SessionView, blueprints: Iterable[BlueprintView], options: Options
) -> list[Blueprint]:
    """The Blueprints that the worker has to be told of, by name.

    It knows the catalogue; one of the catalogue's names takes its place there, selected or not.
    What the hub has refused is left out, for it would end the session.
    """
    selector = session.spec().growth.blueprints
    found = []
    for view in sorted(blueprints, key=lambda view: view.name):
        labels = dict(view.labels)
        selected = selector.matches({NAME_LABEL: view.name, **labels})
        if view.deleting or not (selected or view.name in _CATALOGUE):
            continue
        if view.status().get("state") == "failed":
            continue
        found.append(
            Blueprint(
                api_version="esper.dev/v1alpha1",
                kind="Blueprint",
                metadata=LabelledMeta(name=view.name, labels=labels),
                spec=view.spec(),
            )
        )
    return found[: options.blueprints_per_session]


def _resource(session: SessionView) -> TrainingSession:
    """The manifest that the worker trains from: as it was applied, with what the cluster added.

    Without what concerns the pods alone, which may be large and hold secrets, and without the run
    policy, so that suspending a session changes nothing in it.
    """
    spec = session.spec()
    workers = spec.workers.model_copy(update={"pod_template": PodTemplate()})
    return TrainingSession(
        api_version="esper.dev/v1alpha1",
        kind="TrainingSession",
        metadata=SessionMeta(name=session.name, namespace=session.namespace, uid=session.uid),
        spec=spec.model_copy(update={"workers": workers, "run_policy": RunPolicySpec()}),
    )


def _known_by(session: SessionView, options: Options) -> Json:
    return {"manifest": _resource(session).to_wire(), **connection_of(options)}


def _compiles_by(kernel: KernelView, options: Options) -> Json:
    return {"kernel": kernel.uid, **connection_of(options)}


def _renewed(expires: float, now: float) -> str:
    return text_of(now + max(USED_SHARE * (expires - now), LEAST_SECONDS))


def _settings_secret(
    namespace: str, name: str, files: Mapping[str, str], options: Options, now: float
) -> Json:
    return child(
        "v1",
        "Secret",
        namespace,
        name,
        _opaque(files),
        labels=labels_of(),
        known_by=_settings_known_by(name, options, now),
    )


def _settings_known_by(name: str, options: Options, now: float) -> Json:
    return {"name": name, "month": int(now // RENEWED_SECONDS), **connection_of(options)}


def _opaque(files: Mapping[str, str]) -> Json:
    data = {name: base64.b64encode(text.encode()).decode() for name, text in files.items()}
    return {"type": "Opaque", "data": data}
