"""The log in the database: chained, signed, proved, exported, and noticed when altered."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, create_engine, text

import storekit
from filigrane.custody import chain, merkle
from filigrane.custody.chain import Record
from filigrane.custody.checkpoints import verify_checkpoint
from filigrane.custody.verification import read_lines, verify_log
from filigrane.errors import AuditError, NotFound, StoreError


def lines(store: storekit.Opened) -> list[dict[str, object]]:
    out = io.BytesIO()
    store.log.export("acme", out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_records_and_checkpoints(store: storekit.Opened) -> None:
    log = store.log
    assert log.latest("acme") is None
    for number in range(5):
        index = log.append("acme", "ann", "a.note", {"number": number})
        assert index == number + 1
    assert [r.facts.get("number") for r in log.records("acme", 2, 4)] == [1, 2]
    first = log.checkpoint("acme")
    assert first.size == 6 and first.key_id == f"log-{max(store.kms.versions())}"
    assert log.checkpoint("acme") == first == log.latest("acme")
    store.kms.rotate()
    log.append("acme", "ann", "a.note", {"number": 5})
    second = log.checkpoint("acme")
    assert second.key_id == f"log-{max(store.kms.versions())}" and second.size == 7
    jwks = log.jwks()
    for point in (first, second):
        verify_checkpoint(point, jwks)
    assert all("d" not in key for key in jwks["keys"])
    written = [line for line in lines(store) if "record" in line]
    for index, line in enumerate(written):
        proof = [bytes.fromhex(part) for part in log.inclusion("acme", index, 7)]
        leaf = bytes.fromhex(str(line["hash"]))
        merkle.verify_inclusion(leaf, index, 7, proof, bytes.fromhex(second.root))
    parts = [bytes.fromhex(part) for part in log.consistency("acme", 6, 7)]
    roots = [bytes.fromhex(point.root) for point in (first, second)]
    merkle.verify_consistency(6, roots[0], 7, roots[1], parts)
    with pytest.raises(AuditError):
        log.inclusion("acme", 7, 7)
    with pytest.raises(AuditError):
        log.inclusion("acme", 0, 8)
    for act in (log.records, log.checkpoint, log.latest, log.size):
        with pytest.raises(NotFound):
            act("nobody")
    report = store.verify("acme")
    assert (report.n_records, report.n_checkpoints, report.n_covered) == (7, 2, 7)
    # Another process, with another cache, says the same.
    other = store.again()
    assert other.log.checkpoint("acme") == second
    other.database.close()


def test_facts_that_cannot_be_logged(store: storekit.Opened) -> None:
    size = store.log.size("acme")
    for facts in ({"score": 0.5}, {"Bad": 1}, {"nested": {"a": 1}}):
        with pytest.raises(AuditError):
            store.log.append("acme", "ann", "a.note", facts)  # type: ignore[arg-type]
    with pytest.raises(AuditError):
        store.log.append("acme", "", "a.note", {})
    with pytest.raises(NotFound):
        store.log.append("nobody", "ann", "a.note", {})
    assert store.log.size("acme") == size


def test_a_transaction_takes_its_records_with_it(store: storekit.Opened) -> None:
    size = store.log.size("acme")
    with pytest.raises(ZeroDivisionError), store.database.tenant("acme") as connection:
        store.log.append("acme", "ann", "a.note", {}, connection=connection)
        assert store.log.size("acme") == size or store.database.dialect == "sqlite"
        _ = 1 / 0
    assert store.log.size("acme") == size
    with store.database.tenant("acme") as connection:
        for _ in range(2):
            store.log.append("acme", "ann", "a.note", {}, connection=connection)
    assert store.log.size("acme") == size + 2
    store.verify("acme")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE log SET actor = 'eve' WHERE position = 3",
        "UPDATE log SET facts = '{\"number\":9}' WHERE position = 3",
        "UPDATE log SET at = '2020-01-01T00:00:00.000Z' WHERE position = 0",
        "DELETE FROM log WHERE position = 3",
        "DELETE FROM log WHERE position >= 3",
        "UPDATE log SET hash = (SELECT hash FROM log WHERE position = 1) WHERE position = 3",
    ],
)
def test_what_was_altered_is_not_signed(
    stores: storekit.Stores, store: storekit.Opened, statement: str
) -> None:
    for number in range(5):
        store.log.append("acme", "ann", "a.note", {"number": number})
    kept = store.log.checkpoint("acme")
    with behind(stores, store) as connection:
        connection.exec_driver_sql(statement)
    fresh = store.again()
    with pytest.raises(AuditError):
        verify_log(read_lines(_exported(fresh)), fresh.log.jwks(), kept)
    fresh.log.append("acme", "ann", "a.note", {})
    cut = "position >= 3" in statement
    with pytest.raises(AuditError, match="was cut off" if cut else "altered or removed"):
        fresh.log.checkpoint("acme")
    with pytest.raises(AuditError):
        verify_log(read_lines(_exported(fresh)), fresh.log.jwks(), kept)
    fresh.database.close()


@contextmanager
def behind(stores: storekit.Stores, store: storekit.Opened) -> Iterator[Connection]:
    """A database administrator's connection, who has taken the triggers away."""
    owner = store.url if stores.dialect == "sqlite" else stores.owner_of(store.url)
    engine = create_engine(owner.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        if stores.dialect == "sqlite":
            for table in ("log", "checkpoints"):
                for verb in ("update", "delete"):
                    connection.execute(text(f"DROP TRIGGER {table}_no_{verb}"))
        else:
            connection.execute(text("SELECT set_config('filigrane.tenant', 'acme', true)"))
            connection.execute(text("SET session_replication_role = replica"))
        yield connection
    engine.dispose()


def rewrite(connection: Connection) -> None:
    """Put eve in ann's place and make the chain anew: it has no key."""
    previous = chain.genesis("acme")
    query = "SELECT position, at, actor, kind, facts FROM log ORDER BY position"
    for position, at, actor, kind, facts in connection.execute(text(query)).all():
        name = "eve" if actor == "ann" else actor
        record = Record(
            tenant="acme", index=position, at=at, actor=name, kind=kind, facts=json.loads(facts)
        )
        previous = chain.link(previous, record)
        connection.execute(
            text("UPDATE log SET actor = :actor, hash = :hash WHERE position = :position"),
            {"actor": name, "hash": previous, "position": position},
        )


@pytest.mark.parametrize("how", ["records", "checkpoint too", "cut", "moved"])
def test_nothing_is_signed_that_contradicts_what_was_signed(
    stores: storekit.Stores, store: storekit.Opened, how: str
) -> None:
    for number in range(4):
        store.log.append("acme", "ann", "a.note", {"number": number})
    store.log.checkpoint("acme")
    store.log.append("acme", "ann", "a.note", {"number": 4})
    with behind(stores, store) as connection:
        if how == "cut":
            connection.execute(text("DELETE FROM log WHERE position >= 3"))
        elif how == "moved":
            connection.execute(text("UPDATE checkpoints SET size = 6"))
        else:
            rewrite(connection)
            if how == "checkpoint too":
                # The administrator has no key to sign it with.
                made = connection.execute(text("SELECT hash FROM log ORDER BY position"))
                leaves = [bytes(row[0]) for row in made][:5]
                new = {"root": merkle.root(leaves).hex(), "head": leaves[-1].hex()}
                connection.execute(text("UPDATE checkpoints SET root = :root, head = :head"), new)
    fresh = store.again()
    fresh.log.check()
    said = {"records": "written anew", "cut": "was cut off"}.get(how, "not signed by")
    fresh.log.append("acme", "bob", "a.note", {})
    for act in (fresh.log.checkpoint, fresh.log.verify):
        with pytest.raises(AuditError, match=said):
            act("acme")
    with pytest.raises(AuditError):
        fresh.log.inclusion("acme", 0, 2)
    with pytest.raises(AuditError, match=said):
        fresh.log.check()
    fresh.database.close()


def test_a_process_that_has_the_log_in_memory_sees_new_checkpoints(
    stores: storekit.Stores, store: storekit.Opened
) -> None:
    store.log.append("acme", "ann", "a.note", {})
    store.log.verify("acme")
    store.again().log.append("acme", "ann", "a.note", {})
    store.again().log.checkpoint("acme")
    store.log.verify("acme")
    with behind(stores, store) as connection:
        connection.execute(text("UPDATE checkpoints SET at = '2020-01-01T00:00:00.000Z'"))
    with pytest.raises(AuditError, match="not signed by"):
        store.log.verify("acme")


def test_an_export_is_signed_to_its_end(store: storekit.Opened) -> None:
    log = store.log
    log.checkpoint("acme")
    for number in range(3):
        log.append("acme", "ann", "a.note", {"number": number})
    held = lines(store)
    assert held[-1]["checkpoint"] == (point := log.latest("acme")).to_json()  # type: ignore[union-attr]
    assert point is not None and point.size == 4 == log.size("acme")
    # Nothing is new: nothing is signed.
    assert lines(store) == held
    report = store.verify("acme")
    assert (report.n_records, report.n_checkpoints, report.n_covered) == (4, 2, 4)


def test_positions_have_no_gaps(store: storekit.Opened) -> None:
    """Whoever may only add could otherwise end a log: nothing follows the last position."""
    copy = (
        "INSERT INTO log SELECT tenant, {}, at, actor, kind, facts, hash FROM log "
        "WHERE position = 0"
    )
    for position in (2, 1_000_000, 2**31 - 1, -1):
        with pytest.raises(StoreError), store.database.tenant("acme") as connection:
            connection.execute(text(copy.format(position)))
    assert store.log.size("acme") == 1
    with store.database.tenant("acme") as connection:
        connection.execute(text(copy.format(1)))


def _exported(store: storekit.Opened) -> io.BytesIO:
    out = io.BytesIO()
    store.log.export("acme", out)
    out.seek(0)
    return out
