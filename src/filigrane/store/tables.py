"""The tables, the same on SQLite and PostgreSQL; every row names its tenant.

Times are text in RFC 3339, UTC, with milliseconds: 24 characters that sort as they should, the same
on both. The migrations make these tables and what SQL alone can promise: one active version of a
key, an append-only log, and on PostgreSQL row-level security.
"""

from typing import Final

from sqlalchemy import (
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

HEAD: Final = "0001"
"""The migration that this version of filigrane works with; a test holds it to the newest one."""
REVISIONS: Final = ("0001",)
"""All migrations, oldest first."""

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _time(name: str, *, nullable: bool = False) -> Column[str]:
    return Column(name, String(24), nullable=nullable)


def _tenant() -> Column[str]:
    return Column("tenant", String(24), primary_key=True)


def _of_tenant() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["tenant"], ["tenants.tenant"])


tenants: Final = Table(
    "tenants",
    metadata,
    _tenant(),
    _time("created_at"),
    # Counts changes of keys; services ask for it to know whether what they remember still holds.
    Column("revision", Integer, nullable=False),
    # So that a worker finds whose jobs wait without reading them.
    Column("open_jobs", Integer, nullable=False, server_default="0"),
)

keys: Final = Table(
    "keys",
    metadata,
    _tenant(),
    Column("name", String(28), primary_key=True),
    Column("model", String(128), nullable=False),
    Column("scheme", Text),
    Column("profile", Text),
    Column("tokenizer_sha256", String(64)),
    Column("slots", Integer, nullable=False),
    Column("source", String(8), nullable=False),
    _time("created_at"),
    _of_tenant(),
)

versions: Final = Table(
    "versions",
    metadata,
    _tenant(),
    Column("name", String(28), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("state", String(12), nullable=False),
    Column("root_version", Integer, nullable=False),
    Column("commitment", String(64), nullable=False),
    Column("log_index", Integer, nullable=False),
    _time("created_at"),
    _time("promoted_at", nullable=True),
    _time("retired_at", nullable=True),
    _time("compromised_since", nullable=True),
    _time("destroyed_at", nullable=True),
    Column("request_id", String(128)),
    # What the key is made from, or opened with; a destroyed version has none of it.
    Column("salt", LargeBinary),
    Column("wrapped_key", LargeBinary),
    Column("sealed", LargeBinary),
    ForeignKeyConstraint(["tenant", "name"], ["keys.tenant", "keys.name"]),
    UniqueConstraint("tenant", "request_id"),
    CheckConstraint(
        "state IN ('pre-active', 'active', 'retired', 'compromised', 'destroyed')", name="state"
    ),
    CheckConstraint(
        "(state = 'destroyed') = (salt IS NULL AND wrapped_key IS NULL AND sealed IS NULL)",
        name="erased",
    ),
    Index(
        "one_active_version",
        "tenant",
        "name",
        unique=True,
        sqlite_where=text("state = 'active'"),
        postgresql_where=text("state = 'active'"),
    ),
)

engines: Final = Table(
    "engines",
    metadata,
    _tenant(),
    Column("name", String(64), primary_key=True),
    Column("models", Text, nullable=False),
    Column("public_key", Text, nullable=False),
    _time("enrolled_at"),
    _time("last_seen_at", nullable=True),
    _time("revoked_at", nullable=True),
    _of_tenant(),
)

acknowledgements: Final = Table(
    "acknowledgements",
    metadata,
    _tenant(),
    Column("name", String(28), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("engine", String(64), primary_key=True),
    _time("at"),
    ForeignKeyConstraint(
        ["tenant", "name", "number"], ["versions.tenant", "versions.name", "versions.number"]
    ),
    ForeignKeyConstraint(["tenant", "engine"], ["engines.tenant", "engines.name"]),
)

tokens: Final = Table(
    "tokens",
    metadata,
    _tenant(),
    Column("id", String(12), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("roles", Text, nullable=False),
    Column("engine", String(64)),
    Column("digest", String(64), nullable=False),
    _time("created_at"),
    _time("expires_at", nullable=True),
    _time("revoked_at", nullable=True),
    _of_tenant(),
    ForeignKeyConstraint(["tenant", "engine"], ["engines.tenant", "engines.name"]),
)

approvals: Final = Table(
    "approvals",
    metadata,
    _tenant(),
    Column("id", String(16), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("purpose", Text, nullable=False),
    Column("requested_by", String(64), nullable=False),
    # By which tokens they agreed, so that what is revoked takes its word back.
    Column("requested_token", String(12)),
    _time("requested_at"),
    _time("expires_at"),
    Column("approved_by", String(64)),
    Column("approved_token", String(12)),
    _time("approved_at", nullable=True),
    _time("used_at", nullable=True),
    Column("used_by", String(64)),
    _of_tenant(),
    CheckConstraint("approved_by <> requested_by", name="two_people"),
    CheckConstraint("used_at IS NULL OR approved_by IS NOT NULL", name="approved_first"),
)

log: Final = Table(
    "log",
    metadata,
    _tenant(),
    Column("position", Integer, primary_key=True),
    _time("at"),
    Column("actor", String(128), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("facts", Text, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    _of_tenant(),
)

checkpoints: Final = Table(
    "checkpoints",
    metadata,
    _tenant(),
    Column("size", Integer, primary_key=True),
    Column("head", String(64), nullable=False),
    Column("root", String(64), nullable=False),
    _time("at"),
    Column("key_id", String(64), nullable=False),
    Column("signature", Text, nullable=False),
    _of_tenant(),
)

jobs: Final = Table(
    "jobs",
    metadata,
    _tenant(),
    Column("id", String(16), primary_key=True),
    Column("who", String(64), nullable=False),
    Column("state", String(10), nullable=False),
    Column("options", Text, nullable=False),
    Column("n_items", Integer, nullable=False),
    Column("n_done", Integer, nullable=False),
    Column("n_failed", Integer, nullable=False),
    _time("created_at"),
    _time("expires_at"),
    _time("finished_at", nullable=True),
    # Two data keys: that of the items goes with the last of them, that of the results stays.
    Column("items_key", LargeBinary),
    Column("results_key", LargeBinary),
    Column("request_id", String(128)),
    Column("request_digest", String(64)),
    _of_tenant(),
    UniqueConstraint("tenant", "who", "request_id"),
)

items: Final = Table(
    "items",
    metadata,
    _tenant(),
    Column("job", String(16), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("content", LargeBinary),
    Column("result", LargeBinary),
    Column("attempts", Integer, nullable=False),
    Column("lease", String(32)),
    _time("lease_until", nullable=True),
    ForeignKeyConstraint(["tenant", "job"], ["jobs.tenant", "jobs.id"], ondelete="CASCADE"),
)

APPEND_ONLY: Final = ("log", "checkpoints")
"""Tables whose rows are never changed or removed."""

CHANGES: Final = {
    "tenants": ("revision", "open_jobs"),
    "versions": (
        "state",
        "promoted_at",
        "retired_at",
        "compromised_since",
        "destroyed_at",
        "salt",
        "wrapped_key",
        "sealed",
    ),
    "engines": ("last_seen_at", "revoked_at"),
    "tokens": ("revoked_at",),
    "approvals": ("approved_by", "approved_token", "approved_at", "used_at", "used_by"),
    "jobs": ("state", "n_done", "n_failed", "finished_at", "items_key", "results_key"),
    "items": ("content", "result", "attempts", "lease", "lease_until"),
}
"""Table -> what changes in its rows; everything else stays as it was inserted."""
