"""Migrations of the store's tables, for alembic; `filigrane.store.database.migrate` runs them."""
