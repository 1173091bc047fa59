"""What the database must never hold, looked for in its files in every form it could take."""

import base64
import time
from pathlib import Path

import pytest

import pgkit
import storekit
from filigrane.custody.hierarchy import KeySpec, TenantSecret, tenant_message
from filigrane.foreign import ForeignKey, KeyForm
from filigrane.keys import Key, _Secret
from filigrane.kms.local import LocalRoot
from filigrane.store.access import Role

CHAT = KeySpec(tenant="acme", name="chat", model="m", scheme="gumbel", slots=2)
OLD = KeySpec(tenant="acme", name="old", model="m", profile="vllm-gumbel", source="imported")
OWN = KeySpec(tenant="acme", name="own", model="m", scheme="gumbel", slots=2, source="imported")
PASSPHRASE = "canary passphrase that nobody else has"
NUMBER = 0xC0FFEE_1234_5678_9
TEXT = b"canary text: the quick brown fox jumps over the lazy dog"


def forms(secret: bytes) -> dict[str, bytes]:
    """A secret as it might be written; of base64, the part that every alignment shows."""
    found = {"raw": secret, "reversed": secret[::-1], "hex": secret.hex().encode()}
    found["HEX"] = found["hex"].upper()
    found["decimal"] = str(int.from_bytes(secret, "big")).encode()
    found["little decimal"] = str(int.from_bytes(secret, "little")).encode()
    found["list"] = ", ".join(map(str, secret[:12])).encode()
    for shift in range(3):
        padded = bytes(shift) + secret
        for name, encode in (("64", base64.b64encode), ("url", base64.urlsafe_b64encode)):
            found[f"base{name}+{shift}"] = encode(padded)[4:-4]
    for shift in range(5):
        encoded = base64.b32encode(bytes(shift) + secret)[8:-8]
        found[f"base32+{shift}"] = encoded
        found[f"base32 lower+{shift}"] = encoded.lower()
    return found


def live(store: storekit.Opened) -> dict[str, bytes]:
    """Use everything that handles secrets; what was secret in it."""
    book = store.keybook
    book.create_tenant("acme", actor="operator")
    record = book.create(CHAT, actor="ann")
    key = book.key_of(record)
    assert isinstance(key, Key)
    foreign = ForeignKey.from_text(str(NUMBER), KeyForm.UINT64)
    own = Key.generate("own", slots=2)
    book.import_key(OLD, foreign, actor="ann")
    book.import_key(OWN, own, actor="ann")
    store.access.enrol_engine("acme", "one", ["m"], storekit.identity(), actor="ann")
    for spec in (CHAT, OLD):
        version = book.version("acme", f"acme.{spec.name}@1")
        text = storekit.marked(book.key_of(version), spec, 1)
        book.acknowledge("acme", "one", version.id, text)
        book.promote("acme", spec.name, 1, actor="ann")
    token = store.access.issue_token("acme", "ann", [Role.AUDITOR], actor="op")
    store.jobs.create("acme", "ann", [TEXT, TEXT])
    chunk = store.jobs.claim("w", 30, limit=1)
    assert chunk is not None
    store.jobs.finish(chunk, [b"canary result: p below one in a thousand"])
    store.log.checkpoint("acme")
    book.export_archive("acme")
    mac = store.kms.mac(1, tenant_message("acme"))
    secret = TenantSecret.of(mac)
    user = key.user(17).prf_keys("gumbel/4")[0].astype("<u4").tobytes()
    body = own.export_text().rpartition(":")[2].upper() + "======"
    return {
        "tenant secret": mac.reveal(),
        "content key": secret.expand(b"filigrane/v1/content").reveal(),
        "log seed": store.kms.mac(1, b"filigrane/v1/sign/log").reveal(),
        "key": base64.b32decode(key.export_text().rpartition(":")[2].upper() + "======")[:32],
        "scheme key": key.prf_keys("gumbel/4")[0].astype("<u4").tobytes(),
        "user key": user,
        "imported key": base64.b32decode(body)[:32],
        "imported number": NUMBER.to_bytes(8, "big"),
        "text": TEXT,
        "result": b"canary result: p below one in a thousand",
        "token": token.rpartition("_")[2].encode(),
        "passphrase": PASSPHRASE.encode(),
    }


def search(files: list[Path], secrets: dict[str, bytes], sentinel: bytes) -> None:
    # Long runs of zeros are most of these files and hide nothing.
    held = b"\n".join(path.read_bytes().replace(bytes(64), b"") for path in files)
    assert sentinel in held, "these are not the database's files"
    for name, secret in secrets.items():
        for form, written in forms(secret).items():
            if len(written) >= 8:
                assert written not in held, f"{name} ({form}) lies in the database"


def root(folder: Path) -> tuple[LocalRoot, bytes]:
    """A root and its very secret, learnt through its MAC's known key."""
    made = LocalRoot.create(folder / "root", _Secret(PASSPHRASE))
    known = made._known().reveal()
    first = known[1] if 1 in known else next(iter(known.values()))
    parts = first if isinstance(first, tuple) else (first,)
    return made, b"".join(part for part in parts if isinstance(part, bytes))


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    secret = bytes(range(40, 72))
    for number, (form, written) in enumerate(forms(secret).items()):
        (tmp_path / str(number)).write_bytes(b"abc" + written + b"SENTINEL")
        try:
            search([tmp_path / str(number)], {"x": secret}, b"SENTINEL")
        except AssertionError:
            continue
        raise AssertionError(f"{form} was not found")


def test_sqlite_files(tmp_path: Path) -> None:
    kms, very = root(tmp_path)
    folder = tmp_path / "store"
    folder.mkdir()
    with storekit.stores(folder, None) as made:
        store = made.fresh(kms)
        secrets = live(store) | {"root": very[:32], "root's other half": very[32:64]}
        files = [path for path in folder.iterdir() if path.name != "template.db"]
        assert any(path.name.endswith("-wal") for path in files)
        search(files, secrets, b"acme.chat@1")
        store.database.close()


def test_postgresql_files(tmp_path: Path) -> None:
    kms, very = root(tmp_path)
    with pgkit.cluster(durable=True) as server, storekit.stores(tmp_path, server) as made:
        store = made.fresh(kms)
        secrets = live(store) | {"root": very[:32], "root's other half": very[32:64]}
        server.execute("CHECKPOINT", database=store.url.rpartition("/")[2])
        files = [path for path in server.data.rglob("*") if path.is_file()]
        # Tables, the write-ahead log, and what the server says.
        search([*files, server.log], secrets, b"acme.chat@1")
        store.database.close()


@pytest.mark.parametrize("reading", [False, True])
def test_destroyed_salts_are_gone(tmp_path: Path, reading: bool) -> None:
    kms, _ = root(tmp_path)
    folder = tmp_path / "store"
    folder.mkdir()
    with storekit.stores(folder, None) as made:
        store = made.fresh(kms)
        store.keybook.create_tenant("acme", actor="op")
        store.keybook.create(CHAT, actor="ann")
        with store.database.reading("acme") as connection:
            salt = connection.exec_driver_sql("SELECT salt FROM versions").scalar_one()
        files = [path for path in folder.iterdir() if path.name != "template.db"]
        assert any(salt in path.read_bytes() for path in files)
        approval = store.approved("acme", "acme.chat@1")
        if reading:
            # A transaction from before keeps it; the service's worker tries again.
            with store.database.reading("acme") as connection:
                connection.exec_driver_sql("SELECT salt FROM versions").all()
                began = time.monotonic()
                store.keybook.destroy("acme", "chat", 1, actor="ann", approval=approval)
                assert time.monotonic() - began < 5
                assert not store.database.erase()
            assert store.database.erase()
        else:
            store.keybook.destroy("acme", "chat", 1, actor="ann", approval=approval)
        assert not any(salt in path.read_bytes() for path in folder.iterdir())
        store.database.close()
