"""Names of children: none of one session is that of another's, or of what a namespace shares."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from esper_operator.children import names

# Parts of the children's own names, so that they meet.
PART = st.sampled_from(
    ["a", "esper", "tamiyo", "compile", "controller", "workers", "own", "1", "0", "abcd", "ijkl"]
)
SESSION = st.lists(PART, min_size=1, max_size=4).map("-".join)
SHARED = {("Deployment", names.TAMIYO), ("Secret", names.TAMIYO)}


def children(session: str, uid: str, attempt: int, layer: str, slot: int) -> set[tuple[str, str]]:
    return {
        ("Service", names.service(session)),
        ("Secret", names.secret(session)),
        ("Job", names.job(session, uid, attempt)),
        ("Deployment", names.tamiyo(session)),
        ("Seed", names.seed(session, layer, slot)),
    }


@given(SESSION, SESSION, st.integers(1, 9), st.integers(1, 9), PART, st.integers(0, 3))
def test_no_two_sessions_and_no_namespace_have_a_child_of_one_name(
    one: str, other: str, attempt: int, later: int, layer: str, slot: int
) -> None:
    made = children(one, f"uid-of-{one}", attempt, layer, slot)
    assert made & SHARED == set()
    if one != other:
        assert made & children(other, f"uid-of-{other}", later, layer, slot) == set()


def test_a_session_may_be_called_esper() -> None:
    assert names.tamiyo("esper") != names.TAMIYO
