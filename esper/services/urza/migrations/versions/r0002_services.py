"""Leases, versions, the archive, what sessions use, and their credentials.

Revision ID: 0002
"""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TABLES = ("blueprints", "compiled_kernels", "training_sessions")
_OUTCOMES = ("Running", "Succeeded", "Failed", "Interrupted")
_ENDED = ("Succeeded", "Failed")
# As esper.contracts.assets.session_uid makes them; what a revision does never changes.
_UNNAMED_UIDS = uuid.UUID("8f8a8c3e-6a5d-5c0e-9d0f-5b1c1f5e7a11")


def _time(name: str, *, nullable: bool = True) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    """Add the columns and tables; earlier sessions get the uid that follows from their name."""
    for table in _TABLES:
        op.add_column(
            table, sa.Column("version", sa.Integer(), nullable=False, server_default=sa.text("1"))
        )
        op.add_column(table, _time("archived_at"))
        op.create_index(f"ix_{table}_created_at_id", table, ["created_at", "id"])
    for table in ("blueprints", "compiled_kernels"):
        op.add_column(table, sa.Column("lease_token", sa.String(32)))
        op.add_column(table, _time("lease_expires_at"))
    op.add_column("blueprints", sa.Column("claimed_by", sa.String(253)))
    op.add_column("blueprints", sa.Column("error", sa.Text()))
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("compiled_kernels", "artifact_bytes", type_=sa.BigInteger())
    _identify_sessions()
    _make_tables()


def _identify_sessions() -> None:
    op.add_column("training_sessions", sa.Column("namespace", sa.String(63)))
    op.add_column("training_sessions", sa.Column("uid", sa.String(63)))
    op.add_column("training_sessions", _time("ended_at"))
    sessions = sa.table(
        "training_sessions",
        *map(sa.column, ("id", "name", "namespace", "uid", "outcome", "ended_at", "updated_at")),
    )
    connection = op.get_bind()
    for key, name in connection.execute(sa.select(sessions.c.id, sessions.c.name)).all():
        connection.execute(
            sessions.update()
            .where(sessions.c.id == key)
            .values(namespace="default", uid=str(uuid.uuid5(_UNNAMED_UIDS, f"default/{name}")))
        )
    connection.execute(
        sessions.update()
        .where(sessions.c.outcome.in_(_ENDED))
        .values(ended_at=sessions.c.updated_at)
    )
    if connection.dialect.name == "postgresql":
        op.drop_constraint("training_sessions_name_key", "training_sessions", type_="unique")
        op.alter_column("training_sessions", "namespace", nullable=False)
        op.alter_column("training_sessions", "uid", nullable=False)
        op.create_unique_constraint("training_sessions_uid_key", "training_sessions", ["uid"])
    else:
        # SQLite can't change a constraint: the table is made anew, as described here.
        with op.batch_alter_table(
            "training_sessions", copy_from=_sessions_without_names(), recreate="always"
        ) as batch:
            batch.alter_column("namespace", nullable=False)
            batch.alter_column("uid", nullable=False)
    op.create_index("ix_training_sessions_name", "training_sessions", ["name"])


def _sessions_without_names() -> sa.Table:
    """The table as it stands on SQLite, without the constraint that names are unique."""
    outcome = sa.Enum(*_OUTCOMES, name="sessionoutcome", native_enum=False, create_constraint=True)
    return sa.Table(
        "training_sessions",
        sa.MetaData(),
        sa.Column("id", sa.Uuid(), primary_key=True),
        _time("created_at", nullable=False),
        _time("updated_at", nullable=False),
        sa.Column("name", sa.String(253), nullable=False),
        sa.Column("outcome", outcome, nullable=False),
        *(
            sa.Column(name, sa.Integer(), nullable=False)
            for name in ("epoch", "epochs", "num_layers", "num_slots")
        ),
        sa.Column("seeds", sa.JSON(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, server_default=sa.text("1")),
        _time("archived_at"),
        sa.Column("namespace", sa.String(63)),
        sa.Column("uid", sa.String(63), unique=True),
        _time("ended_at"),
        sa.Index("ix_training_sessions_created_at_id", "created_at", "id"),
    )


def _make_tables() -> None:
    for table, column, used in (
        ("session_blueprints", "blueprint_id", "blueprints.id"),
        ("session_kernels", "kernel_id", "compiled_kernels.id"),
    ):
        op.create_table(
            table,
            sa.Column(
                "session_id",
                sa.Uuid(),
                sa.ForeignKey("training_sessions.id", ondelete="CASCADE"),
                primary_key=True,
            ),
            sa.Column(
                column,
                sa.Uuid(),
                sa.ForeignKey(used, ondelete="CASCADE"),
                primary_key=True,
                index=True,
            ),
        )
    op.create_table(
        "session_credentials",
        sa.Column("uid", sa.String(63), primary_key=True),
        sa.Column("namespace", sa.String(63), nullable=False, index=True),
        _time("created_at", nullable=False),
        _time("expires_at", nullable=False),
        sa.Column("revoked", sa.Boolean(), nullable=False),
    )
