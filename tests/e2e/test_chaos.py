"""`make chaos-cluster`, quick: what a session needs is killed on its node, and nothing is lost."""

from tools.chaos_cluster import EXAMPLE, Plan, prepared, run
from tools.cluster_faults import WAYS

FAULTS = 5


def test_five_faults_lose_nothing(cluster, release, tmp_path):
    said = []
    plan = Plan(faults=FAULTS, seed=1, longest=4.0)
    outcome = run(cluster, prepared(EXAMPLE), tmp_path, plan, said.append)
    assert outcome.broken == [], "\n".join(said)
    assert len(outcome.faults) == FAULTS
    parts = {fault.split()[1] for fault in outcome.faults}
    assert len(parts) == FAULTS  # each another part
    assert parts < set(WAYS)
    assert {"worker", "compile"} < parts
    # What came of it is worth comparing: kernels were compiled by Jobs, and the model has grown.
    for session in outcome.figures["perSession"]:
        assert session["fossilized"] >= 1
        assert session["compiled"] >= 1
        assert session["transitions"] >= 10
