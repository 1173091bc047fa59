"""One database, reached one tenant a transaction; it knows of tables and tenants, not of keys.

On PostgreSQL every transaction says first whose it is, and row-level security shows and lets it
change nothing else, whatever the statements say. On SQLite all statements come from this package
and name the tenant. Database errors leave as AlreadyExists or as a StoreError whose class says what
heals it: their own messages, which repeat statements and values, stay inside.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, Self, final

from sqlalchemy import Connection, Engine, create_engine, event, exc, select, text
from sqlalchemy.engine import URL, make_url

from filigrane.custody.hierarchy import check_name
from filigrane.errors import (
    AlreadyExists,
    MissingDependency,
    NotFound,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreReadOnly,
    StoreUnavailable,
    StoreVersionError,
)
from filigrane.private_files import new_file, open_to_others, why_not
from filigrane.store import tables

__all__ = ["Clock", "Database", "migrate", "moment", "now", "stamp"]

Clock = Callable[[], datetime]

_DIALECTS: Final = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}
_POSTGRES_OPTIONS: Final = "-c lock_timeout=10000 -c statement_timeout=60000 -c timezone=UTC"
_CONNECT_S: Final = 5
_BUSY_S: Final = 10
_ERASE_MS: Final = 500
"""How long readers are waited for when the write-ahead log is to be emptied."""
_ROLE: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")


def now() -> datetime:
    """The time of this machine, in UTC."""
    return datetime.now(UTC)


def stamp(when: datetime) -> str:
    """A time as the tables and the log have it: '2026-01-31T12:00:00.000Z'. Wants a time zone."""
    if when.tzinfo is None:
        raise StoreError("a time without a zone says nothing; use datetime.now(UTC).")
    return when.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(written: str) -> datetime:
    """The time that `stamp` wrote."""
    return datetime.fromisoformat(written)


@final
class Database:
    """An open database whose tables are those of this version of filigrane. Thread-safe."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.__engine = engine
        self.clock = clock

    @classmethod
    def open(cls, url: str, *, clock: Clock = now) -> Self:
        """Connect. url: 'sqlite:////var/lib/filigrane/store.db' or 'postgresql://user@host/name'.

        Raises StoreError if it cannot be reached, has no tables or other ones, or if the role on
        PostgreSQL is one that row-level security does not hold; no message has the password.
        """
        engine = _engine(url, must_exist=True)
        self = cls(engine, clock)
        try:
            with self._transaction(None, write=False) as connection:
                _require_schema(connection)
                _require_humble(connection)
        except BaseException:
            engine.dispose()
            raise
        return self

    @property
    def dialect(self) -> str:
        """sqlite or postgresql."""
        return self.__engine.dialect.name

    def tenant(self, name: str) -> contextlib.AbstractContextManager[Connection]:
        """A transaction that may write what belongs to a tenant; committed at its end.

        An exception inside undoes all of it. Raises StoreError or AlreadyExists.
        """
        check_name("tenant", name)
        return self._transaction(name, write=True)

    def reading(self, name: str) -> contextlib.AbstractContextManager[Connection]:
        """A transaction that reads, at one moment, what belongs to a tenant."""
        check_name("tenant", name)
        return self._transaction(name, write=False)

    def tenants(self, *, with_jobs: bool = False) -> tuple[str, ...]:
        """The names of all tenants, or of those whose jobs wait; for whoever runs the service."""
        query = select(tables.tenants.c.tenant).order_by(tables.tenants.c.tenant)
        if with_jobs:
            query = query.where(tables.tenants.c.open_jobs > 0)
        with self._transaction(None, write=False) as connection:
            if self.dialect == "postgresql":
                connection.execute(text("SELECT set_config('filigrane.operator', 'on', true)"))
            return tuple(connection.scalars(query))

    def check(self) -> None:
        """Raise StoreError unless the database answers now."""
        with self._transaction(None, write=False) as connection:
            _require_schema(connection)

    def close(self) -> None:
        """Close all connections."""
        self.__engine.dispose()

    def erase(self) -> bool:
        """Make what was erased disappear from SQLite's write-ahead log too; whether it did.

        That cannot be done while a transaction from before reads: the service's worker tries again
        every minute. PostgreSQL keeps old rows until VACUUM, and its own logs and backups as long
        as they are told to.
        """
        if self.dialect != "sqlite":
            return True
        with contextlib.suppress(exc.SQLAlchemyError), self.__engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {_ERASE_MS}")
            try:
                row = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
            finally:
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {_BUSY_S * 1000}")
            return int(row[0]) == 0
        return False

    def __repr__(self) -> str:
        return f"<Database {_shown(self.__engine.url)}>"

    @contextlib.contextmanager
    def _transaction(self, tenant: str | None, *, write: bool) -> Iterator[Connection]:
        with _plain_errors(self.__engine.url), self.__engine.connect() as connection:
            if self.dialect == "sqlite":
                # A transaction that only turns out to write cannot wait for its turn any more.
                connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
            else:
                connection = connection.execution_options(
                    isolation_level="READ COMMITTED" if write else "REPEATABLE READ",
                    postgresql_readonly=not write,
                )
                if tenant is not None:
                    connection.execute(
                        text("SELECT set_config('filigrane.tenant', :tenant, true)"),
                        {"tenant": tenant},
                    )
            try:
                yield connection
                if self.dialect == "sqlite":
                    connection.exec_driver_sql("COMMIT")
                connection.commit()
            except BaseException:
                if self.dialect == "sqlite":
                    # After some errors SQLite has ended the transaction by itself.
                    with contextlib.suppress(exc.SQLAlchemyError):
                        connection.exec_driver_sql("ROLLBACK")
                connection.rollback()
                raise


def lock_tenant(connection: Connection, tenant: str) -> int:
    """Wait for the turn to change a tenant's keys or log; its revision. NotFound without it."""
    query = select(tables.tenants.c.revision).where(tables.tenants.c.tenant == tenant)
    # No key changes, so that rows that refer to this one need not wait.
    revision = connection.scalar(query.with_for_update(key_share=True))
    if revision is None:
        raise NotFound(f"there is no tenant {tenant!r} here; make it first.")
    return int(revision)


def migrate(url: str, *, service_role: str | None = None) -> tuple[str | None, str]:
    """Bring the tables to this version's; the revisions before (None: empty) and after.

    url: on PostgreSQL of the role that owns the tables. service_role: the role by which the service
    connects there; it is given what it needs and no more. All in one transaction. Raises
    StoreError.
    """
    from alembic import command
    from alembic.config import Config

    if service_role is not None and not _ROLE.fullmatch(service_role):
        raise StoreError("a role's name is a-z 0-9 _, the first no digit.")
    engine = _engine(url, must_exist=False)
    try:
        with _plain_errors(engine.url), engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            before = _revision(connection)
            if before is not None and before not in tables.REVISIONS:
                raise _newer(before)
            config = Config()
            config.set_main_option("script_location", "filigrane.store:migrations")
            config.attributes["connection"] = connection
            command.upgrade(config, tables.HEAD)
            if service_role is not None and engine.dialect.name == "postgresql":
                _grant(connection, service_role)
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql("COMMIT")
            connection.commit()
    finally:
        engine.dispose()
    return before, tables.HEAD


def _engine(url: str, *, must_exist: bool) -> Engine:
    try:
        parsed = make_url(url)
    except exc.ArgumentError:
        raise StoreError(
            "this is not the address of a database; write sqlite:////path/to/file.db or "
            "postgresql://user@host/name."
        ) from None
    family = parsed.drivername.partition("+")[0]
    if family not in _DIALECTS:
        raise StoreError(f"{family!r} is no database of filigrane's; use sqlite or postgresql.")
    parsed = parsed.set(drivername=_DIALECTS[family])
    try:
        if family == "sqlite":
            return _sqlite(parsed, must_exist)
        return create_engine(
            parsed,
            hide_parameters=True,
            pool_pre_ping=True,
            pool_size=8,
            max_overflow=24,
            pool_timeout=10,
            connect_args={"connect_timeout": _CONNECT_S, "options": _POSTGRES_OPTIONS},
        )
    except ModuleNotFoundError:
        raise MissingDependency(
            "PostgreSQL needs psycopg: pip install 'filigrane[service]'."
        ) from None


def _sqlite(url: URL, must_exist: bool) -> Engine:
    path = url.database
    if not path or path == ":memory:":
        raise StoreError("name a file: sqlite:////path/to/file.db; one in memory is lost.")
    if not os.path.exists(path):
        if must_exist:
            raise StoreError(f"{path} does not exist; make it with `filigrane keys migrate`.")
        try:
            with new_file(path):
                pass  # empty: SQLite fills it
        except OSError as error:
            raise StoreError(f"{path}: {why_not(error)}.") from None
    else:
        exposed = open_to_others(path, os.stat(path))
        if exposed is not None:
            raise StoreError(f"{path}: {exposed}.")
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": _BUSY_S})

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        # Transactions begin and end where this module says, not where the driver guesses.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}").close()
        # A key operation that was answered is on the disk.
        connection.execute("PRAGMA synchronous=FULL").close()

    return engine


def _revision(connection: Connection) -> str | None:
    """The migration that a database is at; None if it is empty."""
    names = set(connection.dialect.get_table_names(connection))
    if "alembic_version" not in names:
        return None
    found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return None if found is None else str(found)


def _newer(revision: str) -> StoreVersionError:
    return StoreVersionError(
        f"the database has tables of a newer filigrane ({revision}; this one knows "
        f"{tables.HEAD}): use a newer filigrane."
    )


def _require_schema(connection: Connection) -> None:
    revision = _revision(connection)
    if revision == tables.HEAD:
        return
    if revision is not None and revision not in tables.REVISIONS:
        raise _newer(revision)
    was = "no tables yet" if revision is None else f"tables of an older filigrane ({revision})"
    raise StoreVersionError(f"the database has {was}: run `filigrane keys migrate`.")


def _require_humble(connection: Connection) -> None:
    """A superuser, or a role with BYPASSRLS, reads every tenant; an owner drops the triggers."""
    if connection.dialect.name != "postgresql":
        return
    row = connection.execute(
        text(
            "SELECT rolsuper OR rolbypassrls, EXISTS (SELECT 1 FROM pg_class "
            "WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r' "
            "AND pg_has_role(relowner, 'USAGE')) FROM pg_roles WHERE rolname = current_user"
        )
    ).one()
    if row[0] or row[1]:
        raise StoreError(
            "this role of PostgreSQL is a superuser, has BYPASSRLS or owns the tables, so tenants "
            "would not be kept apart; connect with the role that `filigrane keys migrate "
            "--service-role` prepared."
        )


def _grant(connection: Connection, role: str) -> None:
    exists = connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role})
    if not exists:
        raise StoreError(
            f"there is no role {role}; make it first: CREATE ROLE {role} LOGIN PASSWORD '...'."
        )
    schema = connection.scalar(text("SELECT quote_ident(current_schema())"))
    connection.exec_driver_sql(f'GRANT USAGE ON SCHEMA {schema} TO "{role}"')
    connection.exec_driver_sql(f'GRANT SELECT ON alembic_version TO "{role}"')
    for name in tables.metadata.tables:
        allowed = "SELECT, INSERT"
        if name in tables.CHANGES:
            allowed += f", UPDATE ({', '.join(tables.CHANGES[name])})"
        if name in ("jobs", "items"):
            allowed += ", DELETE"
        connection.exec_driver_sql(f'REVOKE ALL ON {name} FROM "{role}"')
        connection.exec_driver_sql(f'GRANT {allowed} ON {name} TO "{role}"')


def _shown(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return f"sqlite {url.database}"
    return f"postgresql {url.database} on {url.host or 'this machine'}"


@contextlib.contextmanager
def _plain_errors(url: URL) -> Iterator[None]:
    """Database errors in words of ours: theirs repeat statements, values and addresses."""
    try:
        yield
    except exc.IntegrityError as error:
        raise _refused(error) from None
    except exc.SQLAlchemyError as error:
        kind, reason = _reason(error, url.username)
        raise kind(f"{_shown(url)}: {reason}") from None


def _refused(error: exc.IntegrityError) -> AlreadyExists | StoreError:
    name = type(error.orig).__name__
    said = str(error.orig)
    if name == "UniqueViolation" or "UNIQUE constraint failed" in said:
        return AlreadyExists(
            "this name or number is taken, perhaps since a moment ago; nothing was changed. Look "
            "what is there, then try again."
        )
    if "append-only" in said:
        return StoreError("the audit log is append-only; nothing was changed.")
    return StoreError("the database refused a row that contradicts the others; nothing changed.")


_Meaning = tuple[type[StoreError], str]

_STALE: Final[_Meaning] = (
    StoreVersionError,
    "the tables are not this version's: run `filigrane keys migrate`, or restore a backup",
)
_FULL: Final[_Meaning] = (
    StoreFull,
    "the disk is full, there is no room left; nothing was changed. Free some.",
)
_BUSY: Final[_Meaning] = (StoreUnavailable, "somebody else has been writing for 10 s; try again.")
_RACE: Final[_Meaning] = (
    StoreUnavailable,
    "others changed the same at the same time; try again.",
)
_DAMAGED: Final[_Meaning] = (StoreDamaged, "it is damaged; restore it from a backup.")
_DENIED: Final[_Meaning] = (
    StoreError,
    "{role} may not do that: run `filigrane keys migrate --service-role {name}` with the settings "
    "of the role that owns the tables",
)

_PHRASES: Final[dict[str, _Meaning]] = {
    "database or disk is full": _FULL,
    "No space left": _FULL,
    "database is locked": _BUSY,
    "readonly database": (
        StoreReadOnly,
        "it is read-only; check the permissions of the file and its folder.",
    ),
    "append-only": (StoreError, "the audit log is append-only; nothing was changed."),
    "row-level security": (StoreError, "row-level security refused this; nothing was changed."),
    "unable to open database file": (
        StoreError,
        "the file cannot be opened; check its path and permissions.",
    ),
    "not a database": (StoreDamaged, "the file is not a database of SQLite."),
    "malformed": (StoreDamaged, "the file is damaged; restore it from a backup."),
    "disk I/O error": (
        StoreError,
        "the disk does not answer as it should; nothing was changed.",
    ),
    "password authentication failed": (
        StoreError,
        "the role or its password is not accepted.",
    ),
    "no password supplied": (StoreError, "the role needs a password."),
    "no such table": _STALE,
    "no such column": _STALE,
    "has no column named": _STALE,
    "does not exist": (StoreError, "there is no such database or role."),
    "permission denied": _DENIED,
}
"""What databases say -> what to tell. Their words may hold values, so only ours are passed on."""

_STATES: Final[dict[str, _Meaning]] = {
    "42501": _DENIED,
    "42P01": _STALE,
    "42703": _STALE,
    "42883": _STALE,
    "3F000": _STALE,
    "53100": _FULL,
    "53300": (StoreUnavailable, "it has too many connections; try again later."),
    "55P03": _BUSY,
    "57014": (StoreUnavailable, "it took longer than 60 s; nothing was changed."),
    "25006": (StoreReadOnly, "it is read-only; nothing was changed."),
    "40001": _RACE,
    "40P01": _RACE,
    "58030": (StoreError, "its disk does not answer as it should; nothing was changed."),
    "XX001": _DAMAGED,
    "XX002": _DAMAGED,
}
"""SQLSTATE of PostgreSQL -> what to tell; where no stop ends it, the code is told, too."""


def _reason(error: exc.SQLAlchemyError, user: str | None) -> _Meaning:
    if isinstance(error, exc.TimeoutError):
        return StoreUnavailable, "all connections have been busy for 10 s; try again."
    own = getattr(error, "orig", None) or error
    said, name = str(own), type(own).__name__
    state = getattr(own, "sqlstate", None)
    named = {
        "role": "this role" if user is None else f"the role {user}",
        "name": user or "ROLE",
    }
    if "row-level security" not in said and "append-only" not in said and state in _STATES:
        kind, meaning = _STATES[state]
        meaning = meaning.format(**named)
        return kind, meaning if meaning.endswith(".") else f"{meaning} ({name}, {state})."
    if state is None or state == "42501" or state[:2] not in ("08", "57"):
        for phrase, (kind, meaning) in _PHRASES.items():
            if phrase in said:
                return kind, meaning.format(**named).removesuffix(".") + "."
    # Of what has a code, only lost connections and a server that is stopped heal by themselves.
    code = state or getattr(own, "sqlite_errorname", None)
    if code is None or code[:2] in ("08", "57"):
        if isinstance(error, exc.OperationalError | exc.InterfaceError):
            return (
                StoreUnavailable,
                "it does not answer; nothing was changed. See whether it runs, then try again.",
            )
        return StoreError, f"it refused, and trying again does not help ({name})."
    return StoreError, f"it refused, and trying again does not help ({name}, {code})."
