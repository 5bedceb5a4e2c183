"""`esper token`: a bearer token for the hub, signed with `urza.signing_key`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from esper.cli.output import write_json, write_result

if TYPE_CHECKING:
    from esper.configs import EsperConfig

HELP = "make a bearer token for the hub"
MAX_DAYS = 3650


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    command.add_argument(
        "--role",
        required=True,
        choices=("compiler", "reader", "session", "worker", "admin"),
        help="what its holder may do; docs/api.md has the table",
    )
    command.add_argument(
        "--subject",
        metavar="NAME",
        help="whom it is for; required with --role session, the session's uid, and compiler, the "
        "kernel",
    )
    command.add_argument(
        "--namespace", default="", metavar="N", help="whose sessions it reaches (default: all)"
    )
    command.add_argument(
        "--days", type=float, default=30.0, metavar="D", help="how long it lasts (default: 30)"
    )
    command.add_argument("--json", action="store_true", help="print a JSON object")


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Print the token, and nothing else, on standard output.

    Raises:
        BadInput: an argument that no token can have.
        ConfigError: `urza.signing_key` is not set.
    """
    from datetime import timedelta

    from esper.contracts.base import utc_now
    from esper.errors import BadInput
    from esper.services.urza.auth import Role, Tokens

    role, days = Role(arguments.role), arguments.days
    if not 0 < days <= MAX_DAYS:
        raise BadInput("--days", days, f"more than 0, at most {MAX_DAYS}")
    named = {Role.SESSION: "the uid of the session", Role.COMPILER: "the kernel"}
    if role in named and arguments.subject is None:
        raise BadInput("--subject", "nothing", f"{named[role]} that the token opens")
    since = utc_now()
    until = since + timedelta(days=days)
    token = Tokens(config.urza.signing_key).mint(
        role,
        arguments.subject or role.value,
        namespace=arguments.namespace,
        issued_at=since,
        expires_at=until,
    )
    if arguments.json:
        write_json({"token": token, "role": role.value, "expiresAt": until.isoformat()})
    else:
        write_result(token)
    return 0
