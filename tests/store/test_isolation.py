"""Nothing under one tenant changes or learns anything of another; the log is only appended to."""

import contextlib
import json
import random
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import create_engine, text

import pgkit
import storekit
from filigrane.custody.hierarchy import KeySpec
from filigrane.errors import FiligraneError, NotFound, StoreError
from filigrane.kms.local import LocalRoot
from filigrane.store import tables
from filigrane.store.records import Role


def spec(tenant: str, name: str = "chat") -> KeySpec:
    return KeySpec(tenant=tenant, name=name, model="m", scheme="gumbel", slots=1)


def fill(store: storekit.Opened, tenant: str) -> None:
    """At least one row in every table."""
    book, access = store.keybook, store.access
    if tenant not in book.tenants():
        book.create_tenant(tenant, actor="operator")
    access.enrol_engine(tenant, "one", ["m"], storekit.identity(), actor="ann")
    record = book.create(spec(tenant), actor="ann")
    proof = storekit.marked(book.key_of(record), record.spec, 1)
    book.acknowledge(tenant, "one", record.id, proof)
    book.promote(tenant, "chat", 1, actor="ann")
    access.issue_token(tenant, "ann", [Role.AUDITOR], actor="operator")
    store.approved(tenant, record.id)
    store.log.checkpoint(tenant)
    store.jobs.create(tenant, "ann", [b"x", b"y"])


# What A sees does not depend on B.


class Seeded:
    """Stands in for `secrets` so that two runs can be compared byte for byte."""

    def __init__(self) -> None:
        self.rng = random.Random(0)

    def token_bytes(self, count: int = 32) -> bytes:
        return self.rng.randbytes(count)

    def token_hex(self, count: int = 32) -> str:
        return self.rng.randbytes(count).hex()

    def choice(self, options: str) -> str:
        return self.rng.choice(options)


def life_of_a(store: storekit.Opened, tokens: list[str]) -> list[Callable[[], object]]:
    book, access, log, jobs = store.keybook, store.access, store.log, store.jobs
    chat = spec("a")

    def proof() -> object:
        record = book.version("a", "a.chat@1")
        text = storekit.marked(book.key_of(record), record.spec, 3)
        return book.acknowledge("a", "one", record.id, text)

    def token() -> object:
        tokens.append(access.issue_token("a", "ann", [Role.AUDITOR], actor="ann"))
        return access.authenticate(tokens[-1])

    return [
        lambda: book.create_tenant("a", actor="operator"),
        lambda: book.create(chat, actor="ann"),
        lambda: access.enrol_engine("a", "one", ["m"], {**_IDENTITY}, actor="ann"),
        proof,
        lambda: book.promote("a", "chat", 1, actor="ann"),
        lambda: book.rotate("a", "chat", actor="ann"),
        lambda: book.for_engine("a", "one"),
        token,
        lambda: store.approved("a", "a.chat@2"),
        lambda: [(job.id, job.n_done) for job in jobs.jobs("a")],
        lambda: jobs.create("a", "ann", [b"1"]),
        lambda: log.checkpoint("a"),
        lambda: book.keys("a"),
        lambda: log.records("a"),
        lambda: log.inclusion("a", 2, 5),
        lambda: (access.tokens("a"), access.engines("a"), access.approvals("a")),
        lambda: book.revision("a"),
        lambda: json.loads(book.export_archive("a")),
    ]


_IDENTITY = storekit.identity()


def acts_of_b(store: storekit.Opened, dice: random.Random) -> None:
    """One thing that B may do, or fail at; some of it names what is A's."""
    book, access = store.keybook, store.access
    acts: list[Callable[[], object]] = [
        lambda: book.create_tenant("b", actor="operator"),
        lambda: book.create(spec("b"), actor="ann"),
        lambda: book.create(spec("b", "other"), actor="ann", request_id="r"),
        lambda: book.rotate("b", "chat", actor="ann"),
        lambda: book.promote("b", "chat", dice.randint(1, 3), actor="ann"),
        lambda: book.retire("b", "chat", dice.randint(1, 3), actor="ann"),
        lambda: access.enrol_engine("b", "one", ["m"], storekit.identity(), actor="ann"),
        lambda: access.revoke_engine("b", "one", actor="ann"),
        lambda: access.issue_token("b", "ann", [Role.KEY_ADMIN], actor="ann"),
        lambda: store.jobs.create("b", "ann", [b"x"] * 3),
        lambda: store.jobs.cancel("b", store.jobs.jobs("b")[0].id),
        lambda: store.log.checkpoint("b"),
        lambda: book.version("b", "a.chat@1"),
        lambda: store.log.append("b", "ann", "a.note", {"about": "a.chat@1"}),
        lambda: book.export_archive("b"),
    ]
    with contextlib.suppress(FiligraneError, IndexError):
        dice.choice(acts)()


def transcript(
    store: storekit.Opened, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> list[str]:
    seeded, dice = Seeded(), random.Random(seed)
    for name in ("token_bytes", "token_hex", "choice"):
        monkeypatch.setattr(secrets, name, getattr(seeded, name))
    said = []
    for number, act in enumerate(life_of_a(store, [])):
        if seed is not None:
            for _ in range(dice.randint(0, 4)):
                acts_of_b(store, dice)
        seeded.rng = random.Random(number)
        store.clock.at = storekit.Ticking().at.replace(day=2, hour=number)
        said.append(_plain(act()))
    monkeypatch.undo()
    return said


def _plain(answer: object) -> str:
    if isinstance(answer, dict):
        return json.dumps(answer, sort_keys=True)
    return repr(answer)


@pytest.mark.parametrize("seed", range(3))
def test_answers_for_one_tenant_do_not_depend_on_others(
    stores: storekit.Stores, kms: LocalRoot, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    alone = transcript(stores.fresh(kms), monkeypatch, None)
    crowded = stores.fresh(kms)
    assert transcript(crowded, monkeypatch, seed) == alone
    if "b" in crowded.keybook.tenants():
        crowded.verify("b")


def test_ids_of_others_are_not_found(store: storekit.Opened) -> None:
    fill(store, "other")
    other = store.keybook.version("other", "other.chat@1")
    job = store.jobs.jobs("other")[0].id
    token = store.access.tokens("other")[0].id
    approval = store.access.approvals("other")[0].id
    refused: list[Callable[[], object]] = [
        lambda: store.keybook.version("acme", other.id),
        lambda: store.keybook.acknowledge("acme", "one", other.id, None),  # type: ignore[arg-type]
        lambda: store.keybook.rotate("acme", "chat", actor="x"),
        lambda: store.keybook.for_engine("acme", "one"),
        lambda: store.jobs.results("acme", job),
        lambda: store.jobs.cancel("acme", job),
        lambda: store.jobs.forget("acme", job),
        lambda: store.access.revoke_token("acme", token, actor="x"),
        lambda: store.access.approval("acme", approval),
        lambda: store.access.engine("acme", "one"),
    ]
    for act in refused:
        with pytest.raises(NotFound):
            act()
    # A token of one tenant with the name of another in it.
    shown = store.access.issue_token("other", "eve", [Role.AUDITOR], actor="x")
    with pytest.raises(NotFound):
        store.access.authenticate(shown.replace("fgt_other_", "fgt_acme_"))


# A hostile statement under row-level security.


@pytest.fixture(scope="module")
def hostile(
    cluster: pgkit.Cluster, kms: LocalRoot, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pgkit.Urls]:
    with storekit.stores(tmp_path_factory.mktemp("hostile"), cluster) as made:
        store = made.fresh(kms)
        for tenant in ("acme", "other"):
            fill(store, tenant)
        store.database.close()
        yield cluster.urls(store.url.rpartition("/")[2])


NAMES = sorted(tables.metadata.tables)


@contextlib.contextmanager
def session(url: str, tenant: str | None) -> Iterator["psycopg.Connection[tuple[object, ...]]"]:
    with psycopg.connect(url) as connection:
        if tenant is not None:
            connection.execute("SELECT set_config('filigrane.tenant', %s, false)", (tenant,))
            connection.commit()
        yield connection
        connection.rollback()


def try_it(
    connection: "psycopg.Connection[tuple[object, ...]]", statement: str
) -> int | type[Exception]:
    """Rows that a statement reached, or the error that it met."""
    try:
        with connection.transaction(force_rollback=True):
            return connection.execute(statement.encode()).rowcount
    except psycopg.Error as error:
        return type(error)


@pytest.mark.parametrize("table", NAMES)
@pytest.mark.parametrize("tenant", ["acme", None, ""])
def test_hostile_sql(hostile: pgkit.Urls, table: str, tenant: str | None) -> None:
    refusals = (psycopg.errors.InsufficientPrivilege,)
    with session(hostile.superuser, None) as every:
        rows = every.execute(f"SELECT tenant FROM {table}".encode()).fetchall()
        assert {row[0] for row in rows} == {"acme", "other"}
    with session(hostile.app, tenant) as connection:
        seen = connection.execute(f"SELECT DISTINCT tenant FROM {table}".encode()).fetchall()
        assert seen == ([("acme",)] if tenant else [])
        for condition in ("tenant = 'other'", "tenant <> 'acme'", "true OR tenant = 'other'"):
            reached = try_it(connection, f"SELECT 1 FROM {table} WHERE {condition}")
            own = condition.startswith("true") and tenant
            assert isinstance(reached, int) and (reached > 0) == bool(own)
            for verb in (f"UPDATE {table} SET tenant = 'other'", f"DELETE FROM {table}"):
                reached = try_it(connection, f"{verb} WHERE {condition}")
                assert reached in ((*refusals, 0) if not own else refusals) or (
                    verb.startswith("DELETE") and own and table in ("jobs", "items")
                )
        # A row of another's, and one's own row given to another.
        columns = ", ".join(c.name for c in tables.metadata.tables[table].columns)
        others = columns.replace("tenant", "'other'", 1)
        assert try_it(connection, f"INSERT INTO {table} SELECT {others} FROM {table}") in (
            (0,) if not tenant else refusals
        )
        values = ", ".join(
            "'other'" if c.name == "tenant" else ("1" if "INT" in str(c.type) else "'x'")
            for c in tables.metadata.tables[table].columns
        )
        assert try_it(connection, f"INSERT INTO {table} VALUES ({values})") in refusals
        assert try_it(connection, f"TRUNCATE {table} CASCADE") in refusals
        for statement in (
            f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
            f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY",
            f"DROP POLICY own_tenant ON {table}",
            f"ALTER TABLE {table} DISABLE TRIGGER ALL",
            f"DROP TABLE {table} CASCADE",
            f"CREATE TABLE copy AS SELECT * FROM {table}",
            "SET ROLE filigrane_owner",
            "SET ROLE postgres",
            "SET session_replication_role = replica",
        ):
            assert try_it(connection, statement) in refusals, statement
        connection.execute("SET row_security = off")
        assert try_it(connection, f"SELECT 1 FROM {table}") in refusals


def test_what_the_service_may_change(hostile: pgkit.Urls) -> None:
    """Commitments, digests, names and dates stay as they were written, whatever it says."""
    fixed = {
        "versions": ("commitment", "log_index", "root_version", "created_at", "number", "name"),
        "tokens": ("digest", "roles", "name", "expires_at"),
        "engines": ("public_key", "models"),
        "approvals": ("subject", "kind", "requested_by", "requested_token", "expires_at"),
        "keys": ("scheme", "model", "slots"),
        "acknowledgements": ("engine", "at"),
    }
    with session(hostile.app, "acme") as connection:
        for table, columns in fixed.items():
            for column in columns:
                reached = try_it(connection, f"UPDATE {table} SET {column} = {column}")
                assert reached is psycopg.errors.InsufficientPrivilege, (table, column)
        for table, changing in tables.CHANGES.items():
            changes = ", ".join(f"{column} = {column}" for column in changing)
            assert try_it(connection, f"UPDATE {table} SET {changes}") in (1, 2), table


def test_operators_see_names_alone(hostile: pgkit.Urls) -> None:
    with session(hostile.app, None) as connection:
        connection.execute("SELECT set_config('filigrane.operator', 'on', false)")
        connection.commit()
        for table in NAMES:
            reached = try_it(connection, f"SELECT 1 FROM {table}")
            assert reached == (2 if table == "tenants" else 0)
        assert try_it(connection, "UPDATE tenants SET revision = 0") == 0


def test_a_tenant_does_not_stay_on_a_connection(
    cluster: pgkit.Cluster, kms: LocalRoot, tmp_path: Path
) -> None:
    with storekit.stores(tmp_path, cluster) as made:
        store = made.fresh(kms)
        fill(store, "acme")
        with store.database._transaction(None, write=False) as connection:
            assert connection.scalar(text("SELECT count(*) FROM log")) == 0
            found = connection.scalar(text("SELECT current_setting('filigrane.tenant', true)"))
            assert not found


# The log is append-only, whoever asks.


@pytest.mark.parametrize("table", tables.APPEND_ONLY)
def test_append_only(
    stores: storekit.Stores, kms: LocalRoot, cluster: pgkit.Cluster, table: str
) -> None:
    store = stores.fresh(kms)
    fill(store, "acme")
    number = {"log": "position", "checkpoints": "size"}[table]
    statements = [f"UPDATE {table} SET at = 'x'", f"DELETE FROM {table}"]
    if stores.dialect == "sqlite":
        columns = ", ".join(c.name for c in tables.metadata.tables[table].columns)
        changed = columns.replace("at,", "'x',")
        statements += [
            f"INSERT OR REPLACE INTO {table} ({columns}) SELECT {changed} FROM {table}",
            f"UPDATE OR REPLACE {table} SET {number} = {number} + 1",
        ]
        connections = [store.url]
    else:
        statements += [f"TRUNCATE {table} CASCADE"]
        urls = cluster.urls(store.url.rpartition("/")[2])
        # The owner and a superuser meet the triggers; the service is not even allowed to try.
        connections = [urls.app, urls.owner, urls.superuser]
    before = store.log.records("acme")
    for url in connections:
        engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        for statement in statements:
            with engine.connect() as connection:
                if stores.dialect == "postgresql":
                    connection.execute(text("SELECT set_config('filigrane.tenant', 'acme', false)"))
                with pytest.raises(sqlalchemy.exc.DBAPIError, match=r"append-only|denied"):
                    connection.execute(text(statement))
        engine.dispose()
    assert store.log.records("acme") == before
    with (
        pytest.raises(StoreError, match=r"append-only|may not do that"),
        store.database.tenant("acme") as connection,
    ):
        connection.execute(text(f"DELETE FROM {table}"))
    store.verify("acme")
