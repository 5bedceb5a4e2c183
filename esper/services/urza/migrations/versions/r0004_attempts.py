"""How often work was leased.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Count from here on; blueprints stand where their own validation left them."""
    for table in ("blueprints", "compiled_kernels"):
        op.add_column(
            table, sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0"))
        )
    # Earlier, kernels moved their blueprint along: "compiling" was never the blueprint's own.
    op.execute("UPDATE blueprints SET state = 'proposed' WHERE state = 'compiling'")
