"""Several processes at once: each change happens once, each item is worked on once."""

import json
import subprocess
import sys
import time
from pathlib import Path

import storekit
from filigrane.custody.hierarchy import KeySpec
from filigrane.kms.local import LocalRoot

CHAT = KeySpec(tenant="acme", name="chat", model="m", scheme="gumbel", slots=1)

_HEAD = """
import json, sys, time
from filigrane.custody.hierarchy import KeySpec
from filigrane.errors import AlreadyExists, StateError
from filigrane.keys import _Secret
from filigrane.kms.local import LocalRoot
from filigrane.store.database import Database
from filigrane.store.jobs import Jobs
from filigrane.store.keys import KeyBook
url, root, start, me = sys.argv[1:]
kms = LocalRoot.open(root, _Secret("a passphrase for tests alone"))
database = Database.open(url)
book, jobs = KeyBook(database, kms), Jobs(database, kms)
spec = KeySpec(tenant="acme", name="chat", model="m", scheme="gumbel", slots=1)
database.tenants()
open(start + me, "w").close()
import os
while not os.path.exists(start): time.sleep(0.001)
"""


def together(store: storekit.Opened, root: Path, folder: Path, code: str, count: int) -> list[str]:
    """What each of `count` processes prints that start at one moment."""
    start = folder / "start"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _HEAD + code, store.url, str(root), str(start), str(me)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in range(count)
    ]
    deadline = time.monotonic() + 60
    while not all((folder / f"start{me}").exists() for me in range(count)):
        assert time.monotonic() < deadline and all(p.poll() is None for p in running)
        time.sleep(0.01)
    start.touch()
    said = [process.communicate(timeout=60)[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    return said


def test_one_key_made_at_once(
    stores: storekit.Stores, kms: LocalRoot, root_path: Path, tmp_path: Path
) -> None:
    store = stores.fresh(kms)
    store.keybook.create_tenant("acme", actor="operator")
    code = """
said = []
try:
    said.append(book.create(spec, actor=me).id)
except AlreadyExists:
    said.append("refused")
for number in range(10):
    said.append(book.rotate("acme", "chat", actor=me).id)
    said.append(book.rotate("acme", "chat", actor=me, request_id=f"r{number}").id)
print(json.dumps(said))
"""
    said = [json.loads(text) for text in together(store, root_path, tmp_path, code, 2)]
    assert sorted(first for first, *_ in said) == ["acme.chat@1", "refused"]
    # With one request id both got one version, else each its own.
    assert said[0][2::2] == said[1][2::2]
    alone = said[0][1::2] + said[1][1::2]
    assert len(set(alone)) == 20 and not set(alone) & set(said[0][2::2])
    versions = [v.number for key in store.keybook.keys("acme") for v in key.versions]
    assert versions == list(range(1, 32))
    # 1 tenant, 31 versions.
    assert store.verify("acme").n_records == 32
    assert store.keybook.revision("acme") == 32


def test_one_promotion_at_once(
    stores: storekit.Stores, kms: LocalRoot, root_path: Path, tmp_path: Path
) -> None:
    store = stores.fresh(kms)
    store.keybook.create_tenant("acme", actor="operator")
    store.keybook.create(CHAT, actor="ann")
    for _ in range(7):
        store.keybook.rotate("acme", "chat", actor="ann")
    code = """
done = 0
for number in range(1, 9):
    try:
        book.promote("acme", "chat", number, actor=me)
        done += 1
    except StateError:
        pass
print(done)
"""
    said = [int(text) for text in together(store, root_path, tmp_path, code, 2)]
    assert sum(said) == 8
    states = [v.state.value for key in store.keybook.keys("acme") for v in key.versions]
    assert states == ["retired"] * 7 + ["active"]
    store.verify("acme")


def test_each_item_once(
    stores: storekit.Stores, kms: LocalRoot, root_path: Path, tmp_path: Path
) -> None:
    store = stores.fresh(kms)
    jobs = {}
    for tenant in ("acme", "other"):
        store.keybook.create_tenant(tenant, actor="operator")
        items = [f"{tenant} {number}".encode() for number in range(60)]
        # The workers' clock is the real one.
        store.clock.at = storekit.now()
        jobs[tenant] = store.jobs.create(tenant, "ann", items).id
    code = """
mine = []
while (chunk := jobs.claim(me, 60, limit=4)) is not None:
    mine += [content.decode() for _, content in chunk.items]
    assert jobs.finish(chunk, [b"done " + content for _, content in chunk.items])
print(json.dumps(mine))
"""
    said = [json.loads(text) for text in together(store, root_path, tmp_path, code, 2)]
    assert all(said), "one of them did everything"
    assert len(said[0]) + len(said[1]) == 120 == len(set(said[0]) | set(said[1]))
    for tenant, job in jobs.items():
        assert store.jobs.progress(tenant, job).state == "done"
        results = store.jobs.results(tenant, job)
        assert results == tuple(f"done {tenant} {n}".encode() for n in range(60))
    assert store.database.tenants(with_jobs=True) == ()
