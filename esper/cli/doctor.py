"""`esper doctor`: every setting and its origin, versions, and whether what a run needs answers."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from esper.cli.output import write_json, write_result

if TYPE_CHECKING:
    from esper.cli.checkup import Check
    from esper.configs import EsperConfig

HELP = "show settings with their origin, versions, and what is missing"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    command.add_argument(
        "--json", action="store_true", help="print everything as JSON on standard output"
    )


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Look at everything; 1 where something that a run needs is not as it must be."""
    from esper.cli import checkup

    settings = [asdict(setting) for setting in config.settings()]
    versions = dict(checkup.versions())
    checks = list(checkup.checks(config))
    healthy = all(check.status != "failed" for check in checks)
    if arguments.json:
        result: dict[str, object] = {"healthy": healthy, "settings": settings}
        result |= {"versions": versions, "checks": [asdict(check) for check in checks]}
        write_json(result)
    else:
        _print(settings, versions, checks)
    return 0 if healthy else 1


def _print(
    settings: list[dict[str, object]], versions: dict[str, str], checks: list[Check]
) -> None:
    write_result("Settings")
    for setting in settings:
        value = "null" if setting["value"] is None else str(setting["value"])
        write_result(f"  {setting['name']:<30} {value:<46} {setting['origin']}")
    write_result("Versions")
    for name, text in versions.items():
        write_result(f"  {name:<30} {text}")
    write_result("Checks")
    for check in checks:
        write_result(f"  {check.name:<30} {check.status:<8} {check.detail}")
