"""Which namespaces are served, and how the API server is asked for them."""

from __future__ import annotations

import pytest

from esper.configs import OperatorConfig
from esper.errors import ConfigError
from esper_operator.kinds import MANAGED_BY, SECRET, SESSION
from esper_operator.scope import Scope
from esper_operator.watching import settings_of


def scope(namespaces: str = "", excluded: str = "") -> Scope:
    return Scope.of(OperatorConfig(namespaces=namespaces, excluded_namespaces=excluded))


def test_the_whole_cluster_is_asked_for_at_once() -> None:
    whole = scope()
    assert whole.places == (None,)
    assert whole.has("any")
    assert whole.selecting(SESSION) == {}
    assert whole.selecting(SECRET) == {"labelSelector": MANAGED_BY}


def test_namespaces_are_asked_for_one_by_one() -> None:
    two = scope("a,b")
    assert two.places == ("a", "b")
    assert [two.has(name) for name in ("a", "b", "c")] == [True, True, False]
    assert two.selecting(SESSION) == {}


def test_what_is_left_to_others_is_not_asked_for() -> None:
    rest = scope(excluded="a,b")
    fields = "metadata.namespace!=a,metadata.namespace!=b"
    assert rest.places == (None,)
    assert [rest.has(name) for name in ("a", "b", "c")] == [False, False, True]
    assert rest.selecting(SESSION) == {"fieldSelector": fields}
    assert rest.selecting(SECRET) == {"labelSelector": MANAGED_BY, "fieldSelector": fields}


def test_events_of_there_are_not_watched_either() -> None:
    watched = settings_of([SESSION], fields=scope(excluded="a").fields).watching
    selectors = watched.field_selectors
    assert selectors["esper.dev", "v1alpha1", SESSION.plural] == "metadata.namespace!=a"
    assert not dict(settings_of([SESSION]).watching.field_selectors)


def test_nobody_says_both_what_is_served_and_what_is_not() -> None:
    with pytest.raises(ConfigError, match=r"operator\.excluded_namespaces: got b"):
        scope("a", "b")
