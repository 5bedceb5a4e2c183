"""What a kubelet would write, from what the containers do."""

import pytest

from tools.cluster.node import statuses
from tools.cluster.node.statuses import ContainerView

RUNNING = statuses.running("2026-01-01T00:00:00Z")
WAITING = statuses.waiting("ContainerCreating")


def ended(code):
    return statuses.terminated(code, since="2026-01-01T00:00:00Z")


def view(state, *, ready=False, last=None, name="main"):
    return ContainerView(name, "esper:1", state, last or {}, ready=ready, identity="process://1")


@pytest.mark.parametrize(
    ("states", "over", "phase"),
    [
        ([WAITING], False, "Pending"),
        ([RUNNING], False, "Running"),
        ([RUNNING, WAITING], False, "Pending"),
        ([RUNNING, ended(0)], False, "Running"),
        ([ended(1)], False, "Running"),
        ([ended(0), ended(0)], True, "Succeeded"),
        ([ended(0), ended(75)], True, "Failed"),
        ([WAITING], True, "Failed"),
    ],
)
def test_phases(states, over, phase):
    assert statuses.phase_of([], [view(state) for state in states], "Never", over=over) == phase


def test_a_crash_loop_is_running():
    views = [view(statuses.waiting("CrashLoopBackOff"), last=ended(1))]
    assert statuses.phase_of([], views, "Always", over=False) == "Running"


def test_a_failed_init_container_fails_the_pod():
    inits, mains = [view(ended(3), name="init")], [view(WAITING)]
    assert statuses.phase_of(inits, mains, "Never", over=True) == "Failed"


def verdicts(phase, inits, mains):
    found = statuses.conditions_of(phase, inits, mains, 2)
    assert all(condition["observedGeneration"] == 2 for condition in found)
    return {c["type"]: (c["status"], c["reason"], c["message"]) for c in found}


def test_conditions_of_a_pod_that_waits_for_its_init_container():
    found = verdicts("Pending", [view(RUNNING, name="init")], [view(WAITING)])
    assert found["Initialized"] == (
        "False",
        "ContainersNotInitialized",
        "containers with incomplete status: [init]",
    )
    unready = ("False", "ContainersNotReady", "containers with unready status: [main]")
    assert found["Ready"] == found["ContainersReady"] == unready


def test_conditions_of_a_pod_at_work():
    assert verdicts("Running", [], [view(RUNNING, ready=True)]) == dict.fromkeys(
        ["PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready"],
        ("True", None, None),
    )


def test_conditions_of_pods_that_have_ended():
    done = verdicts("Succeeded", [], [view(ended(0))])
    assert done["Initialized"] == ("True", "PodCompleted", None)
    assert done["Ready"] == done["ContainersReady"] == ("False", "PodCompleted", None)
    failed = verdicts("Failed", [], [view(ended(1))])
    assert failed["Ready"] == ("False", "PodFailed", None)
    assert failed["Initialized"] == ("True", None, None)


def test_a_condition_keeps_its_time_until_its_status_changes():
    old = [{"type": "Ready", "status": "False", "lastTransitionTime": "2020-01-01T00:00:00Z"}]
    (same,) = statuses.dated([{"type": "Ready", "status": "False"}], old)
    assert same["lastTransitionTime"] == "2020-01-01T00:00:00Z"
    (other,) = statuses.dated([{"type": "Ready", "status": "True"}], old)
    assert other["lastTransitionTime"] > "2026"


@pytest.mark.parametrize(("returned", "code"), [(0, 0), (75, 75), (-9, 137), (-15, 143)])
def test_a_signal_is_an_exit_code(returned, code):
    assert statuses.exit_code(returned) == code


def test_reasons_of_ends():
    assert ended(0)["terminated"]["reason"] == "Completed"
    assert ended(1)["terminated"]["reason"] == "Error"
    lost = statuses.terminated(137, since="x", reason="OOMKilled", message="m", identity="i")
    assert (
        lost["terminated"].items()
        >= {
            "exitCode": 137,
            "reason": "OOMKilled",
            "message": "m",
            "containerID": "i",
        }.items()
    )


@pytest.mark.parametrize(
    ("written", "policy", "code", "message"),
    [
        (b"said", "File", 1, "said"),
        (b"", "File", 1, ""),
        (b"", "FallbackToLogsOnError", 0, ""),
        (b"said", "FallbackToLogsOnError", 1, "said"),
        (b"", "FallbackToLogsOnError", 1, "log\nend"),
        (b"x" * 5000, "File", 1, "x" * 4096),
        (b"\xff", "File", 1, "�"),
    ],
)
def test_last_words(written, policy, code, message):
    found = statuses.termination_message(written, b"log\nend", policy=policy, code=code)
    assert found == message


def test_of_a_log_the_end_counts():
    log = b"".join(b"%d\n" % n for n in range(1000))
    found = statuses.termination_message(b"", log, policy="FallbackToLogsOnError", code=1)
    assert found.splitlines() == [str(n) for n in range(920, 1000)]
