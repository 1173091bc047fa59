"""The first tables, the append-only log, and on PostgreSQL the walls between tenants."""

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0001"
down_revision: Final = None

_TABLES: Final = (
    "tenants",
    "keys",
    "versions",
    "engines",
    "acknowledgements",
    "tokens",
    "approvals",
    "log",
    "checkpoints",
    "jobs",
    "items",
)
_APPEND_ONLY: Final = (("log", "position"), ("checkpoints", "size"))
_GAP: Final = (
    "NEW.position <> 0 AND NOT EXISTS "
    "(SELECT 1 FROM log WHERE tenant = NEW.tenant AND position = NEW.position - 1)"
)


def upgrade() -> None:
    """Make everything. Written out, so that it stays what it was when the tables change."""
    op.create_table(
        "tenants",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("created_at", sa.String(length=24), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("open_jobs", sa.Integer(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_tenants")),
    )
    op.create_table(
        "approvals",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("requested_by", sa.String(length=64), nullable=False),
        sa.Column("requested_token", sa.String(length=12), nullable=True),
        sa.Column("requested_at", sa.String(length=24), nullable=False),
        sa.Column("expires_at", sa.String(length=24), nullable=False),
        sa.Column("approved_by", sa.String(length=64), nullable=True),
        sa.Column("approved_token", sa.String(length=12), nullable=True),
        sa.Column("approved_at", sa.String(length=24), nullable=True),
        sa.Column("used_at", sa.String(length=24), nullable=True),
        sa.Column("used_by", sa.String(length=64), nullable=True),
        sa.CheckConstraint("approved_by <> requested_by", name=op.f("ck_approvals_two_people")),
        sa.CheckConstraint(
            "used_at IS NULL OR approved_by IS NOT NULL", name=op.f("ck_approvals_approved_first")
        ),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_approvals_tenant")),
        sa.PrimaryKeyConstraint("tenant", "id", name=op.f("pk_approvals")),
    )
    op.create_table(
        "checkpoints",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("head", sa.String(length=64), nullable=False),
        sa.Column("root", sa.String(length=64), nullable=False),
        sa.Column("at", sa.String(length=24), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_checkpoints_tenant")),
        sa.PrimaryKeyConstraint("tenant", "size", name=op.f("pk_checkpoints")),
    )
    op.create_table(
        "engines",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("enrolled_at", sa.String(length=24), nullable=False),
        sa.Column("last_seen_at", sa.String(length=24), nullable=True),
        sa.Column("revoked_at", sa.String(length=24), nullable=True),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_engines_tenant")),
        sa.PrimaryKeyConstraint("tenant", "name", name=op.f("pk_engines")),
    )
    op.create_table(
        "jobs",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("who", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=10), nullable=False),
        sa.Column("options", sa.Text(), nullable=False),
        sa.Column("n_items", sa.Integer(), nullable=False),
        sa.Column("n_done", sa.Integer(), nullable=False),
        sa.Column("n_failed", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(length=24), nullable=False),
        sa.Column("expires_at", sa.String(length=24), nullable=False),
        sa.Column("finished_at", sa.String(length=24), nullable=True),
        sa.Column("items_key", sa.LargeBinary(), nullable=True),
        sa.Column("results_key", sa.LargeBinary(), nullable=True),
        sa.Column("request_id", sa.String(length=128), nullable=True),
        sa.Column("request_digest", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_jobs_tenant")),
        sa.PrimaryKeyConstraint("tenant", "id", name=op.f("pk_jobs")),
        sa.UniqueConstraint(
            "tenant", "who", "request_id", name=op.f("uq_jobs_tenant_who_request_id")
        ),
    )
    op.create_table(
        "keys",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("name", sa.String(length=28), nullable=False),
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("scheme", sa.Text(), nullable=True),
        sa.Column("profile", sa.Text(), nullable=True),
        sa.Column("tokenizer_sha256", sa.String(length=64), nullable=True),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(length=8), nullable=False),
        sa.Column("created_at", sa.String(length=24), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_keys_tenant")),
        sa.PrimaryKeyConstraint("tenant", "name", name=op.f("pk_keys")),
    )
    op.create_table(
        "log",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("at", sa.String(length=24), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_log_tenant")),
        sa.PrimaryKeyConstraint("tenant", "position", name=op.f("pk_log")),
    )
    op.create_table(
        "items",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("job", sa.String(length=16), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=True),
        sa.Column("result", sa.LargeBinary(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(length=32), nullable=True),
        sa.Column("lease_until", sa.String(length=24), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant", "job"],
            ["jobs.tenant", "jobs.id"],
            name=op.f("fk_items_tenant_job"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "job", "position", name=op.f("pk_items")),
    )
    op.create_table(
        "tokens",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("id", sa.String(length=12), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("roles", sa.Text(), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.String(length=24), nullable=False),
        sa.Column("expires_at", sa.String(length=24), nullable=True),
        sa.Column("revoked_at", sa.String(length=24), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant", "engine"],
            ["engines.tenant", "engines.name"],
            name=op.f("fk_tokens_tenant_engine"),
        ),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_tokens_tenant")),
        sa.PrimaryKeyConstraint("tenant", "id", name=op.f("pk_tokens")),
    )
    op.create_table(
        "versions",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("name", sa.String(length=28), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("root_version", sa.Integer(), nullable=False),
        sa.Column("commitment", sa.String(length=64), nullable=False),
        sa.Column("log_index", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(length=24), nullable=False),
        sa.Column("promoted_at", sa.String(length=24), nullable=True),
        sa.Column("retired_at", sa.String(length=24), nullable=True),
        sa.Column("compromised_since", sa.String(length=24), nullable=True),
        sa.Column("destroyed_at", sa.String(length=24), nullable=True),
        sa.Column("request_id", sa.String(length=128), nullable=True),
        sa.Column("salt", sa.LargeBinary(), nullable=True),
        sa.Column("wrapped_key", sa.LargeBinary(), nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.CheckConstraint(
            "(state = 'destroyed') = (salt IS NULL AND wrapped_key IS NULL AND sealed IS NULL)",
            name=op.f("ck_versions_erased"),
        ),
        sa.CheckConstraint(
            "state IN ('pre-active', 'active', 'retired', 'compromised', 'destroyed')",
            name=op.f("ck_versions_state"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant", "name"], ["keys.tenant", "keys.name"], name=op.f("fk_versions_tenant_name")
        ),
        sa.PrimaryKeyConstraint("tenant", "name", "number", name=op.f("pk_versions")),
        sa.UniqueConstraint("tenant", "request_id", name=op.f("uq_versions_tenant_request_id")),
    )
    op.create_index(
        "one_active_version",
        "versions",
        ["tenant", "name"],
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_table(
        "acknowledgements",
        sa.Column("tenant", sa.String(length=24), nullable=False),
        sa.Column("name", sa.String(length=28), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("at", sa.String(length=24), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "engine"],
            ["engines.tenant", "engines.name"],
            name=op.f("fk_acknowledgements_tenant_engine"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant", "name", "number"],
            ["versions.tenant", "versions.name", "versions.number"],
            name=op.f("fk_acknowledgements_tenant_name_number"),
        ),
        sa.PrimaryKeyConstraint(
            "tenant", "name", "number", "engine", name=op.f("pk_acknowledgements")
        ),
    )
    if op.get_bind().dialect.name == "postgresql":
        _walls()
    else:
        _triggers()


def _walls() -> None:
    """Rows are seen and changed in transactions that name their tenant; owners are no exception."""
    for name in _TABLES:
        own = "tenant = current_setting('filigrane.tenant', true)"
        op.execute(f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {name} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY own_tenant ON {name} USING ({own}) WITH CHECK ({own})")
    # Who runs the service has to know which tenants there are, and nothing else of them.
    op.execute(
        "CREATE POLICY operator ON tenants FOR SELECT "
        "USING (current_setting('filigrane.operator', true) = 'on')"
    )
    op.execute(
        "CREATE FUNCTION filigrane_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"
    )
    for name, _ in _APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {name}_keeps BEFORE UPDATE OR DELETE ON {name} "
            "FOR EACH ROW EXECUTE FUNCTION filigrane_append_only()"
        )
        op.execute(
            f"CREATE TRIGGER {name}_stays BEFORE TRUNCATE ON {name} "
            "FOR EACH STATEMENT EXECUTE FUNCTION filigrane_append_only()"
        )
    # Afterwards: row-level security is asked first, and one statement may add several records.
    op.execute(
        "CREATE FUNCTION filigrane_no_gaps() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF {_GAP} THEN RAISE EXCEPTION 'the audit log is append-only, without gaps'; END IF; "
        "RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER log_no_gaps AFTER INSERT ON log "
        "FOR EACH ROW EXECUTE FUNCTION filigrane_no_gaps()"
    )


def _triggers() -> None:
    for name, number in _APPEND_ONLY:
        refuse = "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        for verb in ("UPDATE", "DELETE"):
            op.execute(f"CREATE TRIGGER {name}_no_{verb.lower()} BEFORE {verb} ON {name} {refuse}")
        # INSERT OR REPLACE removes a row without asking the trigger above.
        there = f"SELECT 1 FROM {name} WHERE tenant = NEW.tenant AND {number} = NEW.{number}"
        op.execute(
            f"CREATE TRIGGER {name}_no_replace BEFORE INSERT ON {name} "
            f"WHEN EXISTS ({there}) {refuse}"
        )
    op.execute(
        f"CREATE TRIGGER log_no_gaps BEFORE INSERT ON log WHEN {_GAP} "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only, without gaps'); END"
    )
