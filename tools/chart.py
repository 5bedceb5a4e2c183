"""What the chart has from elsewhere: the operator's rights, and the guide's table of its values.

python -m tools.chart            write charts/esper/files and the table
python -m tools.chart --check    end with 1 if one of them is not up to date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from esper.configs import OperatorConfig
from esper_operator.rbac import manifests

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "charts" / "esper"
RULES = CHART / "files" / "operator-rules.yaml"
GUIDE = ROOT / "docs" / "guides" / "installing.md"
COMMAND = "python -m tools.chart"
LEASE = "LEASE_NAME"
"""Stands for the lease's name, which is the release's."""
_BEGIN, _END = "<!-- values: begin -->\n", "<!-- values: end -->\n"


def rules() -> str:
    """The operator's rules as YAML: `own` in its namespace, `served` in those that it serves."""
    made = manifests(OperatorConfig(lease_name=LEASE.lower().replace("_", "-")), namespaced=False)
    found = {role["kind"]: role["rules"] for role in made if "rules" in role}
    text = yaml.safe_dump(
        {"own": found["Role"], "served": found["ClusterRole"]},
        sort_keys=False,
        default_flow_style=None,
    )
    head = f"# Generated from esper_operator.rbac; `{COMMAND}` writes it anew.\n"
    return head + text.replace(LEASE.lower().replace("_", "-"), LEASE)


def values() -> Iterator[tuple[str, Any, str]]:
    """Each value that the chart takes: its dotted name, its default, the comment above it."""
    text = (CHART / "values.yaml").read_text()
    defaults = yaml.safe_load(text)
    path: list[str] = []
    said = ""
    for line in text.splitlines():
        comment = re.match(r" *# (.*)", line)
        key = re.match(r"( *)(\w+):", line)
        if comment:
            said = comment[1]
        elif key:
            path = [*path[: len(key[1]) // 2], key[2]]
            if said:
                yield ".".join(path), _at(defaults, path), said
            said = ""
        else:
            said = ""


def _at(defaults: Mapping[str, Any], path: list[str]) -> Any:
    found: Any = defaults
    for name in path:
        found = found[name]
    return found


def table() -> str:
    """The guide's table."""
    lines = ["| value | default | |\n", "|---|---|---|\n"]
    for name, default, said in values():
        shown = yaml.safe_dump(default, default_flow_style=True, width=1000).split("\n")[0]
        lines.append(f"| `{name}` | `{shown}` | {said} |\n")
    return "".join(lines)


def guide() -> str:
    """The guide with the table as it is now."""
    before, _, rest = GUIDE.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{table()}{_END}{after}"


def main() -> int:
    """Write the files, or with `--check` only look at them."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    check = parser.parse_args().check
    stale = 0
    for path, text in ((RULES, rules()), (GUIDE, guide())):
        if path.is_file() and path.read_text() == text:
            continue
        if check:
            sys.stderr.write(
                f"{path.relative_to(ROOT)} is out of date; `{COMMAND}` writes it anew\n"
            )
            stale = 1
        else:
            path.write_text(text)
    return stale


if __name__ == "__main__":
    sys.exit(main())
