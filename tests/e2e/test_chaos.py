"""`make chaos-cluster`, quick: what a session needs is killed on its node, and nothing is lost."""

from tests.e2e.sessions import CHAOS
from tools.cluster_faults import WAYS


def test_a_few_faults_lose_nothing(campaign):
    outcome, said = campaign.result()
    assert outcome.broken == [], "\n".join(said)
    assert len(outcome.faults) == CHAOS.faults == 5
    parts = {fault.split()[1] for fault in outcome.faults}
    assert len(parts) == CHAOS.faults  # each another part
    assert parts < set(WAYS)
    assert {"worker", "compile"} < parts
    # What came of it is worth comparing: kernels were compiled by Jobs, and the model has grown.
    for session in outcome.figures["perSession"]:
        assert session["fossilized"] >= 1
        assert session["compiled"] >= 1
        assert session["transitions"] >= 10
