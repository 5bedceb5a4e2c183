"""Whether what a session keeps in the object store goes with it.

Revision ID: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """What sessions keep so far stays."""
    op.add_column(
        "session_credentials",
        sa.Column("removes", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
