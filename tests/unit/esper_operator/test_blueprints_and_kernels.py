"""Blueprints into the hub, kernels out of it, and what sessions may ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from esper.contracts.assets import Blueprint as StoredBlueprint
from esper.contracts.assets import CompiledKernel as StoredKernel
from esper.contracts.blueprints import KernelTarget, builtin, kernel_id
from esper.contracts.kernels import KernelFigures, artifact_key
from esper.contracts.messages import KernelRequested
from esper.contracts.resources import (
    BlueprintStatus,
    CompiledKernel,
    CompiledKernelStatus,
)
from esper_operator.children import compile_job, secret
from esper_operator.decisions import blueprints, kernels, requests
from esper_operator.observed import BlueprintObserved, KernelObserved, RequestsObserved
from esper_operator.options import Options
from esper_operator.plans import Plan
from esper_operator.pod_view import PodView
from esper_operator.views import JobView, KernelView, MetaView, Said
from tests.unit.esper.kernel_targets import linear_place
from tests.unit.esper_operator.objects import (
    KERNEL_ISSUED,
    NAMESPACE,
    NOW,
    OPTIONS,
    UID,
    applied,
    blueprint,
    kernel,
    session,
)

AFFINE = {"builtin": "affine"}


def told(plan: Plan, model: Any) -> tuple[Any, tuple[str, str, str]]:
    """The status that a plan writes, and its condition Ready."""
    assert plan.status is not None
    status = model.model_validate(plan.status, by_alias=True, by_name=False)
    (ready,) = status.conditions
    assert ready.type == "Ready"
    return status, (ready.status, ready.reason, ready.message)


# -- blueprints -------------------------------------------------------------------------------


def stored(state: str, **fields: Any) -> StoredBlueprint:
    document = builtin("affine", {}).model_copy(update={"name": "mine"})
    return StoredBlueprint.proposed(document).changed(state=state, **fields)


def test_a_blueprint_is_submitted_under_its_name() -> None:
    plan = blueprints.decide(BlueprintObserved(blueprint(AFFINE), NOW), OPTIONS)
    assert plan.submit is not None
    assert plan.submit.document["name"] == "mine"
    status, ready = told(plan, BlueprintStatus)
    assert ready[:2] == ("Unknown", "Submitting")
    assert (status.state, status.observed_generation) == ("proposed", 1)


@pytest.mark.parametrize(
    ("state", "error", "ready", "again"),
    [
        ("proposed", None, ("Unknown", "Validating"), True),
        ("validating", None, ("Unknown", "Validating"), True),
        ("characterized", None, ("True", "Accepted"), False),
        ("deployed", None, ("True", "Accepted"), False),
        ("failed", "it does not compile", ("False", "Refused"), False),
        ("archived", None, ("False", "Refused"), False),
    ],
)
def test_a_blueprints_state_is_the_hubs(
    state: str, error: str | None, ready: tuple[str, str], again: bool
) -> None:
    observed = BlueprintObserved(blueprint(AFFINE), NOW, stored=stored(state, error=error))
    plan = blueprints.decide(observed, OPTIONS)
    status, found = told(plan, BlueprintStatus)
    assert status.state == state
    assert found[:2] == ready
    assert (plan.submit is not None) is again
    assert (plan.again_in is not None) is again
    if error is not None:
        assert found[2] == error


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"builtin": "no-such"}, "no-such"),
        ({"builtin": "affine", "arguments": {"width": 3}}, "width"),
        ({"hosts": ["Linear"], "graph": {"nodes": [], "output": "x"}}, "nodes"),
    ],
)
def test_a_blueprint_that_cannot_be_is_refused_with_its_field(
    content: dict[str, Any], field: str
) -> None:
    plan = blueprints.decide(BlueprintObserved(blueprint(content), NOW), OPTIONS)
    status, ready = told(plan, BlueprintStatus)
    assert (status.state, *ready[:2]) == ("failed", "False", "Refused")
    assert field in ready[2]
    assert plan.submit is None
    assert plan.again_in is None


def test_what_the_hub_refuses_shows_and_is_tried_again_later() -> None:
    said = Said("Unauthorized", "the token has ended")
    plan = blueprints.decide(BlueprintObserved(blueprint(AFFINE), NOW, refused=said), OPTIONS)
    assert told(plan, BlueprintStatus)[1] == (
        "False",
        "Refused",
        "Unauthorized: the token has ended",
    )
    assert plan.submit is not None
    assert plan.again_in == 60


def test_what_the_hub_said_stands_after_a_restart_of_the_operator() -> None:
    first = blueprints.decide(
        BlueprintObserved(blueprint(AFFINE), NOW, stored=stored("characterized")), OPTIONS
    )
    view = blueprint(AFFINE, status=first.status)
    assert blueprints.decide(BlueprintObserved(view, NOW + 1), OPTIONS) == Plan()


@pytest.mark.parametrize(("same", "pause"), [(1, 5.0), (2, 10.0), (5, 80.0), (8, 600.0), (99, 600)])
def test_a_blueprint_that_nobody_uses_is_asked_for_ever_more_rarely(
    same: int, pause: float
) -> None:
    known = {"stored": stored("proposed"), "same_answers": same, "asked_at": NOW - 2}
    view = blueprint(AFFINE)
    assert blueprints.decide(BlueprintObserved(view, NOW, **known), OPTIONS).again_in == pause - 2
    assert blueprints.decide(BlueprintObserved(view, NOW, **known), OPTIONS).submit is None
    plan = blueprints.decide(BlueprintObserved(view, NOW - 2 + pause, **known), OPTIONS)
    assert (plan.submit is not None, plan.again_in) == (True, pause)
    made = kernel("1" * 40, {"blueprint": "mine"})
    plan = blueprints.decide(BlueprintObserved(view, NOW, kernels=(made,), **known), OPTIONS)
    assert (plan.submit, plan.again_in) == (None, 3.0)


def test_a_blueprint_counts_its_kernels_and_its_smallest_size() -> None:
    compiled = [
        kernel(f"{n}" * 40, {"blueprint": "mine"}, status={"digest": "a" * 64, "parameters": size})
        for n, size in ((1, 300), (2, 200))
    ]
    waiting = kernel("3" * 40, {"blueprint": "mine"})
    observed = BlueprintObserved(
        blueprint(AFFINE), NOW, kernels=(*compiled, waiting), stored=stored("characterized")
    )
    status, _ = told(blueprints.decide(observed, OPTIONS), BlueprintStatus)
    assert (status.kernels, status.parameters) == (2, 200)


def test_a_blueprint_with_a_kernel_is_accepted_though_no_worker_has_tried_it() -> None:
    made = kernel("1" * 40, {"blueprint": "mine"}, status={"digest": "a" * 64, "parameters": 30})
    observed = BlueprintObserved(blueprint(AFFINE), NOW, kernels=(made,), stored=stored("proposed"))
    plan = blueprints.decide(observed, OPTIONS)
    status, ready = told(plan, BlueprintStatus)
    assert (status.state, status.kernels, ready[:2]) == ("characterized", 1, ("True", "Accepted"))
    assert (plan.submit, plan.again_in) == (None, None)
    refused = stored("failed", error="it does not compile")
    plan = blueprints.decide(
        BlueprintObserved(blueprint(AFFINE), NOW, kernels=(made,), stored=refused), OPTIONS
    )
    assert told(plan, BlueprintStatus)[0].state == "failed"


def test_a_blueprint_that_is_being_deleted_gets_nothing() -> None:
    view = blueprint(AFFINE, deleting=True)
    assert blueprints.decide(BlueprintObserved(view, NOW), OPTIONS) == Plan()


# -- kernels ----------------------------------------------------------------------------------

TARGET: KernelTarget = linear_place(6, 5).target
DIGEST = builtin("affine", {}).digest
NAME = kernel_id(DIGEST, TARGET)
SPEC = {"blueprint": "affine", "target": TARGET.to_wire()}
THERE = MetaView.of(
    {
        **(made := secret.compile_manifest(kernel(NAME, SPEC), KERNEL_ISSUED, OPTIONS, NOW)),
        "metadata": {**made["metadata"], "uid": "secret-1"},
    }
)


def asset(state: str, **fields: Any) -> StoredKernel:
    return StoredKernel(
        kernel=NAME,
        blueprint_digest=DIGEST,
        blueprint="affine",
        target=TARGET,
        state=state,
        **fields,
    )


def compile_job_view(view: KernelView, attempt: int = 1, **conditions: str) -> JobView:
    manifest = compile_job.manifest(view, attempt, OPTIONS)
    status = {
        "conditions": [
            {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": None}
            for kind, reason in conditions.items()
        ]
    }
    metadata = {**manifest["metadata"], "uid": "job-1", "creationTimestamp": None}
    return JobView.of({**manifest, "metadata": metadata, "status": status})


def decided(view: KernelView | None = None, **fields: Any) -> Plan:
    given: dict[str, Any] = {"secret": THERE, **fields}
    observed = KernelObserved(view or kernel(NAME, SPEC), NOW, **given)
    return kernels.decide(observed, OPTIONS)


def test_a_kernel_is_ordered_from_the_hub_first() -> None:
    plan = decided()
    assert plan.order is not None
    assert (plan.order.kernel, plan.order.blueprint_digest) == (NAME, DIGEST)
    assert KernelTarget.model_validate(plan.order.target) == TARGET
    assert told(plan, CompiledKernelStatus)[1][:2] == ("Unknown", "Requested")
    assert plan.apply == ()


def test_a_blueprint_object_comes_before_the_catalogues() -> None:
    other = blueprint({"builtin": "low-rank"}, name="affine")
    plan = decided(blueprint=other)
    assert plan.order is None
    assert told(plan, CompiledKernelStatus)[1][1] == "KernelMismatch"


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("f" * 40, SPEC, "KernelMismatch"),
        (NAME, {**SPEC, "blueprint": "unknown"}, "BlueprintMissing"),
        (NAME, {"blueprint": "affine", "target": {"layer": {}}}, "KernelMismatch"),
    ],
)
def test_a_kernel_that_cannot_be_says_why(name: str, spec: Any, reason: str) -> None:
    plan = decided(kernel(name, spec))
    assert told(plan, CompiledKernelStatus)[1][:2] == ("False", reason)
    assert plan.order is None
    assert plan.apply == ()


@pytest.mark.parametrize("state", ["proposed", "compiling"])
def test_its_job_is_made_once_the_hub_has_it(state: str) -> None:
    view = kernel(NAME, SPEC)
    without = decided(view, stored=asset(state), secret=None)
    assert without.credentials
    assert without.apply == ()
    plan = decided(view, stored=asset(state))
    assert applied(plan) == [f"Job/compile-{NAME}"]
    working = decided(view, stored=asset(state), job=compile_job_view(view))
    assert working.apply == ()
    assert working.again_in == 5
    assert working.order is not None  # which asks the hub again
    assert told(working, CompiledKernelStatus)[1][:2] == ("Unknown", "Compiling")


def test_a_secret_of_yesterday_is_made_anew() -> None:
    observed = KernelObserved(
        kernel(NAME, SPEC), NOW + 86_400, secret=THERE, stored=asset("proposed")
    )
    assert kernels.decide(observed, OPTIONS).credentials


def test_a_compiled_kernel_shows_what_the_hub_knows_and_is_left_alone_from_then_on() -> None:
    figures = KernelFigures(
        parameters=11,
        flops=1,
        parameter_bytes=44,
        latency_microseconds=12.6,
        latency_batch=1,
        device="cpu",
        threads=1,
    )
    done = asset("characterized", artifact_digest="a" * 64, artifact_bytes=99)
    plan = decided(stored=done, figures=figures)
    status, ready = told(plan, CompiledKernelStatus)
    assert ready == ("True", "Compiled", "the hub had it")
    assert (status.digest, status.bytes, status.parameters) == ("a" * 64, 99, 11)
    assert status.artifact == artifact_key("a" * 64)
    assert status.latency_microseconds == 13
    later = decided(kernel(NAME, SPEC, status=plan.status), stored=None)
    assert later == Plan()


def test_a_kernel_says_which_job_has_compiled_it() -> None:
    done = asset("characterized", artifact_digest="a" * 64, artifact_bytes=99)
    view = kernel(NAME, SPEC)
    _, ready = told(decided(view, stored=done, job=compile_job_view(view)), CompiledKernelStatus)
    assert ready == ("True", "Compiled", f"Job compile-{NAME}")


def test_a_kernel_that_the_hub_has_failed_stays_failed() -> None:
    plan = decided(stored=asset("failed", error="a node has no gradient"))
    assert told(plan, CompiledKernelStatus)[1] == (
        "False",
        "CompilationFailed",
        "a node has no gradient",
    )
    assert plan.apply == ()
    assert plan.again_in is None


def test_a_job_that_failed_says_what_its_pod_said() -> None:
    view = kernel(NAME, SPEC)
    ended = Said("Error", '{"reason": "HubUnavailable", "message": "urza"}')
    gone = PodView(NAMESPACE, "p", "u", 0.0, exit_code=1, ended=ended, finished=NOW)
    failed = compile_job_view(view, Failed="BackoffLimitExceeded")
    plan = decided(view, stored=asset("proposed"), job=failed, pods=(gone,))
    ready = told(plan, CompiledKernelStatus)[1]
    assert ready[:2] == ("False", "CompilationFailed")
    assert "urza" in ready[2]
    assert plan.apply == ()
    assert plan.again_in == 600
    # Once its TTL has taken it away, another one is made.
    assert applied(decided(view, stored=asset("proposed"))) == [f"Job/compile-{NAME}"]


def test_failures_of_jobs_count_once_each_and_end_with_the_last() -> None:
    status: Any = None
    for number in range(1, OPTIONS.compile_attempts + 1):
        (made,) = decided(kernel(NAME, SPEC, status=status), stored=asset("proposed")).apply
        assert made["metadata"]["labels"]["esper.dev/attempt"] == str(number)
        job = compile_job_view(kernel(NAME, SPEC), number, Failed="DeadlineExceeded")
        for _ in range(3):  # as often as it is looked at, also by another process
            plan = decided(kernel(NAME, SPEC, status=status), stored=asset("proposed"), job=job)
            status = plan.status or status
            assert status["failedAttempts"] == number
        last = number == OPTIONS.compile_attempts
        assert plan.again_in == (None if last else 600)
    (ready,) = status["conditions"]
    assert (ready["status"], ready["reason"]) == ("False", "BackoffLimitExceeded")
    assert "DeadlineExceeded" in ready["message"]
    assert "operator.compile_attempts: 5" in ready["message"]


def test_a_kernel_that_was_given_up_is_left_alone_until_it_may_be_tried_more_often() -> None:
    job = compile_job_view(kernel(NAME, SPEC), OPTIONS.compile_attempts, Failed="DeadlineExceeded")
    status = decided(stored=asset("proposed"), job=job).status
    view = kernel(NAME, SPEC, status=status)
    # The Job's TTL has passed; another operator has not asked the hub yet.
    assert decided(view, stored=asset("proposed")) == Plan()
    assert decided(view, stored=None) == Plan()
    more = replace(OPTIONS, compile_attempts=OPTIONS.compile_attempts + 1)
    observed = KernelObserved(view, NOW, secret=THERE, stored=asset("proposed"))
    (again,) = kernels.decide(observed, more).apply
    assert again["metadata"]["labels"]["esper.dev/attempt"] == str(more.compile_attempts)


def test_a_job_that_was_deleted_is_made_again_and_counts_as_no_failure() -> None:
    working = compile_job_view(kernel(NAME, SPEC))
    status = decided(stored=asset("proposed"), job=working).status
    assert status is not None
    assert "failedAttempts" not in status or status["failedAttempts"] == 0
    (made,) = decided(kernel(NAME, SPEC, status=status), stored=asset("proposed")).apply
    assert made["metadata"]["labels"]["esper.dev/attempt"] == "1"


def test_a_job_that_is_refused_shows() -> None:
    said = {f"Job/compile-{NAME}": Said("Forbidden", "exceeded quota")}
    plan = decided(stored=asset("proposed"), refusals=said)
    assert told(plan, CompiledKernelStatus)[1][:2] == ("False", "ChildRefused")


def test_what_the_hub_says_against_an_order_shows() -> None:
    plan = decided(refused=Said("BlueprintNotFound", "no blueprint of that digest"))
    assert "no blueprint" in told(plan, CompiledKernelStatus)[1][2]
    assert plan.order is not None
    assert plan.again_in is not None


def test_a_kernel_that_is_being_deleted_gets_nothing() -> None:
    assert decided(kernel(NAME, SPEC, deleting=True)) == Plan()


# -- requests ---------------------------------------------------------------------------------


def request(size: int = 5, **fields: Any) -> KernelRequested:
    target = linear_place(6, size).target
    given = {
        "session": "digits",
        "kernel": kernel_id(DIGEST, target),
        "blueprint": "affine",
        "blueprint_digest": DIGEST,
        "target": target,
    }
    return KernelRequested(**given | fields)


def ordered(*asked: KernelRequested, options: Options = OPTIONS, **fields: Any) -> Plan:
    return requests.decide(RequestsObserved(session(), asked, **fields), options)


def test_a_request_becomes_an_object_that_its_blueprint_owns() -> None:
    own = blueprint(AFFINE, name="affine")
    plan = ordered(request(), request(), blueprints=(own,))
    (manifest,) = plan.apply
    made = CompiledKernel.model_validate(manifest, by_alias=True, by_name=False)
    assert made.metadata.name == request().kernel
    assert made.spec.blueprint == "affine"
    assert made.spec.target == request().target
    (owner,) = made.metadata.owner_references
    assert (owner.kind, owner.uid) == ("Blueprint", own.uid)
    assert made.metadata.labels["esper.dev/session-uid"] == UID


@pytest.mark.parametrize("there", [(), (blueprint({"builtin": "low-rank"}, name="affine"),)])
def test_without_that_blueprint_the_session_owns_it(there: Any) -> None:
    (manifest,) = ordered(request(), blueprints=there).apply
    (owner,) = manifest["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("TrainingSession", UID)


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "f" * 40},
        {"blueprint_digest": "0" * 64},
        {"blueprint": "Not A Name"},
        {"blueprint": "x" * 64},
    ],
)
def test_what_is_not_true_is_not_made(change: dict[str, Any]) -> None:
    assert ordered(request(**change)) == Plan()


def test_what_is_there_already_is_not_made_again() -> None:
    view = kernel(request().kernel, SPEC)
    assert ordered(request(), kernels=(view,)) == Plan()


@pytest.mark.parametrize(("owned", "made"), [(0, 3), (1, 2), (3, 0), (9, 0)])
def test_a_session_may_ask_for_so_many(owned: int, made: int) -> None:
    options = Options(image="i", hub_url="h", redis_url="r", kernels_per_session=3)
    own = tuple(kernel(f"{n}" * 40, SPEC) for n in range(owned))
    others = tuple(kernel(f"a{n}" * 20, SPEC, session_uid="other") for n in range(9))
    asked = tuple(request(size) for size in (3, 4, 5, 6))
    plan = ordered(*asked, options=options, kernels=(*own, *others))
    assert len(plan.apply) == made
    assert [notice.reason for notice in plan.notices] == ["TooManyKernels"]


def test_a_session_that_is_being_deleted_may_ask_for_nothing() -> None:
    observed = RequestsObserved(session(deleting=True), (request(),))
    assert requests.decide(observed, OPTIONS) == Plan()
