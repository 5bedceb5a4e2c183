"""The guide shows the rights that the table grants."""

from __future__ import annotations

from pathlib import Path

from esper_operator.main import main
from esper_operator.rbac import GRANTS, lease_grants

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "running-the-operator.md"


def test_the_guide_has_a_line_for_each_grant() -> None:
    text = GUIDE.read_text()
    for grant in (*GRANTS, *lease_grants("esper-operator")):
        assert f"| `{grant.resource}` | {', '.join(grant.verbs)} | {grant.reason}" in text


def test_the_command_prints_the_roles(capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["rbac", "--namespaced", "--set", "operator.namespaces=team-a"]) == 0
    printed = capsys.readouterr().out
    assert "kind: ClusterRole\n" not in printed
    assert "namespace: team-a" in printed


def test_a_setting_that_cannot_be_is_one_line_and_exit_code_2(capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["rbac", "--set", "operator.namespaces=UPPER"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("esper-operator: error: operator.namespaces")
    assert error.count("\n") == 1
