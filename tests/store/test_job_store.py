"""Jobs: claimed once, resumed after a crash, sealed until done, erased after."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import text

import storekit
from filigrane.errors import (
    AlreadyExists,
    KeyFormatError,
    NotFound,
    StateError,
    StoreDamaged,
)
from filigrane.store.jobs import GIVEN_UP
from filigrane.store.records import JobState


def content(store: storekit.Opened) -> list[bytes | None]:
    with store.database.reading("acme") as connection:
        rows = connection.execute(text("SELECT content FROM items ORDER BY position")).all()
    return [None if row[0] is None else bytes(row[0]) for row in rows]


def test_a_job(store: storekit.Opened) -> None:
    jobs = store.jobs
    texts = [b"the first text", b"", b"\x00" * 5000]
    made = jobs.create("acme", "ann", texts, '{"alpha": 1e-6}')
    assert (made.state, made.n_items, made.n_done) == (JobState.WAITING, 3, 0)
    sealed = content(store)
    assert all(piece is not None and b"first" not in piece for piece in sealed)
    one = jobs.claim("w1", 30, limit=2)
    two = jobs.claim("w2", 30)
    assert one is not None and two is not None and jobs.claim("w3", 30) is None
    assert [c for _, c in one.items] == texts[:2] and [c for _, c in two.items] == texts[2:]
    assert one.options == '{"alpha": 1e-6}' and one.who == "ann"
    assert "first" not in repr(one)
    assert jobs.progress("acme", made.id).state is JobState.WAITING
    assert jobs.finish(two, [b"r2"])
    assert jobs.progress("acme", made.id).state is JobState.RUNNING
    assert jobs.results("acme", made.id) == (None, None, b"r2")
    assert not jobs.finish(two, [b"again"])
    with pytest.raises(StateError, match="one result for each"):
        jobs.finish(one, [b"r0"])
    assert jobs.finish(one, [b"r0", b"r1"])
    done = jobs.progress("acme", made.id)
    assert (done.state, done.n_done, done.n_failed) == (JobState.DONE, 3, 0)
    assert done.finished_at is not None
    assert jobs.results("acme", made.id) == (b"r0", b"r1", b"r2")
    assert jobs.results("acme", made.id, 1, 2) == (b"r1",)
    assert content(store) == [None] * 3
    with store.database.reading("acme") as connection:
        assert connection.scalar(text("SELECT items_key FROM jobs")) is None
    with pytest.raises(StateError, match="nothing to cancel"):
        jobs.cancel("acme", made.id)
    jobs.forget("acme", made.id)
    assert jobs.jobs("acme") == () and content(store) == []
    with pytest.raises(NotFound, match="may have expired"):
        jobs.results("acme", made.id)


def test_a_worker_that_dies(store: storekit.Opened) -> None:
    jobs = store.jobs
    made = jobs.create("acme", "ann", [b"a", b"b"])
    lost = jobs.claim("w1", 30)
    assert lost is not None and jobs.claim("w2", 30) is None
    store.clock.at += timedelta(seconds=60)
    # A new process, as after a restart.
    fresh = store.again()
    taken = fresh.jobs.claim("w2", 30)
    assert taken is not None and taken.items == lost.items
    assert not jobs.finish(lost, [b"late", b"late"])
    assert fresh.jobs.finish(taken, [b"1", b"2"])
    assert jobs.results("acme", made.id) == (b"1", b"2")
    fresh.database.close()


def test_what_ends_every_worker_is_given_up(store: storekit.Opened) -> None:
    jobs = store.jobs
    made = jobs.create("acme", "ann", [b"poison", b"good"])
    for _ in range(3):
        chunk = jobs.claim("w", 30, limit=1)
        assert chunk is not None and chunk.items == ((0, b"poison"),)
        store.clock.at += timedelta(seconds=60)
    while (chunk := jobs.claim("w", 30, limit=1)) is None:
        pass
    assert chunk.items == ((1, b"good"),)
    assert jobs.finish(chunk, [b"fine"])
    done = jobs.progress("acme", made.id)
    assert (done.state, done.n_done, done.n_failed) == (JobState.DONE, 2, 1)
    assert jobs.results("acme", made.id) == (GIVEN_UP, b"fine")


def test_released_items_cost_no_attempt(store: storekit.Opened) -> None:
    store.jobs.create("acme", "ann", [b"a"])
    for _ in range(6):
        chunk = store.jobs.claim("w", 30)
        assert chunk is not None
        store.jobs.release(chunk)
    assert not store.jobs.finish(chunk, [b"too late"])


def test_cancelling(store: storekit.Opened) -> None:
    jobs = store.jobs
    made = jobs.create("acme", "ann", [b"a", b"b", b"c"])
    first, second = (jobs.claim("w", 30, limit=1) for _ in range(2))
    assert first is not None and second is not None
    assert jobs.finish(first, [b"1"])
    assert jobs.cancel("acme", made.id).state is JobState.CANCELLED
    assert not jobs.finish(second, [b"2"])
    assert jobs.claim("w", 30) is None and content(store) == [None] * 3
    assert jobs.results("acme", made.id) == (b"1", None, None)
    with pytest.raises(NotFound):
        jobs.cancel("acme", "nothing")


def test_expiry(store: storekit.Opened) -> None:
    jobs = store.jobs
    store.keybook.create_tenant("other", actor="op")
    short = jobs.create("acme", "ann", [b"a"], lifetime=timedelta(hours=1))
    long = jobs.create("other", "ann", [b"a"], lifetime=timedelta(days=9))
    assert jobs.expire() == 0
    store.clock.at += timedelta(hours=2)
    assert store.database.tenants(with_jobs=True) == ("acme", "other")
    claimed = jobs.claim("w", 1)
    assert claimed is not None and claimed.tenant == "other"
    assert jobs.expire() == 1
    assert store.database.tenants(with_jobs=True) == ("other",)
    with pytest.raises(NotFound):
        jobs.progress("acme", short.id)
    assert jobs.progress("other", long.id).n_items == 1


def test_tenants_take_turns(store: storekit.Opened) -> None:
    for tenant in ("b", "c"):
        store.keybook.create_tenant(tenant, actor="op")
    for tenant in ("acme", "b", "c"):
        store.jobs.create(tenant, "ann", [b"x"] * 20)
    order = []
    for _ in range(9):
        chunk = store.jobs.claim("w", 30, limit=1)
        assert chunk is not None
        order.append(chunk.tenant)
    assert {order.count(tenant) for tenant in ("acme", "b", "c")} == {3}


def test_what_a_job_may_be(store: storekit.Opened) -> None:
    for items in ([], [b""] * 10_001):
        with pytest.raises(KeyFormatError, match="1 to 10000 items"):
            store.jobs.create("acme", "ann", items)
    with pytest.raises(KeyFormatError, match="at most 4096"):
        store.jobs.create("acme", "ann", [b"a"], "x" * 4097)
    with pytest.raises(NotFound):
        store.jobs.create("nobody", "ann", [b"a"])


def test_items_cannot_be_swapped(store: storekit.Opened) -> None:
    store.jobs.create("acme", "ann", [b"a", b"b"])
    with store.database.tenant("acme") as connection:
        other = "(SELECT content FROM items WHERE position = 1)"
        connection.execute(text(f"UPDATE items SET content = {other} WHERE position = 0"))
    with pytest.raises(StoreDamaged, match="altered or moved"):
        store.jobs.claim("w", 30)


def test_the_same_request_is_the_same_job(store: storekit.Opened) -> None:
    def ask(digest: str, who: str = "ann") -> str:
        return store.jobs.create("acme", who, [b"x"], request=("r-1", digest)).id

    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(ask, ["d"] * 8))
    assert len(made) == 1 and ask("d") in made
    assert ask("d", "bob") not in made
    with pytest.raises(AlreadyExists, match="another job"):
        ask("e")
    assert len(store.jobs.jobs("acme")) == 2
