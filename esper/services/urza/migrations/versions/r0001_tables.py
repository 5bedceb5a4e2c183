"""The tables before there were revisions: blueprints, kernels and sessions.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_STATES = (
    "proposed",
    "compiling",
    "validating",
    "characterized",
    "deployed",
    "failed",
    "archived",
)
_OUTCOMES = ("Running", "Succeeded", "Failed", "Interrupted")


def _words(name: str, words: tuple[str, ...]) -> sa.Enum:
    return sa.Enum(*words, name=name, native_enum=False, create_constraint=True)


def _row() -> tuple[sa.Column[object], ...]:
    return (
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
    )


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "blueprints",
        *_row(),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("state", _words("blueprintstate", _STATES), nullable=False),
    )
    op.create_table(
        "compiled_kernels",
        *_row(),
        sa.Column("kernel", sa.String(40), nullable=False, unique=True),
        sa.Column(
            "blueprint_id",
            sa.Uuid(),
            sa.ForeignKey("blueprints.id", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
        sa.Column("target", sa.JSON(), nullable=False),
        sa.Column("state", _words("blueprintstate", _STATES), nullable=False, index=True),
        sa.Column("claimed_by", sa.String(253)),
        sa.Column("artifact_digest", sa.String(64)),
        sa.Column("artifact_bytes", sa.Integer()),
        sa.Column("figures", sa.JSON()),
        sa.Column("error", sa.Text()),
    )
    op.create_table(
        "training_sessions",
        *_row(),
        sa.Column("name", sa.String(253), nullable=False, unique=True),
        sa.Column("outcome", _words("sessionoutcome", _OUTCOMES), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("epochs", sa.Integer(), nullable=False),
        sa.Column("num_layers", sa.Integer(), nullable=False),
        sa.Column("num_slots", sa.Integer(), nullable=False),
        sa.Column("seeds", sa.JSON(), nullable=False),
    )
