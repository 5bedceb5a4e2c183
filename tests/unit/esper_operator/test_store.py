"""The store: newest versions only, and who has to be looked at when something changes."""

from __future__ import annotations

from typing import Any

import pytest

from esper_operator.kinds import (
    BLUEPRINT,
    DEPLOYMENT,
    JOB,
    KERNEL,
    POD,
    SECRET,
    SEED,
    SERVICE,
    SESSION,
    Kind,
)
from esper_operator.pod_view import PodView
from esper_operator.store import NAMESPACE, Store
from esper_operator.views import DeploymentView, JobView, MetaView, Said
from esper_operator.work import Key

OWNER = Key("TrainingSession", "team", "first")
SHARED = Key(NAMESPACE, "team", "")


def an_object(
    kind: Kind, name: str, version: int = 1, *, uid: str | None = None, **more: Any
) -> dict[str, Any]:
    meta = {
        "namespace": "team",
        "name": name,
        "uid": uid or f"{kind.name}-{name}",
        "resourceVersion": str(version),
        "creationTimestamp": "2026-01-01T00:00:00Z",
        **more.pop("metadata", {}),
    }
    return {"metadata": meta, "spec": {}, **more}


def of_session(kind: Kind, name: str, version: int = 1, **labels: str) -> dict[str, Any]:
    marks = {"esper.dev/session": "first", "esper.dev/session-uid": "u1", **labels}
    return an_object(kind, name, version, metadata={"labels": marks})


def test_a_session_concerns_itself_and_what_its_namespace_shares() -> None:
    store = Store()
    assert store.put(SESSION, an_object(SESSION, "first")) == (OWNER, SHARED)
    view = store.session("team", "first")
    assert view is not None
    assert view.uid == "TrainingSession-first"
    assert set(store.everything()) == {OWNER, SHARED}


def test_children_concern_their_session_and_are_found_by_its_uid() -> None:
    store = Store()
    for kind in (JOB, POD, SERVICE, SECRET, SEED, DEPLOYMENT):
        assert store.put(kind, of_session(kind, kind.plural)) == (OWNER,)
    for view, names in (
        (JobView, ["jobs"]),
        (PodView, ["pods"]),
        (DeploymentView, ["deployments"]),
        (MetaView, ["services", "secrets", "seeds"]),
    ):
        assert [child.name for child in store.children("u1", view)] == names
    assert store.children("u2", JobView) == ()


def test_an_older_or_equal_version_is_old_news() -> None:
    store = Store()
    store.put(JOB, of_session(JOB, "job", 5))
    assert store.put(JOB, of_session(JOB, "job", 5)) == ()
    assert store.put(JOB, of_session(JOB, "job", 4, **{"esper.dev/attempt": "9"})) == ()
    assert store.put(JOB, of_session(JOB, "job", 6, **{"esper.dev/attempt": "1"})) == (OWNER,)
    job = store.job("team", "job")
    assert job is not None
    assert job.attempt == 1
    assert [view.attempt for view in store.children("u1", JobView)] == [1]


def test_what_was_deleted_does_not_come_back_by_a_late_answer() -> None:
    store = Store()
    store.put(JOB, of_session(JOB, "job", 5))
    assert store.drop(JOB, of_session(JOB, "job", 6)) == (OWNER,)
    assert store.put(JOB, of_session(JOB, "job", 7)) == ()
    assert store.job("team", "job") is None
    assert store.children("u1", JobView) == ()


def test_the_end_of_an_object_is_not_that_of_the_one_made_in_its_place() -> None:
    store = Store()
    store.put(SESSION, an_object(SESSION, "first", 5, uid="old"))
    store.put(SESSION, an_object(SESSION, "first", 7, uid="new"))
    assert store.drop(SESSION, an_object(SESSION, "first", 6, uid="old")) == ()
    view = store.session("team", "first")
    assert view is not None
    assert view.uid == "new"


def test_an_object_made_anew_replaces_the_old_one_whatever_its_version() -> None:
    store = Store()
    store.put(JOB, of_session(JOB, "job", 50))
    again = of_session(JOB, "job", 7)
    again["metadata"]["uid"] = "another"
    assert store.put(JOB, again) == (OWNER,)


def test_a_child_that_changes_its_session_concerns_both() -> None:
    store = Store()
    store.put(JOB, of_session(JOB, "job", 1))
    moved = of_session(JOB, "job", 2)
    moved["metadata"]["labels"] |= {"esper.dev/session": "second", "esper.dev/session-uid": "u2"}
    other = Key("TrainingSession", "team", "second")
    assert store.put(JOB, moved) == (other, OWNER)
    assert store.children("u1", JobView) == ()
    assert len(store.children("u2", JobView)) == 1


def test_kernels_concern_themselves_and_their_blueprint() -> None:
    store = Store()
    kernel = an_object(KERNEL, "k1")
    kernel["spec"] = {"blueprint": "mlp", "target": {}}
    assert store.put(KERNEL, kernel) == (
        Key("CompiledKernel", "team", "k1"),
        Key("Blueprint", "team", "mlp"),
    )
    assert [view.name for view in store.kernels("team")] == ["k1"]
    assert store.put(BLUEPRINT, an_object(BLUEPRINT, "mlp")) == (Key("Blueprint", "team", "mlp"),)
    assert [view.name for view in store.blueprints("team")] == ["mlp"]
    assert list(store.blueprints("other")) == []


def test_a_compilation_and_its_pods_concern_the_kernel() -> None:
    store, key = Store(), Key("CompiledKernel", "team", "k1")
    marks = {"esper.dev/role": "compile", "esper.dev/kernel": "k1"}
    job = an_object(JOB, "compile-k1", metadata={"labels": marks})
    assert store.put(JOB, job) == (key,)
    owner = {"uid": "Job-compile-k1", "controller": True, "name": "compile-k1"}
    meta = {"labels": {"esper.dev/role": "compile"}, "ownerReferences": [owner]}
    pod = an_object(POD, "compile-k1-abc", metadata=meta)
    assert store.put(POD, pod) == (key,)
    assert [view.name for view in store.pods_of("Job-compile-k1")] == ["compile-k1-abc"]
    assert store.drop(JOB, job) == (key,)
    assert store.drop(POD, pod) == ()


def test_what_no_session_owns_concerns_the_namespace() -> None:
    store = Store()
    assert store.put(DEPLOYMENT, an_object(DEPLOYMENT, "esper-tamiyo")) == (SHARED,)
    assert store.put(SECRET, an_object(SECRET, "esper-tamiyo")) == (SHARED,)


def test_why_a_job_has_no_pods_is_known_until_it_is_gone() -> None:
    store, said = Store(), Said("FailedCreate", "exceeded quota")
    assert store.refuse_pods("team", "job", said) == ()
    store.put(JOB, of_session(JOB, "job"))
    job = store.job("team", "job")
    assert job is not None
    assert store.refuse_pods("team", "job", said) == (OWNER,)
    assert store.refuse_pods("team", "job", said) == ()
    assert store.pod_refusal(job) == said
    store.drop(JOB, of_session(JOB, "job", 2))
    assert store.pod_refusal(job) is None


def test_versions_are_compared_as_numbers() -> None:
    store = Store()
    store.put(JOB, of_session(JOB, "job", 9))
    assert store.put(JOB, of_session(JOB, "job", 10)) == (OWNER,)
    assert store.held(JOB, None) == {("team", "job"): ("Job-job", 10)}
    assert store.held(JOB, "other") == {}


def test_metadata_alone_is_known_by_the_kind_that_it_was_asked_for() -> None:
    store = Store()
    partial = of_session(SEED, "first-abc-0") | {"kind": "PartialObjectMetadata"}
    store.put(SEED, partial)
    assert [view.kind for view in store.children("u1", MetaView)] == ["Seed"]


def managed(version: int, *others: dict[str, Any], own: str = "f:data") -> dict[str, Any]:
    """A Secret as the operator has applied it, with what others have of it."""
    first = {"manager": "esper-operator", "operation": "Apply", "fieldsV1": {own: {"f:a": {}}}}
    secret = of_session(SECRET, "first-esper", version)
    secret["metadata"] |= {
        "annotations": {"esper.dev/digest": "d1"},
        "managedFields": [first, *others],
    }
    return secret


def edited(fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"manager": "kubectl", "operation": "Update", "fieldsV1": fields, **more}


def digest_of_secret(store: Store) -> str:
    view = store.meta(SECRET, "team", "first-esper")
    assert view is not None
    return view.digest


def test_a_child_that_somebody_has_changed_has_no_digest_until_it_is_applied_again() -> None:
    store = Store()
    store.put(SECRET, managed(1), applied=True)
    assert digest_of_secret(store) == "d1"
    store.put(SECRET, managed(2, edited({"f:metadata": {"f:labels": {}}})))
    assert digest_of_secret(store) == "d1"
    overwritten = edited({"f:data": {"f:a": {}}})
    assert store.put(SECRET, managed(3, overwritten, own="f:type")) == (OWNER,)
    assert digest_of_secret(store) == ""
    store.put(SECRET, managed(4, edited({"f:data": {"f:b": {}}})), applied=True)
    assert digest_of_secret(store) == "d1"
    store.put(SECRET, managed(5, edited({"f:data": {"f:b": {}}}), own="f:type"))
    assert digest_of_secret(store) == ""  # a field was taken away, and nobody has it


def test_the_answer_to_an_apply_counts_though_its_event_has_come_first() -> None:
    store = Store()
    store.put(SECRET, managed(1), applied=True)
    again = managed(2, own="f:stringData")
    store.put(SECRET, again)
    assert digest_of_secret(store) == ""
    store.put(SECRET, again, applied=True)
    assert digest_of_secret(store) == "d1"


@pytest.mark.parametrize(("owned", "digest"), [({"f:replicas": {}}, "d1"), ({}, "")])
def test_a_deployment_from_before_that_was_scaled_to_zero_is_changed(
    owned: dict[str, Any], digest: str
) -> None:
    # The API server notes nobody as the owner of a zero that was said through a Scale.
    fields = {"f:spec": {"f:template": {}, **owned}}
    first = {"manager": "esper-operator", "operation": "Apply", "fieldsV1": fields}
    found = of_session(DEPLOYMENT, "first-controller")
    found["metadata"] |= {"annotations": {"esper.dev/digest": "d1"}, "managedFields": [first]}
    store = Store()
    store.put(DEPLOYMENT, found)
    view = store.deployment("team", "first-controller")
    assert view is not None
    assert view.digest == digest


def test_of_children_from_before_only_what_others_have_of_their_content_counts() -> None:
    for others, digest in (
        ((), "d1"),
        ((edited({"f:status": {}}, subresource="status"),), "d1"),
        ((edited({"f:spec": {"f:replicas": {}}}, subresource="scale"),), ""),
        ((edited({"f:data": {"f:a": {}}}),), ""),
    ):
        store = Store()
        store.put(SECRET, managed(1, *others))
        assert digest_of_secret(store) == digest
