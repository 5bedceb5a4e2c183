"""Which namespaces were given credentials, so that their users come back with Redis.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table; a namespace with credentials of sessions is taken for one that has its own.

    Until now nothing said which had, and the users of just these were set again.
    """
    time = sa.DateTime(timezone=True)
    given = op.create_table(
        "namespace_credentials",
        sa.Column("namespace", sa.String(63), primary_key=True),
        sa.Column("created_at", time, nullable=False),
        sa.Column("expires_at", time, nullable=False),
    )
    names = ("namespace", "created_at", "expires_at")
    sessions = sa.table("session_credentials", *map(sa.column, (*names, "revoked")))
    found = (
        sa.select(
            sessions.c.namespace,
            sa.func.min(sessions.c.created_at),
            sa.func.max(sessions.c.expires_at),
        )
        .where(sessions.c.revoked.is_(sa.false()))
        .group_by(sessions.c.namespace)
    )
    op.get_bind().execute(given.insert().from_select(names, found))
