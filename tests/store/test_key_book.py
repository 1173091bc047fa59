"""The key book, rule by rule; random lives of keys are in test_sequences."""

import dataclasses
from datetime import timedelta

import numpy as np
import pytest
from sqlalchemy import create_engine, text

import storekit
from filigrane.custody.hierarchy import KeySpec, imported_commitment
from filigrane.custody.states import State
from filigrane.errors import (
    AlreadyExists,
    AuditError,
    KeyFormatError,
    NotFound,
    StateError,
    StoreDamaged,
    StoreError,
)
from filigrane.foreign import ForeignKey, KeyForm
from filigrane.keys import Key, _Secret
from filigrane.kms.local import LocalRoot
from filigrane.store import checking
from filigrane.store.database import stamp

CHAT = KeySpec(tenant="acme", name="chat", model="small", scheme="gumbel", slots=2)
VLLM = KeySpec(tenant="acme", name="vllm", model="small", profile="vllm-gumbel")
OLD = KeySpec(tenant="acme", name="old", model="small", profile="vllm-gumbel", source="imported")


def enrol(store: storekit.Opened, name: str = "one", *models: str) -> None:
    store.access.enrol_engine("acme", name, models or ("small",), storekit.identity(), actor="ann")


def proof(
    store: storekit.Opened, id: str, seed: int = 1
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    record = store.keybook.version("acme", id)
    return storekit.marked(store.keybook.key_of(record), record.spec, seed)


def by_hand(stores: storekit.Stores, store: storekit.Opened, statement: str) -> None:
    """What a database administrator could do."""
    owner = store.url if stores.dialect == "sqlite" else stores.owner_of(store.url)
    engine = create_engine(owner.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        if store.database.dialect == "postgresql":
            connection.execute(text("SELECT set_config('filigrane.tenant', 'acme', true)"))
        connection.execute(text(statement))
    engine.dispose()


def test_a_life(store: storekit.Opened) -> None:
    book = store.keybook
    first = book.create(CHAT, actor="ann")
    assert (first.id, first.state, first.log_index) == ("acme.chat@1", State.PRE_ACTIVE, 1)
    record = store.log.records("acme")[first.log_index]
    assert record.kind == "key.create" and record.actor == "ann"
    assert record.facts["commitment"] == first.commitment
    enrol(store)
    enrol(store, "two")
    enrol(store, "elsewhere", "large")
    with pytest.raises(StateError, match="waits for the engines one, two"):
        book.promote("acme", "chat", 1, actor="ann")
    assert book.version("acme", first.id).waiting_for == ("one", "two")
    book.acknowledge("acme", "one", first.id, proof(store, first.id))
    store.access.revoke_engine("acme", "two", actor="ann")
    active = book.promote("acme", "chat", 1, actor="ann")
    assert active.state is State.ACTIVE and active.promoted_at is not None
    assert active.marks_on("one") and not active.marks_on("two")
    second = book.rotate("acme", "chat", actor="ann")
    assert [key.active for key in book.keys("acme")] == [active]
    book.acknowledge("acme", "one", second.id, proof(store, second.id))
    book.promote("acme", "chat", 2, actor="ann")
    assert book.version("acme", first.id).state is State.RETIRED
    assert [v.id for v in book.for_engine("acme", "one")] == [second.id]
    assert book.for_engine("acme", "elsewhere") == ()
    with pytest.raises(NotFound, match="revoked"):
        book.for_engine("acme", "two")
    # An engine that comes later does not mark before it has proved that it can.
    enrol(store, "three")
    latest = book.version("acme", second.id)
    assert latest.waiting_for == ("three",) and not latest.marks_on("three")
    report = store.verify("acme")
    kinds = [record.kind for record in store.log.records("acme")]
    assert report.n_records == len(kinds) and kinds.count("key.promote") == 2


def test_the_same_request_twice(store: storekit.Opened) -> None:
    book = store.keybook
    first = book.create(CHAT, actor="ann", request_id="r-1")
    size, revision = store.log.size("acme"), book.revision("acme")
    assert book.create(CHAT, actor="ann", request_id="r-1") == first
    assert (store.log.size("acme"), book.revision("acme")) == (size, revision)
    second = book.rotate("acme", "chat", actor="ann", request_id="r-2")
    assert book.rotate("acme", "chat", actor="ann", request_id="r-2") == second
    with pytest.raises(AlreadyExists, match="request id was used for something else"):
        book.rotate("acme", "chat", actor="ann", request_id="r-1")
    with pytest.raises(AlreadyExists, match="request id was used for something else"):
        book.create(VLLM, actor="ann", request_id="r-2")
    with pytest.raises(AlreadyExists, match="rotate it instead"):
        book.create(CHAT, actor="ann")
    with pytest.raises(AlreadyExists, match="tenant 'acme' already"):
        book.create_tenant("acme", actor="ann")
    with pytest.raises(KeyFormatError, match="request id"):
        book.rotate("acme", "chat", actor="ann", request_id="a b")
    assert len(book.keys("acme")) == 1


def test_names(store: storekit.Opened) -> None:
    book = store.keybook
    for id in ("acme.chat", "other.chat@1", "acme.chat@0", "acme.CHAT@1", "acme.chat@9", ""):
        with pytest.raises(NotFound):
            book.version("acme", id)
    with pytest.raises(KeyFormatError):
        book.keys("ACME")
    with pytest.raises(NotFound, match="no tenant 'nobody'"):
        book.keys("nobody")
    nobody = KeySpec(tenant="nobody", name="chat", model="m", scheme="gumbel")
    with pytest.raises(NotFound, match="no tenant 'nobody'"):
        book.create(nobody, actor="ann")
    with pytest.raises(NotFound, match="no such key"):
        book.rotate("acme", "chat", actor="ann")
    with pytest.raises(NotFound):
        book.revision("nobody")


def test_proofs(store: storekit.Opened) -> None:
    book = store.keybook
    first, other = book.create(CHAT, actor="ann"), book.create(VLLM, actor="ann")
    enrol(store)
    good = proof(store, first.id)
    noise = np.random.default_rng(0).integers(0, 64, 90)
    for wrong in (noise, proof(store, other.id), good[:8], good[:0]):
        with pytest.raises(StateError, match="does not carry the mark"):
            book.acknowledge("acme", "one", first.id, wrong)
    both = np.concatenate([good, proof(store, other.id)])
    with pytest.raises(StateError, match=r"also carries the mark of acme\.vllm@1"):
        book.acknowledge("acme", "one", first.id, both)
    with pytest.raises(StateError, match="at most"):
        book.acknowledge("acme", "one", first.id, np.zeros(100_001, dtype=np.int64))
    with pytest.raises(NotFound):
        book.acknowledge("acme", "nobody", first.id, good)
    enrol(store, "elsewhere", "large")
    with pytest.raises(StateError, match="which elsewhere lacks"):
        book.acknowledge("acme", "elsewhere", first.id, good)
    assert book.version("acme", first.id).acknowledged == ()
    revision = book.revision("acme")
    book.acknowledge("acme", "one", first.id, good)
    book.acknowledge("acme", "one", first.id, good)
    assert book.revision("acme") == revision + 1
    book.retire("acme", "chat", 1, actor="ann")
    with pytest.raises(StateError, match="nothing to acknowledge"):
        book.acknowledge("acme", "one", first.id, good)


def test_imported_keys(store: storekit.Opened) -> None:
    book = store.keybook
    numbers = ForeignKey.from_text("31337", KeyForm.UINT64, "shop")
    first = book.import_key(OLD, numbers, actor="ann")
    read = book.key_of(first)
    assert isinstance(read, ForeignKey)
    assert read.reveal() == (31337,) and read.name == "acme.old@1"
    # What is published of a key of few bits cannot be searched for.
    guess = imported_commitment(numbers, bytes(32))
    assert guess != first.commitment
    again = book.import_key(OLD, ForeignKey.from_text("7", KeyForm.UINT64), actor="ann")
    assert again.number == 2
    with pytest.raises(StateError, match="comes with import_key"):
        book.rotate("acme", "old", actor="ann")
    own = KeySpec(tenant="acme", name="own", model="m", scheme="gumbel", slots=4, source="imported")
    key = Key.generate("elsewhere", slots=4)
    kept = book.key_of(book.import_key(own, key, actor="ann"))
    assert isinstance(kept, Key) and kept.fingerprint == key.fingerprint
    assert (kept.name, kept.slots) == ("acme.own@1", 4)
    with pytest.raises(KeyFormatError, match="has 8 slots"):
        book.import_key(own, Key.generate("k"), actor="ann")
    with pytest.raises(KeyFormatError, match="not with a filigrane key"):
        book.import_key(OLD, key, actor="ann")
    with pytest.raises(KeyFormatError, match="filigrane key"):
        book.import_key(own, numbers, actor="ann")
    with pytest.raises(KeyFormatError, match="imported"):
        book.import_key(CHAT, key, actor="ann")
    with pytest.raises(KeyFormatError, match="import_key"):
        book.create(OLD, actor="ann")
    with pytest.raises(AlreadyExists, match="another model or mark"):
        other = KeySpec(
            tenant="acme", name="own", model="n", scheme="gumbel", slots=4, source="imported"
        )
        book.import_key(other, key, actor="ann")


def test_destroying_takes_two(store: storekit.Opened) -> None:
    book = store.keybook
    record = book.create(CHAT, actor="ann")
    with pytest.raises(NotFound, match="approval"):
        book.destroy("acme", "chat", 1, actor="ann", approval="none")
    book.create(dataclasses.replace(CHAT, name="other"), actor="ann")
    other = store.approved("acme", "acme.other@1")
    with pytest.raises(StateError, match=r"destroy acme\.other@1, nothing else"):
        book.destroy("acme", "chat", 1, actor="ann", approval=other)
    approval = store.approved("acme", record.id)
    with pytest.raises(StateError, match="the two people"):
        book.destroy("acme", "chat", 1, actor="eve", approval=approval)
    gone = book.destroy("acme", "chat", 1, actor="ann", approval=approval)
    assert gone.state is State.DESTROYED and gone.destroyed_at is not None
    with pytest.raises(NotFound, match="destroyed"):
        book.key_of(record)
    book.rotate("acme", "chat", actor="ann")
    with pytest.raises(StateError, match="is to destroy"):
        book.destroy("acme", "chat", 2, actor="ann", approval=approval)
    # An approval is not spent on what cannot be done.
    third = store.approved("acme", "acme.chat@2")
    book.promote("acme", "chat", 2, actor="ann")
    with pytest.raises(StateError, match="is active, from which it cannot become destroyed"):
        book.destroy("acme", "chat", 2, actor="ann", approval=third)
    assert store.access.approval("acme", third).used_at is None


def test_compromised_since(store: storekit.Opened) -> None:
    book = store.keybook
    book.create(CHAT, actor="ann")
    book.promote("acme", "chat", 1, actor="ann")
    now = store.clock()
    with pytest.raises(StateError, match="in the past"):
        book.compromise("acme", "chat", 1, since=now + timedelta(days=1), actor="ann")
    with pytest.raises(StateError, match="time zone"):
        book.compromise("acme", "chat", 1, since=now.replace(tzinfo=None), actor="ann")
    record = book.compromise("acme", "chat", 1, since=now, actor="ann")
    assert record.compromised_since == now and record.state is State.COMPROMISED
    # It turns out to be older; never younger, and that is for ever.
    revision, earlier = book.revision("acme"), now - timedelta(days=30)
    for since in (now, now + timedelta(seconds=1)):
        with pytest.raises(StateError, match="can only be moved back"):
            book.compromise("acme", "chat", 1, since=since, actor="ann")
    assert book.revision("acme") == revision
    moved = book.compromise("acme", "chat", 1, since=earlier, actor="ann")
    assert moved.compromised_since == earlier and book.revision("acme") == revision + 1
    said = [r.facts["since"] for r in store.log.records("acme") if r.kind == "key.compromise"]
    assert said == [stamp(now), stamp(earlier)]
    assert book.key_of(record) is not None


def test_calibration_stops_a_bad_key(
    store: storekit.Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = store.keybook
    book.create(CHAT, actor="ann")
    key = book.key_of(book.version("acme", "acme.chat@1"))
    # Texts that are marked with the key stand for a key that finds marks everywhere.
    texts = [*checking._null_texts(2**15)[1:], storekit.marked(key, CHAT, 5)]
    monkeypatch.setattr(checking, "_null_texts", lambda _: texts)
    with pytest.raises(StateError, match="failed its calibration"):
        book.promote("acme", "chat", 1, actor="ann")
    assert book.version("acme", "acme.chat@1").state is State.PRE_ACTIVE


@pytest.mark.parametrize(
    "tag",
    [
        {"scheme": "gumbel"},
        {"scheme": "greenlist:context_width=1"},
        {"profile": "vllm-gumbel"},
        {"profile": "hf-kgw-lefthash:vocab_size=4096"},
        {"profile": "kgw-ext:vocab_size=4096"},
    ],
)
def test_sound_keys_pass_calibration(tag: dict[str, str], kms: LocalRoot) -> None:
    from filigrane.store.material import Material, new_salt

    material = Material(kms, 60)
    spec = KeySpec(tenant="acme", name="chat", model="m", **tag)  # type: ignore[arg-type]
    for number in range(1, 4):
        key = material.key(spec, material.derived(spec, number, 1, new_salt()))
        checking.calibrate(key, spec)


def test_a_database_altered_by_hand(stores: storekit.Stores, store: storekit.Opened) -> None:
    book = store.keybook
    book.create(CHAT, actor="ann")
    book.create(VLLM, actor="ann")
    book.import_key(OLD, ForeignKey.from_text("7", KeyForm.UINT64), actor="ann")
    record = book.version("acme", "acme.chat@1")
    true = record.commitment
    by_hand(stores, store, f"UPDATE versions SET commitment = '{'0' * 64}' WHERE name = 'chat'")
    with pytest.raises(StoreDamaged, match="not the key that its commitment promised"):
        book.key_of(book.version("acme", record.id))
    with pytest.raises(StoreError):
        book.promote("acme", "chat", 1, actor="ann")
    by_hand(
        stores,
        store,
        f"UPDATE versions SET commitment = '{true}', log_index = 2 WHERE name = 'chat'",
    )
    with pytest.raises(StateError, match="the log does not commit"):
        book.promote("acme", "chat", 1, actor="ann")
    by_hand(
        stores,
        store,
        "UPDATE versions SET salt = (SELECT salt FROM versions WHERE name = 'vllm'), "
        "log_index = 1 WHERE name = 'chat'",
    )
    with pytest.raises(StoreDamaged, match="not the key that its commitment promised"):
        book.key_of(record)
    by_hand(stores, store, "UPDATE versions SET sealed = wrapped_key WHERE name = 'old'")
    with pytest.raises(StoreDamaged, match="altered or moved"):
        book.key_of(book.version("acme", "acme.old@1"))


def test_secrets_are_remembered_for_their_lifetime(
    store: storekit.Opened, tmp_path: object
) -> None:
    from filigrane.store.keys import KeyBook

    record = store.keybook.create(CHAT, actor="ann")
    asked = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(store.kms, name)

        def mac(self, version: int, message: bytes) -> _Secret[bytes]:
            asked.append(version)
            return store.kms.mac(version, message)

    counting: object = Counting()
    book = KeyBook(store.database, counting, secret_lifetime_s=600)  # type: ignore[arg-type]
    for _ in range(3):
        book.key_of(record)
    assert len(asked) == 1
    short = KeyBook(store.database, counting, secret_lifetime_s=0)  # type: ignore[arg-type]
    for _ in range(3):
        short.key_of(record)
    assert len(asked) == 4


def test_archives(stores: storekit.Stores, store: storekit.Opened, tmp_path: object) -> None:
    book = store.keybook
    book.create(CHAT, actor="ann")
    book.import_key(OLD, ForeignKey.from_text("7", KeyForm.UINT64), actor="ann")
    enrol(store)
    store.access.issue_token("acme", "ann", ["auditor"], actor="ann")  # type: ignore[list-item]
    data = book.export_archive("acme", actor="bob")
    fresh = stores.fresh(store.kms)
    for place in range(0, len(data), max(1, len(data) // 60)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(AuditError):
            fresh.keybook.import_archive(changed, actor="ann")
    for cut in (b"", b"{}", b"[]", b"null", data[:-1], b"[" * 100_000):
        with pytest.raises(AuditError):
            fresh.keybook.import_archive(cut, actor="ann")
    assert fresh.keybook.tenants() == ()
    assert fresh.keybook.import_archive(data, actor="ann") == 2
    assert [v.id for k in fresh.keybook.keys("acme") for v in k.versions] == [
        "acme.chat@1",
        "acme.old@1",
    ]
    for id in ("acme.chat@1", "acme.old@1"):
        ours, theirs = (s.keybook.version("acme", id) for s in (store, fresh))
        assert ours == theirs and book.key_of(ours) == fresh.keybook.key_of(theirs)
    assert fresh.access.tokens("acme") == ()
    assert fresh.log.records("acme")[-1].kind == "archive.import"
    fresh.verify("acme")
    with pytest.raises(AlreadyExists, match="here already"):
        fresh.keybook.import_archive(data, actor="ann")


def test_an_archive_needs_its_root(
    stores: storekit.Stores, store: storekit.Opened, tmp_path: object
) -> None:
    from pathlib import Path

    data = store.keybook.export_archive("acme")
    other = LocalRoot.create(Path(str(tmp_path)) / "other", _Secret("another passphrase, long"))
    with pytest.raises(AuditError, match="under another root"):
        stores.fresh(other).keybook.import_archive(data, actor="ann")


def test_what_is_shown_holds_no_secret(store: storekit.Opened) -> None:
    record = store.keybook.create(CHAT, actor="ann")
    key = store.keybook.key_of(record)
    assert isinstance(key, Key)
    body = key.export_text().rpartition(":")[2]
    shown = repr((record, store.keybook, store.database, store.log, store.keybook.keys("acme")))
    assert body[:16] not in shown
    with store.database.reading("acme") as connection:
        salt = connection.execute(text("SELECT salt FROM versions")).scalar_one()
    assert bytes(salt).hex() not in shown


def test_engines_get_what_marks_now_or_soon(store: storekit.Opened) -> None:
    book = store.keybook
    book.create(CHAT, actor="ann")
    for number in (1, 2):
        book.promote("acme", "chat", number, actor="ann")
        book.rotate("acme", "chat", actor="ann")
    enrol(store)
    # Version 1 is retired: reading is not an engine's work.
    assert [v.number for v in book.for_engine("acme", "one")] == [2, 3]
