"""The audit log of each tenant in the database: appended to, signed, proved and exported.

What a log is, and how others verify it, stands in `filigrane.custody`; this module knows where its
rows are. Signing keys come from the key management system and live in memory only.
"""

import collections
import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final, final

from sqlalchemy import Connection, Row, func, insert, select

from filigrane.custody import chain, checkpoints
from filigrane.custody.chain import Fact, Record
from filigrane.custody.checkpoints import Checkpoint, Signer
from filigrane.custody.merkle import Tree
from filigrane.errors import AuditError, NotFound
from filigrane.kms.base import KeyManagement
from filigrane.store import tables
from filigrane.store.database import Database, lock_tenant, stamp

__all__ = ["Log", "Signers"]

_BATCH: Final = 1000
_TREES: Final = 64


@final
class Signers:
    """The signing keys of all versions of the root for one purpose; made once, kept in memory."""

    def __init__(self, kms: KeyManagement, purpose: bytes) -> None:
        """purpose: checkpoints.SIGN_LOG or checkpoints.SIGN_RECEIPT."""
        self._kms = kms
        self._purpose = purpose
        self._name = {checkpoints.SIGN_LOG: "log", checkpoints.SIGN_RECEIPT: "receipt"}[purpose]
        self._made: dict[int, Signer] = {}
        self._turn = threading.Lock()

    def current(self) -> Signer:
        """The key of the current root version. Raises KmsUnavailable or KmsError."""
        return self._of(max(self._kms.versions()))

    def jwks(self) -> dict[str, Any]:
        """The public keys of all versions, as a JWK set: what was signed once stays verifiable."""
        return {"keys": [self._of(version).public_jwk() for version in self._kms.versions()]}

    def _of(self, version: int) -> Signer:
        with self._turn:
            if version not in self._made:
                mac = self._kms.mac(version, self._purpose)
                self._made[version] = checkpoints.signer(mac, f"{self._name}-{version}")
            return self._made[version]


@final
class Log:
    """The logs of all tenants. Thread-safe."""

    def __init__(self, database: Database, kms: KeyManagement) -> None:
        self._database = database
        self._signers = Signers(kms, checkpoints.SIGN_LOG)
        self._trees: collections.OrderedDict[str, tuple[Tree, bytes]] = collections.OrderedDict()
        self._turn = threading.Lock()
        self._damaged: dict[str, str] = {}

    def append(
        self,
        tenant: str,
        actor: str,
        kind: str,
        facts: Mapping[str, Fact],
        *,
        connection: Connection | None = None,
    ) -> int:
        """Add a record and return its index.

        connection: of a transaction of this tenant (`Database.tenant`), with which the record comes
        to be or not. Raises NotFound without the tenant, StoreError, AuditError for facts that a
        log cannot hold.
        """
        if connection is not None:
            return append(connection, tenant, self._now(), actor, kind, facts)
        with self._database.tenant(tenant) as own:
            return append(own, tenant, self._now(), actor, kind, facts)

    def size(self, tenant: str) -> int:
        """How many records there are. NotFound without the tenant."""
        with self._database.reading(tenant) as connection:
            _require_tenant(connection, tenant)
            return _size(connection, tenant)

    def records(self, tenant: str, start: int = 0, stop: int | None = None) -> tuple[Record, ...]:
        """Records start to stop - 1, or to the last. NotFound without the tenant."""
        with self._database.reading(tenant) as connection:
            _require_tenant(connection, tenant)
            return tuple(_record(row) for row in rows(connection, tenant, start, stop))

    def checkpoint(self, tenant: str) -> Checkpoint:
        """Sign the log as it is now, and keep that; the latest one if nothing was added since.

        Raises NotFound, StoreError, KmsUnavailable, or AuditError as `verify` does: nothing is
        signed that contradicts what was signed before.
        """
        self.verify(tenant)
        signer = self._signers.current()
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            with self._tree(connection, tenant) as (tree, head):
                known = _checkpoint(connection, tenant, len(tree))
                if known is not None:
                    return known
                point = checkpoints.sign_checkpoint(
                    tenant,
                    size=len(tree),
                    head=head,
                    root=tree.root(),
                    at=self._now(),
                    signer=signer,
                )
            connection.execute(insert(tables.checkpoints).values(**point.to_json()))
            return point

    def verify(self, tenant: str) -> None:
        """Hold the rows to the chain that they make and to every checkpoint that is stored.

        Reads what is new since the last time in this process; the first time, the whole log.
        Somebody who can rewrite records, hashes and checkpoints, all of them, is found out by a
        checkpoint that is kept elsewhere alone. Raises NotFound, StoreError, KmsUnavailable,
        AuditError.
        """
        # Reading first: a long log must not keep others from writing.
        with self._reading_tree(tenant):
            pass

    def check(self) -> None:
        """Raise AuditError if a log that this process has read was found altered."""
        # Without the lock, which is held while a long log is read.
        for said in list(self._damaged.values()):
            raise AuditError(said)

    def latest(self, tenant: str) -> Checkpoint | None:
        """The checkpoint that covers most, or None. NotFound without the tenant."""
        with self._database.reading(tenant) as connection:
            _require_tenant(connection, tenant)
            return _checkpoint(connection, tenant, None)

    def previous(self, tenant: str, index: int) -> str:
        """The hash that record `index` is linked to, 64 hex digits, genesis for the first.

        With it and the record anybody can compute the leaf that `inclusion` proves. Raises NotFound
        without the tenant or such a record.
        """
        with self._database.reading(tenant) as connection:
            _require_tenant(connection, tenant)
            found = _hash(connection, tenant, index - 1)
        if found is None or index < 0:
            raise NotFound(f"the log of {tenant} has no record before {index}.")
        return found.hex()

    def inclusion(self, tenant: str, index: int, size: int) -> list[str]:
        """The RFC 6962 proof that record `index` is among the first `size`; hex, leaf side first.

        Raises AuditError if it is not, NotFound without the tenant.
        """
        with self._reading_tree(tenant) as tree:
            return [part.hex() for part in tree.inclusion(index, size)]

    def consistency(self, tenant: str, old: int, size: int) -> list[str]:
        """The proof that the log of `size` records extends that of `old`; hex. Or AuditError."""
        with self._reading_tree(tenant) as tree:
            return [part.hex() for part in tree.consistency(old, size)]

    def export(self, tenant: str, out: BinaryIO) -> int:
        """Write the log as JSON lines, as `verification.verify_log` reads it; how many records.

        First {"jwks": ...}, for convenience: it proves nothing; then records, each checkpoint after
        the last record that it covers. The last line is a checkpoint over all of it, signed now if
        there was none; what is added meanwhile is left out. A log that was altered is not signed
        and written as it is, for whoever looks into it: `check` raises then. Raises NotFound,
        StoreError, KmsUnavailable.
        """
        write_line(out, {"jwks": self.jwks()})
        try:
            stop = self.checkpoint(tenant).size
        except AuditError:
            stop = None
        with self._database.reading(tenant) as connection:
            _require_tenant(connection, tenant)
            return export(connection, tenant, out, stop)

    def jwks(self) -> dict[str, Any]:
        """The public keys that checkpoints verify with, a JWK set (RFC 7517)."""
        return self._signers.jwks()

    def signer(self) -> Signer:
        """The key that signs checkpoints now. Raises KmsUnavailable or KmsError."""
        return self._signers.current()

    def _now(self) -> str:
        return stamp(self._database.clock())

    @contextlib.contextmanager
    def _reading_tree(self, tenant: str) -> Iterator[Tree]:
        with self._database.reading(tenant) as connection:
            _require_tenant(connection, tenant)
            with self._tree(connection, tenant) as (tree, _):
                yield tree

    @contextlib.contextmanager
    def _tree(self, connection: Connection, tenant: str) -> Iterator[tuple[Tree, bytes]]:
        """The tree over all records, and the last one's hash; nobody else uses it meanwhile.

        Rows that are new to it have to continue the chain, which has no key: whoever writes the
        database can make a new one. So they also have to lead to the checkpoints that were signed
        over them. Raises AuditError.
        """
        with self._turn:
            tree, head = self._trees.pop(tenant, (Tree(), chain.genesis(tenant)))
            if len(tree) and _hash(connection, tenant, len(tree) - 1) != head:
                # Another database than before, or one that was restored.
                tree, head = Tree(), chain.genesis(tenant)
            try:
                head = self._extend(connection, tenant, tree, head)
            except AuditError as error:
                self._damaged[tenant] = str(error)
                raise
            self._damaged.pop(tenant, None)
            self._trees[tenant] = (tree, head)
            while len(self._trees) > _TREES:
                self._trees.popitem(last=False)
            yield tree, head

    def _extend(self, connection: Connection, tenant: str, tree: Tree, head: bytes) -> bytes:
        """Bring a tree up to the last row, and hold it to checkpoints; the head."""
        points = collections.deque(_points(connection, tenant, len(tree)))
        jwks = self.jwks() if points else {}
        self._hold(points, jwks, tree, head)
        for row in rows(connection, tenant, len(tree), None):
            record = _record(row)
            head = chain.link(head, record)
            if record.index != len(tree) or head != bytes(row.hash):
                raise AuditError(
                    f"record {len(tree)} of {tenant}'s log was altered or removed in the "
                    "database; restore it from a backup, and find out who did it."
                )
            tree.append(head)
            self._hold(points, jwks, tree, head)
        if points:
            raise AuditError(
                f"the log of {tenant} has {len(tree)} records, and {points[0].size} were signed: "
                "the end was cut off. Restore it from a backup, and find out who did it."
            )
        return head

    def _hold(
        self,
        points: collections.deque[Checkpoint],
        jwks: Mapping[str, Any],
        tree: Tree,
        head: bytes,
    ) -> None:
        """Take the checkpoint over as many records as there are in the tree, if it is next."""
        if not points or points[0].size != len(tree):
            return
        point = points.popleft()
        checkpoints.verify_checkpoint(point, jwks)
        if (point.head, point.root) != (head.hex(), tree.root().hex()):
            raise AuditError(
                f"the first {point.size} records of {point.tenant}'s log are not those that were "
                f"signed on {point.at}: they were written anew. Restore the log from a backup, and "
                "find out who did it."
            )


def append(
    connection: Connection,
    tenant: str,
    at: str,
    actor: str,
    kind: str,
    facts: Mapping[str, Fact],
) -> int:
    """Add a record inside a transaction; its index."""
    lock_tenant(connection, tenant)
    index = _size(connection, tenant)
    previous = _hash(connection, tenant, index - 1)
    assert previous is not None
    record = Record(tenant=tenant, index=index, at=at, actor=actor, kind=kind, facts=facts)
    connection.execute(
        insert(tables.log).values(
            tenant=tenant,
            position=index,
            at=at,
            actor=actor,
            kind=kind,
            facts=json.dumps(dict(record.facts), sort_keys=True, separators=(",", ":")),
            hash=chain.link(previous, record),
        )
    )
    return index


def rows(connection: Connection, tenant: str, start: int, stop: int | None) -> Iterator[Row[Any]]:
    """Rows of the log, ascending, a batch at a time."""
    table = tables.log
    query = select(table).where(table.c.tenant == tenant).order_by(table.c.position).limit(_BATCH)
    at = start
    while True:
        wanted = query.where(table.c.position >= at)
        if stop is not None:
            wanted = wanted.where(table.c.position < stop)
        found = connection.execute(wanted).all()
        yield from found
        if len(found) < _BATCH:
            return
        at = found[-1].position + 1


def export(connection: Connection, tenant: str, out: BinaryIO, stop: int | None = None) -> int:
    """Write records, all or the first `stop`, and their checkpoints as JSON lines; how many."""
    points = collections.deque(_points(connection, tenant, 0))
    count = 0
    while points and points[0].size == 0:
        write_line(out, {"checkpoint": points.popleft().to_json()})
    for row in rows(connection, tenant, 0, stop):
        write_line(out, {"record": _record(row).to_json(), "hash": bytes(row.hash).hex()})
        count += 1
        while points and points[0].size == count:
            write_line(out, {"checkpoint": points.popleft().to_json()})
    return count


def write_line(out: BinaryIO, value: Mapping[str, Any]) -> None:
    """One JSON object on a line."""
    out.write(json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n")


def _size(connection: Connection, tenant: str) -> int:
    # Counted from the last one: a log without gaps is what everything else makes sure of.
    last = connection.scalar(
        select(func.max(tables.log.c.position)).where(tables.log.c.tenant == tenant)
    )
    return 0 if last is None else int(last) + 1


def _hash(connection: Connection, tenant: str, index: int) -> bytes | None:
    """The hash of a record, genesis before the first one; None if there is no such record."""
    if index < 0:
        return chain.genesis(tenant)
    table = tables.log
    found = connection.scalar(
        select(table.c.hash).where(table.c.tenant == tenant, table.c.position == index)
    )
    return None if found is None else bytes(found)


def _record(row: Row[Any]) -> Record:
    return Record(
        tenant=row.tenant,
        index=row.position,
        at=row.at,
        actor=row.actor,
        kind=row.kind,
        facts=json.loads(row.facts),
    )


def _point(row: Row[Any]) -> Checkpoint:
    return Checkpoint(**row._mapping)


def _points(connection: Connection, tenant: str, size: int) -> list[Checkpoint]:
    """Checkpoints over so many records or more, ascending."""
    table = tables.checkpoints
    query = select(table).where(table.c.tenant == tenant, table.c.size >= size)
    return [_point(row) for row in connection.execute(query.order_by(table.c.size))]


def _checkpoint(connection: Connection, tenant: str, size: int | None) -> Checkpoint | None:
    table = tables.checkpoints
    query = select(table).where(table.c.tenant == tenant)
    if size is not None:
        query = query.where(table.c.size == size)
    row = connection.execute(query.order_by(table.c.size.desc()).limit(1)).one_or_none()
    return None if row is None else _point(row)


def _require_tenant(connection: Connection, tenant: str) -> None:
    table = tables.tenants
    if connection.scalar(select(table.c.tenant).where(table.c.tenant == tenant)) is None:
        raise NotFound(f"there is no tenant {tenant!r} here; make it first.")
