"""What is killed, full or gone: nothing half-written, a clear error, and it works again after."""

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool

import kmskit
import pgkit
import storekit
from filigrane.custody.hierarchy import KeySpec
from filigrane.errors import (
    FiligraneError,
    KmsError,
    KmsUnavailable,
    StoreError,
    StoreReadOnly,
    StoreUnavailable,
)
from filigrane.foreign import ForeignKey, KeyForm
from filigrane.kms.local import LocalRoot
from filigrane.store.database import Database
from filigrane.store.keys import KeyBook

CHAT = KeySpec(tenant="acme", name="chat", model="m", scheme="gumbel", slots=1)
OLD = KeySpec(tenant="acme", name="old", model="m", profile="vllm-gumbel", source="imported")


def seen(store: storekit.Opened) -> tuple[object, ...]:
    """All that a failed call must leave as it was."""
    return (
        store.keybook.keys("acme"),
        store.keybook.revision("acme"),
        store.log.records("acme"),
        store.access.approvals("acme"),
        store.jobs.jobs("acme"),
    )


# The key management system is gone.


@pytest.fixture(scope="module", params=kmskit.PROVIDERS)
def system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[kmskit.System]:
    with kmskit.running(request.param, tmp_path_factory.mktemp("kms")) as made:
        yield made


class StopsBefore:
    """Kills the system before the call with this number."""

    def __init__(self, system: kmskit.System, number: int) -> None:
        self.system, self.left, self.stopped = system, number, False

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if self.left == 0 and not self.stopped:
                self.system.stop()
                self.stopped = True
            self.left -= 1
            made: object = getattr(self.system.kms, name)(*arguments)
            return made

        return call


def test_a_system_that_dies(
    system: kmskit.System, tmp_path: Path, dialect: str, cluster: pgkit.Cluster
) -> None:
    with storekit.stores(tmp_path, cluster if dialect == "postgresql" else None) as made:
        store = made.fresh(system.kms)
        store.keybook.create_tenant("acme", actor="operator")
        store.keybook.create(CHAT, actor="ann")
        known = store.keybook.version("acme", "acme.chat@1")
        before = seen(store)
        other = KeySpec(tenant="acme", name="next", model="m", scheme="gumbel")
        acts: list[Callable[[KeyBook], object]] = [
            lambda book: book.create(other, actor="ann"),
            lambda book: book.rotate("acme", "chat", actor="ann"),
            lambda book: book.import_key(
                OLD, ForeignKey.from_text("7", KeyForm.UINT64), actor="ann"
            ),
        ]
        for act in acts:
            for number in (0, 1):
                dying: object = StopsBefore(system, number)
                book = KeyBook(store.database, dying)  # type: ignore[arg-type]
                try:
                    with pytest.raises(KmsError) as caught:
                        act(book)
                    assert system.secret() not in str(caught.value)
                    # What was asked for before goes on being read; log and keys as before.
                    assert store.keybook.key_of(known) is not None
                    with pytest.raises(KmsUnavailable):
                        store.jobs.create("acme", "ann", [b"x"])
                    assert seen(store) == before
                finally:
                    system.start()
                    _until_it_answers(system)
        for act in acts:
            act(KeyBook(store.database, system.kms))
        store.verify("acme")
        store.database.close()


def _until_it_answers(system: kmskit.System) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            system.kms.versions()
            return
        except KmsUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.1)


# The disk is full.


def test_no_room_left(tmp_path: Path, kms: LocalRoot) -> None:
    room = {"pages": 0}

    def limit(connection: object, _: object) -> None:
        if room["pages"]:
            connection.execute(f"PRAGMA max_page_count = {room['pages']}")  # type: ignore[attr-defined]

    event.listen(Pool, "connect", limit)
    try:
        with storekit.stores(tmp_path, None) as made:
            store = made.fresh(kms)
            store.keybook.create_tenant("acme", actor="operator")
            with store.database.reading("acme") as connection:
                used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            store.database.close()
            room["pages"] = used + 6
            count = 0
            for number in range(100):
                store = storekit.Opened(
                    url=store.url,
                    database=Database.open(store.url, clock=store.clock),
                    kms=kms,
                    clock=store.clock,
                )
                before = seen(store)
                spec = KeySpec(tenant="acme", name=f"k{number}", model="m", scheme="gumbel")
                try:
                    store.keybook.create(spec, actor="ann")
                    count += 1
                except StoreError as error:
                    assert "no room left" in str(error)
                    assert seen(store) == before
                    break
                finally:
                    store.database.close()
            else:
                raise AssertionError("it never was full")
            assert count > 0
            room["pages"] = 0
            store = store.again()
            store.keybook.create(spec, actor="ann")
            assert len(store.keybook.keys("acme")) == count + 1
            store.verify("acme")
            store.database.close()
    finally:
        event.remove(Pool, "connect", limit)


def test_a_read_only_file(tmp_path: Path, kms: LocalRoot) -> None:
    with storekit.stores(tmp_path, None) as made:
        store = made.fresh(kms)
        store.keybook.create_tenant("acme", actor="operator")
        before = seen(store)
        with (
            pytest.raises(StoreReadOnly, match="read-only"),
            store.database.tenant("acme") as connection,
        ):
            connection.exec_driver_sql("PRAGMA query_only = ON")
            store.log.append("acme", "ann", "a.note", {}, connection=connection)
        store = store.again()
        assert seen(store) == before
        store.database.close()


# PostgreSQL goes away.


@pytest.fixture(scope="module")
def careful() -> Iterator[pgkit.Cluster]:
    """A server that crashes without losing what it answered."""
    with pgkit.cluster(durable=True) as made:
        yield made


@pytest.mark.parametrize("how", [signal.SIGQUIT, signal.SIGINT])
def test_restarted_in_a_transaction(
    careful: pgkit.Cluster, tmp_path: Path, kms: LocalRoot, how: signal.Signals
) -> None:
    with storekit.stores(tmp_path, careful) as made:
        store = made.fresh(kms)
        store.keybook.create_tenant("acme", actor="operator")
        store.keybook.create(CHAT, actor="ann")
        before = seen(store)
        with (
            pytest.raises(StoreUnavailable, match="does not answer; nothing was changed"),
            store.database.tenant("acme") as connection,
        ):
            store.log.append("acme", "ann", "a.note", {}, connection=connection)
            careful.restart(how)
            store.log.append("acme", "ann", "a.note", {}, connection=connection)
        assert seen(store) == before
        careful.stop(how)
        try:
            for act in (
                lambda: store.keybook.rotate("acme", "chat", actor="ann"),
                store.database.check,
                lambda: store.keybook.revision("acme"),
            ):
                with pytest.raises(StoreUnavailable, match="does not answer"):
                    act()
        finally:
            careful.start()
        assert store.keybook.rotate("acme", "chat", actor="ann").number == 2
        store.verify("acme")


def test_crashes_under_load(careful: pgkit.Cluster, tmp_path: Path, kms: LocalRoot) -> None:
    with storekit.stores(tmp_path, careful) as made:
        store = made.fresh(kms)
        store.keybook.create_tenant("acme", actor="operator")
        store.keybook.create(CHAT, actor="ann")
        answered: list[str] = []
        done = threading.Event()

        def work() -> None:
            number = 0
            while not done.is_set():
                number += 1
                with contextlib.suppress(FiligraneError):
                    record = store.keybook.rotate(
                        "acme", "chat", actor="ann", request_id=f"r{number}"
                    )
                    answered.append(record.id)

        thread = threading.Thread(target=work)
        thread.start()
        dice = random.Random(1)

        def more(number: int) -> None:
            """Wait for so many more answers: however slow the machine, something was under way."""
            enough, deadline = len(answered) + number, time.monotonic() + 60
            while len(answered) < enough:
                assert time.monotonic() < deadline
                time.sleep(0.01)

        try:
            for _ in range(3):
                more(2)
                time.sleep(0.3 * dice.random())
                careful.restart(signal.SIGQUIT)
            more(1)
        finally:
            done.set()
            thread.join()
        there = [v.id for key in store.keybook.keys("acme") for v in key.versions]
        assert set(answered) <= set(there)
        records = store.log.records("acme")
        assert [r.facts["key"] for r in records if r.kind in ("key.create", "key.rotate")] == there
        store.verify("acme")


# The process is killed.

_ROTATING = """
import sys
from pathlib import Path
from filigrane.keys import _Secret
from filigrane.kms.local import LocalRoot
from filigrane.store.database import Database
from filigrane.store.keys import KeyBook
url, root = sys.argv[1:]
book = KeyBook(Database.open(url), LocalRoot.open(root, _Secret("a passphrase for tests alone")))
print("ready", flush=True)
while True:
    print(book.rotate("acme", "chat", actor="ann").id, flush=True)
"""


def test_a_killed_process(stores: storekit.Stores, kms: LocalRoot, root_path: Path) -> None:
    store = stores.fresh(kms)
    store.keybook.create_tenant("acme", actor="operator")
    store.keybook.create(CHAT, actor="ann")
    answered = []
    for delay in (0.05, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", _ROTATING, store.url, str(root_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.kill()
        lines = process.communicate()[0].decode().split("\n")
        answered += [line for line in lines if line.startswith("acme.")][:-1]
    versions = [v.id for key in store.keybook.keys("acme") for v in key.versions]
    assert set(answered) <= set(versions)
    records = store.log.records("acme")
    assert [r.facts["key"] for r in records if r.kind in ("key.create", "key.rotate")] == versions
    store.keybook.rotate("acme", "chat", actor="ann")
    store.verify("acme")
