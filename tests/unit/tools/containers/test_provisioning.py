"""Which volumes claims need, and which have had their time."""

from pathlib import Path

import pytest

from tools.cluster.containers.provisioning import PROVISIONER, plan

ROOT = Path("/volumes")
OURS = {"metadata": {"name": "local"}, "provisioner": PROVISIONER, "reclaimPolicy": "Delete"}
KEPT = {"metadata": {"name": "kept"}, "provisioner": PROVISIONER, "reclaimPolicy": "Retain"}
OTHERS = {"metadata": {"name": "others"}, "provisioner": "example.org/other"}
CLASSES = [OURS, KEPT, OTHERS]


def claim(uid="1", *, metadata=None, **spec):
    return {
        "metadata": {"name": f"c{uid}", "namespace": "lab", "uid": uid, **(metadata or {})},
        "spec": {
            "storageClassName": "local",
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "5Gi"}},
            **spec,
        },
    }


def volume(name="pvc-1", phase="Released", *, by=PROVISIONER, policy="Delete", metadata=None):
    return {
        "metadata": {
            "name": name,
            "annotations": {"pv.kubernetes.io/provisioned-by": by},
            **(metadata or {}),
        },
        "spec": {"persistentVolumeReclaimPolicy": policy},
        "status": {"phase": phase},
    }


def test_a_claim_that_waits_gets_a_volume_that_is_its_own():
    ((made, folder),) = plan([claim()], [], CLASSES, ROOT).made
    assert folder == ROOT / "pvc-1"
    spec = made["spec"]
    assert spec["hostPath"] == {"path": "/volumes/pvc-1", "type": "Directory"}
    assert spec["claimRef"]["uid"] == "1"
    assert (spec["claimRef"]["namespace"], spec["claimRef"]["name"]) == ("lab", "c1")
    assert spec["accessModes"] == ["ReadWriteMany"]
    assert spec["capacity"] == {"storage": "5Gi"}
    assert spec["storageClassName"] == "local"
    # What it makes it knows again.
    released = {**made, "status": {"phase": "Released"}}
    assert plan([], [released], CLASSES, ROOT).removed == (("pvc-1", ROOT / "pvc-1"),)


def test_a_class_says_what_becomes_of_its_volumes():
    ((made, _),) = plan([claim(storageClassName="kept")], [], CLASSES, ROOT).made
    assert made["spec"]["persistentVolumeReclaimPolicy"] == "Retain"


@pytest.mark.parametrize(
    "found",
    [
        claim(storageClassName="others"),
        claim(storageClassName=""),
        claim(storageClassName=None),
        claim(volumeName="mine"),
        claim(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}),
    ],
)
def test_a_claim_that_is_not_ours_or_needs_nothing_gets_nothing(found):
    assert plan([found], [], CLASSES, ROOT).made == ()


def test_a_claim_whose_volume_is_there_gets_no_second_one():
    assert plan([claim()], [volume(phase="Available")], CLASSES, ROOT).made == ()


def test_a_claim_of_a_device_is_refused():
    found = plan([claim(volumeMode="Block")], [], CLASSES, ROOT)
    assert (found.made, len(found.refused)) == ((), 1)


@pytest.mark.parametrize("phase", ["Released", "Failed"])
def test_a_volume_goes_with_its_claim(phase):
    assert plan([], [volume(phase=phase)], CLASSES, ROOT).removed == (("pvc-1", ROOT / "pvc-1"),)


@pytest.mark.parametrize(
    "found",
    [
        volume(phase="Bound"),
        volume(phase="Available"),
        volume(by="example.org/other"),
        volume(policy="Retain"),
        volume(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}),
        {"metadata": {"name": "made-by-hand"}, "spec": {}, "status": {"phase": "Released"}},
    ],
)
def test_any_other_volume_stays(found):
    assert plan([], [found], CLASSES, ROOT).removed == ()
