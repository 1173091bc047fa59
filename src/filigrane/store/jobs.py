"""Work that waits: items lie encrypted until a worker has done them, results until they are read.

Each job has two data keys, wrapped by the key management system: that of the items is erased with
the last item, that of the results with the job. A worker holds a chunk of items for as long as its
lease; if it dies, others get them. This module knows nothing of what the work is.
"""

import collections
import secrets
import threading
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Final, final

from sqlalchemy import Connection, Row, and_, delete, func, insert, or_, select, update

from filigrane.errors import AlreadyExists, KeyFormatError, KmsError, NotFound, StateError
from filigrane.keys import _lp, _Secret
from filigrane.kms.base import KeyManagement
from filigrane.store import tables
from filigrane.store.access import maybe
from filigrane.store.database import Database, lock_tenant, moment, stamp
from filigrane.store.material import open_sealed, seal
from filigrane.store.records import Chunk, JobRecord, JobState

__all__ = ["Jobs"]

_MAX_ITEMS: Final = 10_000
_MAX_OPTIONS: Final = 4_096
_MAX_ATTEMPTS: Final = 3
_KEYS: Final = 256
_LIFETIME: Final = timedelta(days=1)
GIVEN_UP: Final = b'{"error":"given up"}'
"""The result of an item that ended its worker three times."""


@final
class Jobs:
    """The jobs of all tenants. Thread-safe; any number of processes may work on them."""

    def __init__(self, database: Database, kms: KeyManagement) -> None:
        self._database = database
        self._kms = kms
        # Unwrapped data keys, so that a chunk costs no call to the system; newest last.
        self._held: collections.OrderedDict[tuple[str, str, str], _Secret[bytes]] = (
            collections.OrderedDict()
        )
        self._turn = threading.Lock()
        self._start = 0

    def create(
        self,
        tenant: str,
        who: str,
        items: Iterable[bytes],
        options: str = "{}",
        *,
        lifetime: timedelta = _LIFETIME,
        request: tuple[str, str] | None = None,
    ) -> JobRecord:
        """Put items aside to be worked on.

        items: 1 to 10,000; options: JSON text for the worker, at most 4,096 characters, stored as
        it is: no texts in it. After `lifetime` everything of the job is erased, done or not.
        request: an id, 1 to 128 characters, and a keyed digest of what is asked for, 64 at most:
        asking again gives the same job, asking for something else raises AlreadyExists.
        Raises KeyFormatError, NotFound without the tenant, StoreError, KmsUnavailable.
        """
        given = list(items)
        if not 1 <= len(given) <= _MAX_ITEMS:
            raise KeyFormatError(f"a job has 1 to {_MAX_ITEMS} items.")
        if len(options) > _MAX_OPTIONS:
            raise KeyFormatError(f"options have at most {_MAX_OPTIONS} characters.")
        job = secrets.token_hex(8)
        keys = {part: _Secret(secrets.token_bytes(32)) for part in ("items", "results")}
        wrapped = {
            f"{part}_key": self._kms.wrap(key, _context(tenant, job, part))
            for part, key in keys.items()
        }
        at = self._database.clock()
        sealed = [
            {
                "tenant": tenant,
                "job": job,
                "position": position,
                "content": seal(
                    keys["items"], _Secret(content), _context(tenant, job, "items", position)
                ),
                "attempts": 0,
            }
            for position, content in enumerate(given)
        ]
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            if request is not None:
                before = _asked_before(connection, tenant, who, request)
                if before is not None:
                    return before
            connection.execute(
                insert(tables.jobs).values(
                    tenant=tenant,
                    id=job,
                    who=who,
                    state=JobState.WAITING,
                    options=options,
                    n_items=len(sealed),
                    n_done=0,
                    n_failed=0,
                    created_at=stamp(at),
                    expires_at=stamp(at + lifetime),
                    request_id=None if request is None else request[0],
                    request_digest=None if request is None else request[1],
                    **wrapped,
                )
            )
            connection.execute(insert(tables.items), sealed)
            _count_open(connection, tenant)
            return _job(connection, tenant, job)

    def claim(self, worker: str, lease_s: float, *, limit: int = 16) -> Chunk | None:
        """Items to work on, at most `limit` and all of one job, or None if nothing waits.

        Until the lease ends nobody else gets them. Tenants take turns. An item that was claimed
        three times and never finished is given up. Raises StoreError, KmsUnavailable.
        """
        names = self._database.tenants(with_jobs=True)
        with self._turn:
            self._start += 1
            start = self._start % len(names) if names else 0
        for tenant in names[start:] + names[:start]:
            chunk = self._claim(tenant, worker, lease_s, limit)
            if chunk is not None:
                return chunk
        return None

    def finish(self, chunk: Chunk, results: Sequence[bytes]) -> bool:
        """Keep the results of a chunk, in its order, and erase the items.

        False if the lease ended and others have them now, or the job was cancelled: nothing is
        kept then. Raises StoreError, KmsUnavailable.
        """
        if len(results) != len(chunk.items):
            raise StateError("a chunk is finished with one result for each of its items.")
        tenant, job = chunk.tenant, chunk.job
        with self._database.reading(tenant) as connection:
            wrapped = connection.scalar(select(tables.jobs.c.results_key).where(_is(tenant, job)))
        if wrapped is None:
            return False
        key = self._data_key(tenant, job, "results", bytes(wrapped))
        table = tables.items
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            held = connection.scalars(
                select(table.c.position).where(
                    table.c.tenant == tenant,
                    table.c.job == job,
                    table.c.lease == chunk.lease,
                    table.c.content.is_not(None),
                )
            ).all()
            if set(held) != {position for position, _ in chunk.items}:
                return False
            for (position, _), result in zip(chunk.items, results, strict=True):
                context = _context(tenant, job, "results", position)
                _done(connection, tenant, job, position, seal(key, _Secret(result), context))
            _settle(connection, tenant, job, stamp(self._database.clock()))
        self._forget(tenant, job, "items")
        return True

    def release(self, chunk: Chunk) -> None:
        """Give items back undone, for others, as if they had never been claimed."""
        self._release(chunk.tenant, chunk.job, chunk.lease)

    def _release(self, tenant: str, job: str, lease: str) -> None:
        table = tables.items
        mine = (table.c.tenant == tenant) & (table.c.job == job)
        with self._database.tenant(tenant) as connection:
            connection.execute(
                update(table)
                .where(mine, table.c.lease == lease)
                .values(lease=None, lease_until=None, attempts=table.c.attempts - 1)
            )

    def progress(self, tenant: str, job: str) -> JobRecord:
        """How far a job is. Raises NotFound."""
        with self._database.reading(tenant) as connection:
            return _job(connection, tenant, job)

    def jobs(self, tenant: str) -> tuple[JobRecord, ...]:
        """All jobs of a tenant, oldest first."""
        table = tables.jobs
        query = select(table).where(table.c.tenant == tenant)
        with self._database.reading(tenant) as connection:
            found = connection.execute(query.order_by(table.c.created_at, table.c.id))
            return tuple(_record(row) for row in found)

    def results(
        self, tenant: str, job: str, start: int = 0, stop: int | None = None
    ) -> tuple[bytes | None, ...]:
        """Results of items start to stop - 1, or to the last; None for what is not done.

        Raises NotFound, also after the job expired; KmsUnavailable.
        """
        table = tables.items
        query = select(table.c.position, table.c.result).where(
            table.c.tenant == tenant, table.c.job == job, table.c.position >= start
        )
        if stop is not None:
            query = query.where(table.c.position < stop)
        with self._database.reading(tenant) as connection:
            _job(connection, tenant, job)
            wrapped = connection.scalar(select(tables.jobs.c.results_key).where(_is(tenant, job)))
            rows = connection.execute(query.order_by(table.c.position)).all()
        if wrapped is None:
            return tuple(None for _ in rows)
        key = self._data_key(tenant, job, "results", bytes(wrapped))
        return tuple(
            None
            if row.result is None
            else open_sealed(
                key, bytes(row.result), _context(tenant, job, "results", row.position)
            ).reveal()
            for row in rows
        )

    def cancel(self, tenant: str, job: str) -> JobRecord:
        """Stop a job and erase its items; results so far stay. Raises NotFound, StateError."""
        at = stamp(self._database.clock())
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            found = _job(connection, tenant, job)
            if found.state.ended:
                raise StateError(f"job {job} is {found.state}; there is nothing to cancel.")
            table = tables.items
            here = (table.c.tenant == tenant) & (table.c.job == job)
            connection.execute(
                update(table).where(here).values(content=None, lease=None, lease_until=None)
            )
            _end(connection, tenant, job, JobState.CANCELLED, at)
            record = _job(connection, tenant, job)
        self._forget(tenant, job, "items")
        self._database.erase()
        return record

    def forget(self, tenant: str, job: str) -> None:
        """Erase a job with its items and results, for example once they were fetched. NotFound."""
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            _job(connection, tenant, job)
            _delete(connection, tenant, [job])
        self._forget(tenant, job, "items", "results")
        self._database.erase()

    def expire(self) -> int:
        """Erase every job whose time has come, of all tenants; how many."""
        at = stamp(self._database.clock())
        table = tables.jobs
        count = 0
        for tenant in self._database.tenants():
            overdue = (table.c.tenant == tenant) & (table.c.expires_at <= at)
            with self._database.reading(tenant) as connection:
                names = connection.scalars(select(table.c.id).where(overdue)).all()
            if not names:
                continue
            with self._database.tenant(tenant) as connection:
                lock_tenant(connection, tenant)
                _delete(connection, tenant, names)
            for name in names:
                self._forget(tenant, name, "items", "results")
            count += len(names)
        if count:
            self._database.erase()
        return count

    def _claim(self, tenant: str, worker: str, lease_s: float, limit: int) -> Chunk | None:
        now = self._database.clock()
        at, until = stamp(now), now + timedelta(seconds=lease_s)
        lease = secrets.token_hex(16)
        table = tables.items
        free = and_(
            table.c.tenant == tenant,
            table.c.content.is_not(None),
            or_(table.c.lease_until.is_(None), table.c.lease_until <= at),
        )
        # SQLite has no SKIP LOCKED and needs none: its transactions that write take turns.
        first = (
            select(table.c.job)
            .join(
                tables.jobs, and_(tables.jobs.c.tenant == tenant, tables.jobs.c.id == table.c.job)
            )
            .where(free, tables.jobs.c.expires_at > at)
            .order_by(tables.jobs.c.created_at, table.c.job, table.c.position)
            .limit(1)
            .with_for_update(skip_locked=True, of=table)
        )
        with self._database.tenant(tenant) as connection:
            job = connection.scalar(first)
            if job is None:
                return None
            rows = connection.execute(
                select(table.c.position, table.c.content, table.c.attempts)
                .where(free, table.c.job == job)
                .order_by(table.c.position)
                .limit(limit)
                .with_for_update(skip_locked=True)
            ).all()
            tired = [row.position for row in rows if row.attempts >= _MAX_ATTEMPTS]
            rows = [row for row in rows if row.attempts < _MAX_ATTEMPTS]
            if rows:
                connection.execute(
                    update(table)
                    .where(
                        table.c.tenant == tenant,
                        table.c.job == job,
                        table.c.position.in_([row.position for row in rows]),
                    )
                    .values(lease=lease, lease_until=stamp(until), attempts=table.c.attempts + 1)
                )
            found = connection.execute(select(tables.jobs).where(_is(tenant, job))).one()
        if tired:
            self._give_up(tenant, job, tired, bytes(found.results_key), at)
        if not rows:
            return None
        try:
            key = self._data_key(tenant, job, "items", bytes(found.items_key))
        except KmsError:
            # Nobody has tried them: that is no attempt.
            self._release(tenant, job, lease)
            raise
        return Chunk(
            tenant=tenant,
            job=job,
            who=found.who,
            options=found.options,
            worker=worker,
            lease=lease,
            lease_until=until,
            items=tuple(
                (
                    row.position,
                    open_sealed(
                        key, bytes(row.content), _context(tenant, job, "items", row.position)
                    ).reveal(),
                )
                for row in rows
            ),
        )

    def _give_up(
        self, tenant: str, job: str, positions: Sequence[int], wrapped: bytes, at: str
    ) -> None:
        key = self._data_key(tenant, job, "results", wrapped)
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            for position in positions:
                context = _context(tenant, job, "results", position)
                sealed = seal(key, _Secret(GIVEN_UP), context)
                _done(connection, tenant, job, position, sealed, failed=True)
            _settle(connection, tenant, job, at)

    def _data_key(self, tenant: str, job: str, part: str, wrapped: bytes) -> _Secret[bytes]:
        name = (tenant, job, part)
        with self._turn:
            known = self._held.get(name)
        if known is None:
            known = self._kms.unwrap(wrapped, _context(tenant, job, part))
            with self._turn:
                self._held[name] = known
                while len(self._held) > _KEYS:
                    self._held.popitem(last=False)
        return known

    def _forget(self, tenant: str, job: str, *parts: str) -> None:
        with self._turn:
            for part in parts:
                self._held.pop((tenant, job, part), None)


def _context(tenant: str, job: str, part: str, position: int | None = None) -> bytes:
    named = f"{tenant}/{job}/{part}" + ("" if position is None else f"/{position}")
    return b"filigrane/v1/job" + _lp(named.encode("ascii"))


def _asked_before(
    connection: Connection, tenant: str, who: str, request: tuple[str, str]
) -> JobRecord | None:
    """The job of an earlier request with this id."""
    table = tables.jobs
    row = connection.execute(
        select(table.c.id, table.c.request_digest).where(
            table.c.tenant == tenant, table.c.who == who, table.c.request_id == request[0]
        )
    ).one_or_none()
    if row is None:
        return None
    if row.request_digest != request[1]:
        raise AlreadyExists("this request id was used for another job; choose another one.")
    return _job(connection, tenant, str(row.id))


def _is(tenant: str, job: str) -> Any:
    return and_(tables.jobs.c.tenant == tenant, tables.jobs.c.id == job)


def _job(connection: Connection, tenant: str, job: str) -> JobRecord:
    row = connection.execute(select(tables.jobs).where(_is(tenant, job))).one_or_none()
    if row is None:
        raise NotFound("there is no such job here; it may have expired.")
    return _record(row)


def _record(row: Row[Any]) -> JobRecord:
    state = JobState(row.state)
    if state is JobState.WAITING and row.n_done:
        # The table has one word for all that goes on: the count of items says which it is.
        state = JobState.RUNNING
    return JobRecord(
        tenant=row.tenant,
        id=row.id,
        who=row.who,
        state=state,
        options=row.options,
        n_items=row.n_items,
        n_done=row.n_done,
        n_failed=row.n_failed,
        created_at=moment(row.created_at),
        expires_at=moment(row.expires_at),
        finished_at=maybe(row.finished_at),
    )


def _done(
    connection: Connection,
    tenant: str,
    job: str,
    position: int,
    result: bytes,
    *,
    failed: bool = False,
) -> None:
    table, jobs = tables.items, tables.jobs
    changed = connection.execute(
        update(table)
        .where(
            table.c.tenant == tenant,
            table.c.job == job,
            table.c.position == position,
            table.c.content.is_not(None),
        )
        .values(content=None, lease=None, lease_until=None, result=result)
    )
    if changed.rowcount:
        connection.execute(
            update(jobs)
            .where(_is(tenant, job))
            .values(n_done=jobs.c.n_done + 1, n_failed=jobs.c.n_failed + int(failed))
        )


def _settle(connection: Connection, tenant: str, job: str, at: str) -> None:
    """End a job whose last item was done."""
    found = _job(connection, tenant, job)
    if not found.state.ended and found.n_done == found.n_items:
        _end(connection, tenant, job, JobState.DONE, at)


def _end(connection: Connection, tenant: str, job: str, state: JobState, at: str) -> None:
    connection.execute(
        update(tables.jobs)
        .where(_is(tenant, job))
        .values(state=state, finished_at=at, items_key=None)
    )
    _count_open(connection, tenant)


def _delete(connection: Connection, tenant: str, names: Sequence[str]) -> None:
    for table, column in ((tables.items, tables.items.c.job), (tables.jobs, tables.jobs.c.id)):
        connection.execute(delete(table).where(table.c.tenant == tenant, column.in_(names)))
    _count_open(connection, tenant)


def _count_open(connection: Connection, tenant: str) -> None:
    waiting = and_(tables.jobs.c.tenant == tenant, tables.jobs.c.state == JobState.WAITING)
    count = select(func.count()).select_from(tables.jobs).where(waiting).scalar_subquery()
    connection.execute(
        update(tables.tenants).where(tables.tenants.c.tenant == tenant).values(open_jobs=count)
    )
