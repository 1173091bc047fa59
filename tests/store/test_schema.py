"""Opening and migrating: only the tables of this version, only by a role that is held back."""

import os
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

import pgkit
import storekit
from filigrane.errors import (
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreVersionError,
)
from filigrane.store import database as database_module
from filigrane.store import tables
from filigrane.store.database import Database, migrate, moment, now, stamp


def test_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", "filigrane.store:migrations")
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_current_head() == tables.HEAD == tables.REVISIONS[-1]
    assert tuple(s.revision for s in reversed(list(scripts.walk_revisions()))) == tables.REVISIONS


def test_migrations_make_the_tables(stores: storekit.Stores) -> None:
    url = stores.urls().owner.replace("postgresql://", "postgresql+psycopg://")
    engine = create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
    engine.dispose()


def _set_revision(url: str, revision: str) -> None:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
    engine.dispose()


def test_older_and_newer_tables(stores: storekit.Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = stores.urls()
    database = Database.open(urls.app)
    _set_revision(urls.owner, "9999")
    with pytest.raises(StoreVersionError, match="newer filigrane"):
        Database.open(urls.app)
    with pytest.raises(StoreVersionError, match="newer filigrane"):
        migrate(urls.owner)
    with pytest.raises(StoreVersionError, match="newer filigrane"):
        database.check()
    monkeypatch.setattr(tables, "REVISIONS", ("0000", *tables.REVISIONS))
    _set_revision(urls.owner, "0000")
    with pytest.raises(StoreVersionError, match=r"older filigrane.*keys migrate"):
        Database.open(urls.app)
    _set_revision(urls.owner, tables.HEAD)
    database.check()
    assert migrate(urls.owner) == (tables.HEAD, tables.HEAD)
    database.close()


def test_a_failed_migration_leaves_nothing(
    dialect: str, tmp_path: Path, cluster: pgkit.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = f"sqlite:///{tmp_path / 'new.db'}"
    url = file if dialect == "sqlite" else cluster.empty().owner

    def fail(*_: object) -> None:
        raise StoreError("no")

    def broken(connection: object, role: str) -> None:
        fail()

    if dialect == "postgresql":
        monkeypatch.setattr(database_module, "_grant", broken)
        with pytest.raises(StoreError, match="no"):
            migrate(url, service_role="filigrane_app")
    else:
        monkeypatch.setattr(tables, "HEAD", "0002")
        with pytest.raises(Exception, match="0002"):
            migrate(url)
    monkeypatch.undo()
    with pytest.raises(StoreVersionError, match="no tables yet: run `filigrane keys migrate`"):
        Database.open(url)
    assert migrate(url) == (None, tables.HEAD)


def test_sqlite_files_are_private(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with pytest.raises(StoreError, match=r"does not exist.*keys migrate"):
        Database.open(f"sqlite:///{path}")
    assert not path.exists()
    migrate(f"sqlite:///{path}")
    database = Database.open(f"sqlite:///{path}")
    with database.reading("acme"):
        modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
        assert modes == {0o600} and len(list(tmp_path.iterdir())) == 3
    database.close()
    os.chmod(path, 0o644)
    with pytest.raises(StoreError, match="chmod 600"):
        Database.open(f"sqlite:///{path}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://u:sesame@h/d", "use sqlite or postgresql"),
        ("sqlite://", "name a file"),
        ("no address", "not the address of a database"),
        ("sqlite:////nowhere/at/all.db", "does not exist"),
        ("postgresql://u:sesame@127.0.0.1:9/d", "does not answer"),
    ],
)
def test_what_cannot_be_opened(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        Database.open(url)
    assert "sesame" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"nothing of the kind, but long enough to be looked at as a header" * 20)
    path.chmod(0o600)
    with pytest.raises(StoreDamaged, match="not a database"):
        Database.open(f"sqlite:///{path}")


def test_roles_that_walls_do_not_hold(cluster: pgkit.Cluster) -> None:
    urls = cluster.database()
    for url in (urls.superuser, urls.owner):
        with pytest.raises(StoreError, match="superuser, has BYPASSRLS or owns"):
            Database.open(url)
    cluster.execute("CREATE ROLE sly LOGIN BYPASSRLS PASSWORD 'sesame'")
    cluster.execute("CREATE ROLE heir LOGIN PASSWORD 'sesame' IN ROLE filigrane_owner")
    for role in ("sly", "heir"):
        url = f"postgresql://{role}:sesame@127.0.0.1:{cluster.port}/{urls.name}"
        cluster.execute(f"GRANT SELECT ON alembic_version TO {role}", database=urls.name)
        with pytest.raises(StoreError, match="superuser, has BYPASSRLS or owns"):
            Database.open(url)
    wrong = urls.app.replace("filigrane_app:", "filigrane_app:x")
    with pytest.raises(StoreError, match="password is not accepted") as caught:
        Database.open(wrong)
    assert cluster.passwords["filigrane_app"] not in str(caught.value)
    database = Database.open(urls.app)
    assert cluster.passwords["filigrane_app"] not in repr(database)
    database.close()
    with pytest.raises(StoreError, match="no role nobody_there"):
        migrate(urls.owner, service_role="nobody_there")
    with pytest.raises(StoreError, match="a role's name"):
        migrate(urls.owner, service_role='x"; DROP TABLE log; --')


def test_the_service_owns_nothing(cluster: pgkit.Cluster) -> None:
    urls = cluster.database()
    with psycopg.connect(urls.superuser) as connection:
        rows = connection.execute(
            "SELECT relname, relrowsecurity, relforcerowsecurity, "
            "pg_get_userbyid(relowner) FROM pg_class "
            "WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace"
        ).fetchall()
    names = {row[0] for row in rows}
    assert names == {*tables.metadata.tables, "alembic_version"}
    for name, enabled, forced, owner in rows:
        assert owner == "filigrane_owner"
        assert (enabled and forced) or name == "alembic_version"


def test_times() -> None:
    at = now()
    assert moment(stamp(at)) == at.replace(microsecond=at.microsecond // 1000 * 1000)
    with pytest.raises(StoreError, match="zone"):
        stamp(at.replace(tzinfo=None))


@pytest.mark.parametrize(
    ("change", "undo"),
    [
        ("tenants RENAME TO others", "others RENAME TO tenants"),
        ("tenants RENAME COLUMN revision TO other", "tenants RENAME COLUMN other TO revision"),
    ],
)
def test_tables_that_no_retry_mends(stores: storekit.Stores, change: str, undo: str) -> None:
    urls = stores.urls()
    database = Database.open(urls.app)
    engine = create_engine(urls.owner.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {change}"))
    with (
        pytest.raises(
            StoreVersionError, match="not this version's: run `filigrane keys mig"
        ) as caught,
        database.tenant("acme") as connection,
    ):
        database_module.lock_tenant(connection, "acme")
    assert "does not answer" not in str(caught.value)
    if stores.dialect == "postgresql":
        assert "42P01" in str(caught.value) or "42703" in str(caught.value)
    database.close()
    # Other tests get this database later.
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {undo}"))
    engine.dispose()


def test_a_role_without_rights_is_named(cluster: pgkit.Cluster) -> None:
    urls = cluster.database()
    cluster.execute("CREATE ROLE guest LOGIN PASSWORD 'sesame'")
    url = f"postgresql://guest:sesame@127.0.0.1:{cluster.port}/{urls.name}"
    with pytest.raises(StoreError, match="the role guest may not do that") as caught:
        Database.open(url)
    assert "`filigrane keys migrate --service-role guest`" in str(caught.value)
    assert "sesame" not in str(caught.value) and "42501" in str(caught.value)


def test_a_full_disk(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    migrate(url)
    database = Database.open(url)
    with (
        pytest.raises(StoreFull, match="the disk is full"),
        database.tenant("acme") as connection,
    ):
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
        connection.exec_driver_sql("CREATE TABLE big AS SELECT zeroblob(10000000) AS b")
    database.close()


@pytest.mark.parametrize(
    ("statement", "code"), [("SELECT 1 / 0", "22012"), ("SELECT 'sesame'::int", "22P02")]
)
def test_what_cannot_be_helped_is_told_by_its_code(
    cluster: pgkit.Cluster, statement: str, code: str
) -> None:
    database = Database.open(cluster.database().app)
    with (
        pytest.raises(StoreError, match=f"trying again does not help.*{code}") as caught,
        database.reading("acme") as connection,
    ):
        connection.exec_driver_sql(statement)
    assert "sesame" not in str(caught.value)
    database.close()
