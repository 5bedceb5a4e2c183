"""What Alembic runs for each command, on the connection and in the transaction it was given."""

from __future__ import annotations

from alembic import context

from esper.services.urza.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    # The caller's transaction holds the lock and is the caller's to commit.
    transactional_ddl=False,
)
context.run_migrations()
