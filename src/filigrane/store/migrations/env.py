"""What alembic runs: migrations on the connection that `migrate` hands over, in its transaction."""

from alembic import context

from filigrane.store import tables

_connection = context.config.attributes["connection"]
context.configure(
    connection=_connection,
    target_metadata=tables.metadata,
    # The transaction is the caller's: all of it happens, or nothing.
    transaction_per_migration=False,
)
context.run_migrations()
