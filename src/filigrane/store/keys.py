"""The key book: which keys a tenant has, in which state, and what it takes to change that.

Every change is one transaction that also writes the log: there is no version without a record that
commits to it, and none marks before every engine of its model has proved that it has it. Keys
themselves are made in memory when asked for; the database cannot make them without the key
management system, and the system not without the database.
"""

import hmac
import re
import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Row, and_, func, insert, select, update

from filigrane.custody.chain import Fact
from filigrane.custody.hierarchy import MAX_VERSION, KeySpec, TenantSecret, check_name, key_id
from filigrane.custody.states import State, require_move
from filigrane.errors import AlreadyExists, KeyFormatError, NotFound, StateError, StoreDamaged
from filigrane.foreign import ForeignKey
from filigrane.keys import Key
from filigrane.kms.base import KeyManagement
from filigrane.store import archive, checking, tables
from filigrane.store.access import bump, enrolled, maybe, spend_approval
from filigrane.store.database import Clock, Database, lock_tenant, moment, stamp
from filigrane.store.log import Log, append
from filigrane.store.material import Material, commitment_of, new_salt
from filigrane.store.records import EngineRecord, KeyRecord, VersionRecord, parts_of

__all__ = ["KeyBook"]

_REQUEST: Final = re.compile(r"[\x21-\x7e]{1,128}")
_OTHERS: Final = 32
"""How many other versions an engine's proof is held against, the newest first."""


@final
class KeyBook:
    """The keys of all tenants. Thread-safe.

    Everything that changes keys raises StoreError if the database or the log cannot be written and
    KmsUnavailable if the key management system does not answer; nothing was changed then. actor: a
    name for the log, 1 to 128 characters.
    """

    def __init__(
        self,
        database: Database,
        kms: KeyManagement,
        *,
        secret_lifetime_s: float = 600,
        clock: Clock | None = None,
    ) -> None:
        """secret_lifetime_s: how long a tenant's secret serves without asking for it again.

        clock: what time it is; the database's own if not given.
        """
        self._database = database
        self._material = Material(kms, secret_lifetime_s)
        self._clock = clock or database.clock
        self._log = Log(database, kms)
        self._calibrated: set[str] = set()
        self._turn = threading.Lock()

    # Tenants

    def create_tenant(self, tenant: str, *, actor: str) -> None:
        """Make a tenant and the first record of its log. Raises AlreadyExists."""
        at = self._now()
        with self._database.tenant(tenant) as connection:
            known = tables.tenants.c.tenant
            if connection.scalar(select(known).where(known == tenant)) is not None:
                raise AlreadyExists(f"there is a tenant {tenant!r} already.")
            values = {"tenant": tenant, "created_at": at, "revision": 1}
            connection.execute(insert(tables.tenants).values(**values))
            append(connection, tenant, at, actor, "tenant.create", {"tenant": tenant})

    def tenants(self) -> tuple[str, ...]:
        """The names of all tenants; for whoever runs the service."""
        return self._database.tenants()

    # Changes of keys

    def create(self, spec: KeySpec, *, actor: str, request_id: str | None = None) -> VersionRecord:
        """Make a key with its first version, pre-active.

        request_id: 1 to 128 visible characters; asking again with the same one gives the same
        version instead of another. Raises AlreadyExists, NotFound without the tenant.
        """
        if spec.source != "derived":
            raise KeyFormatError("an imported key comes with import_key.")
        return self._make(spec, actor, "key.create", request_id)

    def rotate(
        self, tenant: str, name: str, *, actor: str, request_id: str | None = None
    ) -> VersionRecord:
        """Make the next version of a derived key, pre-active; the active one goes on marking."""
        spec = self._spec(tenant, name)
        if spec.source != "derived":
            raise StateError(f"{name} was imported; its next version comes with import_key.")
        return self._make(spec, actor, "key.rotate", request_id)

    def import_key(self, spec: KeySpec, key: Key | ForeignKey, *, actor: str) -> VersionRecord:
        """Take over a key from elsewhere: a new one, or the next version of an imported one.

        It is stored encrypted, under a data key that the key management system wraps.
        """
        if spec.source != "imported":
            raise KeyFormatError('say source="imported" in the description of an imported key.')
        at = self._now()
        root_version = self._material.root_version()
        with self._database.reading(spec.tenant) as connection:
            number = _next_number(connection, spec)
        made = self._material.import_sealed(spec, number, key)
        with self._database.tenant(spec.tenant) as connection:
            revision = lock_tenant(connection, spec.tenant)
            if _next_number(connection, spec) != number:
                raise AlreadyExists(f"{spec.name} got a version meanwhile; look, and try again.")
            _require_same(connection, spec, at)
            values = {"wrapped_key": made.wrapped_key, "sealed": made.sealed}
            self._insert(
                connection,
                spec,
                number,
                root_version,
                made.commitment,
                at,
                actor,
                "key.import",
                values,
            )
            bump(connection, spec.tenant, revision)
            return _version(connection, spec.tenant, spec.name, number)

    def promote(self, tenant: str, name: str, version: int, *, actor: str) -> VersionRecord:
        """Let a version mark; the one that did is retired in the same moment.

        Raises StateError unless its commitment is in the log, it passes calibration and every
        engine of its model has acknowledged it; NotFound.
        """
        self._calibrate(self.version(tenant, key_id(tenant, name, version)))
        at = self._now()
        with self._database.tenant(tenant) as connection:
            revision = lock_tenant(connection, tenant)
            found = _version(connection, tenant, name, version)
            require_move(found.id, found.state, State.ACTIVE)
            if found.waiting_for:
                raise StateError(
                    f"{found.id} waits for the engines {', '.join(found.waiting_for)}: each has to "
                    "acknowledge it, or be revoked."
                )
            _require_committed(connection, found)
            before = _active(connection, tenant, name)
            if before is not None:
                _set(connection, before, {"state": State.RETIRED, "retired_at": at})
                facts: dict[str, Fact] = {"key": before.id, "replaced_by": found.id}
                append(connection, tenant, at, actor, "key.retire", facts)
            _set(connection, found, {"state": State.ACTIVE, "promoted_at": at})
            facts = {
                "key": found.id,
                "commitment": found.commitment,
                "engines": list(found.acknowledged),
                "calibration_texts": checking.CALIBRATION_TEXTS,
            }
            append(connection, tenant, at, actor, "key.promote", facts)
            bump(connection, tenant, revision)
            return _version(connection, tenant, name, version)

    def retire(self, tenant: str, name: str, version: int, *, actor: str) -> VersionRecord:
        """Let a version mark no more; it goes on reading. Raises StateError, NotFound."""
        at = self._now()
        with self._database.tenant(tenant) as connection:
            revision = lock_tenant(connection, tenant)
            found = _version(connection, tenant, name, version)
            require_move(found.id, found.state, State.RETIRED)
            _set(connection, found, {"state": State.RETIRED, "retired_at": at})
            append(connection, tenant, at, actor, "key.retire", {"key": found.id})
            bump(connection, tenant, revision)
            return _version(connection, tenant, name, version)

    def compromise(
        self, tenant: str, name: str, version: int, *, since: datetime, actor: str
    ) -> VersionRecord:
        """Say that a key may be known to others since a moment: it marks no more, and what it finds
        counts only for texts that provably existed before. Of a compromised one the moment can be
        moved back, never forth. Raises StateError, NotFound.
        """
        now = self._clock()
        if since.tzinfo is None or since > now:
            raise StateError("a key was compromised at a time in the past, with its time zone.")
        at = stamp(now)
        with self._database.tenant(tenant) as connection:
            revision = lock_tenant(connection, tenant)
            found = _version(connection, tenant, name, version)
            require_move(found.id, found.state, State.COMPROMISED)
            known = found.compromised_since
            if known is not None and since >= known:
                raise StateError(
                    f"{found.id} is compromised since {stamp(known)} already; this moment can only "
                    "be moved back."
                )
            values = {"state": State.COMPROMISED, "compromised_since": stamp(since)}
            _set(connection, found, values)
            facts = {"key": found.id, "since": stamp(since)}
            append(connection, tenant, at, actor, "key.compromise", facts)
            bump(connection, tenant, revision)
            return _version(connection, tenant, name, version)

    def destroy(
        self, tenant: str, name: str, version: int, *, actor: str, approval: str
    ) -> VersionRecord:
        """Erase what a version is made from: nobody can mark or read with it ever again.

        approval: the id of one to "destroy" this version's id, given by a second custodian; actor:
        one of the two. Backups and archives made before still hold it, and SQLite's write-ahead log
        while somebody reads (`Database.erase`). Raises StateError, NotFound.
        """
        now = self._clock()
        with self._database.tenant(tenant) as connection:
            revision = lock_tenant(connection, tenant)
            found = _version(connection, tenant, name, version)
            require_move(found.id, found.state, State.DESTROYED)
            spent = spend_approval(connection, tenant, approval, "destroy", found.id, actor, now)
            nothing: dict[str, object] = {"salt": None, "wrapped_key": None, "sealed": None}
            gone = {"state": State.DESTROYED, "destroyed_at": stamp(now)}
            _set(connection, found, gone | nothing)
            facts: dict[str, Fact] = {"key": found.id, "approval": spent.id}
            append(connection, tenant, stamp(now), actor, "key.destroy", facts)
            bump(connection, tenant, revision)
            record = _version(connection, tenant, name, version)
        self._database.erase()
        return record

    def acknowledge(
        self, tenant: str, engine: str, version_id: str, proof: npt.NDArray[np.int64]
    ) -> None:
        """Believe an engine that it has a version.

        proof: (n,) ids of a text that the engine marked with it; its p-value has to be below 1e-9,
        and none below 1e-6 under other versions for the same model. Raises StateError, NotFound.
        """
        record = self.version(tenant, version_id)
        with self._database.reading(tenant) as connection:
            _require_served(connection, record, engine)
            others = [
                other
                for other in _versions(connection, tenant)
                if other.spec.model == record.spec.model
                and other.id != record.id
                and other.state.reads
            ]
        others.sort(key=lambda other: (other.name == record.name, other.log_index), reverse=True)
        checking.require_proof(
            self.key_of(record),
            record.spec,
            ((self.key_of(other), other.spec) for other in others[:_OTHERS]),
            proof,
        )
        at = self._now()
        with self._database.tenant(tenant) as connection:
            revision = lock_tenant(connection, tenant)
            found = _version(connection, tenant, record.name, record.number)
            _require_served(connection, found, engine)
            if engine in found.acknowledged:
                return
            connection.execute(
                insert(tables.acknowledgements).values(
                    tenant=tenant, name=found.name, number=found.number, engine=engine, at=at
                )
            )
            facts: dict[str, Fact] = {"key": found.id, "engine": engine}
            append(connection, tenant, at, f"engine:{engine}", "key.acknowledge", facts)
            bump(connection, tenant, revision)

    # Looking

    def keys(self, tenant: str) -> tuple[KeyRecord, ...]:
        """All keys of a tenant with all their versions, by name. NotFound without the tenant."""
        with self._database.reading(tenant) as connection:
            _revision(connection, tenant)
            found: dict[str, list[VersionRecord]] = {}
            for version in _versions(connection, tenant):
                found.setdefault(version.name, []).append(version)
        return tuple(
            KeyRecord(spec=versions[0].spec, versions=tuple(versions))
            for versions in found.values()
        )

    def version(self, tenant: str, version_id: str) -> VersionRecord:
        """One version by its id, 'acme.chat@3'. Raises NotFound, also for another tenant's."""
        parts = parts_of(version_id)
        if parts is None or parts[0] != tenant:
            raise NotFound("there is no such version of a key here; list the keys to see them.")
        with self._database.reading(tenant) as connection:
            return _version(connection, tenant, parts[1], parts[2])

    def revision(self, tenant: str) -> int:
        """A number that every change of a tenant's keys or engines makes greater; cheap."""
        with self._database.reading(tenant) as connection:
            return _revision(connection, tenant)

    def key_of(self, record: VersionRecord) -> Key | ForeignKey:
        """The key itself, to read or mark with; named by its version's id.

        A Key for a scheme, the numbers of another tool for a profile. Raises NotFound if it was
        destroyed, KmsUnavailable or KmsError, StoreError if what is stored does not make the key
        that was committed to.
        """
        table = tables.versions
        query = select(table.c.salt, table.c.wrapped_key, table.c.sealed, table.c.commitment)
        with self._database.reading(record.tenant) as connection:
            row = connection.execute(query.where(_here(record))).one_or_none()
        if row is None or (row.salt is None and row.sealed is None):
            raise NotFound(f"{record.id} was destroyed, or never was; nothing can be read with it.")
        spec, number = record.spec, record.number
        if row.salt is not None:
            made = self._material.derived(spec, number, record.root_version, bytes(row.salt))
            told = commitment_of(made)
            key = self._material.key(spec, made)
        else:
            key, told = self._material.imported(
                spec, number, bytes(row.wrapped_key), bytes(row.sealed)
            )
        if not hmac.compare_digest(told, record.commitment):
            raise StoreDamaged(
                f"{record.id} is not the key that its commitment promised: the root is another one "
                "or the database was altered. Restore both from backups that belong together."
            )
        return key

    def tenant_secret(self, tenant: str) -> TenantSecret:
        """The tenant's secret under the root's first version, for keyed hashes that last.

        In memory only. Raises KmsUnavailable or KmsError.
        """
        return self._material.secret(tenant, 1)

    def forget(self) -> None:
        """Let go of the tenants' secrets in memory."""
        self._material.forget()

    def for_engine(self, tenant: str, engine: str) -> tuple[VersionRecord, ...]:
        """What an engine should have: versions of its models that are pre-active (to be proved) or
        active (to mark with). NotFound for an unknown or revoked engine.
        """
        with self._database.reading(tenant) as connection:
            its = _require_engine(connection, tenant, engine)
            useful = (State.PRE_ACTIVE, State.ACTIVE)
            return tuple(
                version
                for version in _versions(connection, tenant)
                if version.spec.model in its.models and version.state in useful
            )

    # Archives

    def export_archive(self, tenant: str, *, actor: str = "operator") -> bytes:
        """All that is needed, with the key management system, to read this tenant's texts again:
        keys, versions, salts, wrapped keys, engines and the log, as signed JSON. Tokens, approvals
        and jobs are not in it.
        """
        return archive.export(self._database, self._log, tenant, actor)

    def import_archive(self, data: bytes, *, actor: str) -> int:
        """Restore a tenant that is not here from an archive; how many versions it has.

        Raises AuditError if the archive was altered or signed under another root, AlreadyExists if
        the tenant is here.
        """
        return archive.restore(self._database, self._log, data, actor)

    # Inside

    def _now(self) -> str:
        return stamp(self._clock())

    def _spec(self, tenant: str, name: str) -> KeySpec:
        with self._database.reading(tenant) as connection:
            return _key(connection, tenant, name)

    def _make(self, spec: KeySpec, actor: str, kind: str, request_id: str | None) -> VersionRecord:
        if request_id is not None and not _REQUEST.fullmatch(request_id):
            raise KeyFormatError("a request id has 1 to 128 visible ASCII characters.")
        tenant, name = spec.tenant, spec.name
        at, salt = self._now(), new_salt()
        root_version = self._material.root_version()
        # Asked for before the transaction: nobody waits for a lock while a system is slow.
        self._material.secret(tenant, root_version)
        with self._database.tenant(tenant) as connection:
            revision = lock_tenant(connection, tenant)
            before = _asked_before(connection, spec, kind, request_id)
            if before is not None:
                return before
            number = _next_number(connection, spec)
            if kind == "key.create":
                if number != 1:
                    raise AlreadyExists(f"there is a key {name!r} already; rotate it instead.")
                _insert_key(connection, spec, at)
            told = commitment_of(self._material.derived(spec, number, root_version, salt))
            values: dict[str, object] = {"salt": salt, "request_id": request_id}
            self._insert(connection, spec, number, root_version, told, at, actor, kind, values)
            bump(connection, tenant, revision)
            return _version(connection, tenant, name, number)

    def _insert(
        self,
        connection: Connection,
        spec: KeySpec,
        number: int,
        root_version: int,
        commitment: str,
        at: str,
        actor: str,
        kind: str,
        values: Mapping[str, object],
    ) -> None:
        """A version and the record that commits to it."""
        facts: dict[str, Fact] = {
            "key": key_id(spec.tenant, spec.name, number),
            "commitment": commitment,
            "model": spec.model,
            "mark": spec.mark,
            "tokenizer_sha256": spec.tokenizer_sha256,
            "slots": spec.slots,
            "source": spec.source,
            "root_version": root_version,
        }
        index = append(connection, spec.tenant, at, actor, kind, facts)
        connection.execute(
            insert(tables.versions).values(
                tenant=spec.tenant,
                name=spec.name,
                number=number,
                state=State.PRE_ACTIVE,
                root_version=root_version,
                commitment=commitment,
                log_index=index,
                created_at=at,
                **values,
            )
        )

    def _calibrate(self, record: VersionRecord) -> None:
        with self._turn:
            if record.commitment in self._calibrated:
                return
        checking.calibrate(self.key_of(record), record.spec)
        with self._turn:
            self._calibrated.add(record.commitment)


def _revision(connection: Connection, tenant: str) -> int:
    table = tables.tenants
    found = connection.scalar(select(table.c.revision).where(table.c.tenant == tenant))
    if found is None:
        raise NotFound(f"there is no tenant {tenant!r} here; make it first.")
    return int(found)


def _key(connection: Connection, tenant: str, name: str) -> KeySpec:
    check_name("key", name)
    table = tables.keys
    query = select(table).where(table.c.tenant == tenant, table.c.name == name)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound("there is no such key here; list the keys to see their names.")
    return spec_of(row)


def spec_of(row: Row[Any]) -> KeySpec:
    """What a row of the table of keys says."""
    return KeySpec(
        tenant=row.tenant,
        name=row.name,
        model=row.model,
        scheme=row.scheme,
        profile=row.profile,
        tokenizer_sha256=row.tokenizer_sha256,
        slots=row.slots,
        source=row.source,
    )


def _insert_key(connection: Connection, spec: KeySpec, at: str) -> None:
    connection.execute(
        insert(tables.keys).values(
            tenant=spec.tenant,
            name=spec.name,
            model=spec.model,
            scheme=spec.scheme,
            profile=spec.profile,
            tokenizer_sha256=spec.tokenizer_sha256,
            slots=spec.slots,
            source=spec.source,
            created_at=at,
        )
    )


def _require_same(connection: Connection, spec: KeySpec, at: str) -> None:
    """Insert the key of an import, or hold the import to what the key is already."""
    try:
        known = _key(connection, spec.tenant, spec.name)
    except NotFound:
        _insert_key(connection, spec, at)
        return
    if known != spec:
        raise AlreadyExists(
            f"there is a key {spec.name!r} for another model or mark, or a derived one; choose "
            "another name."
        )


def _next_number(connection: Connection, spec: KeySpec) -> int:
    table = tables.versions
    last = connection.scalar(
        select(func.max(table.c.number)).where(
            table.c.tenant == spec.tenant, table.c.name == spec.name
        )
    )
    number = 1 if last is None else int(last) + 1
    if number > MAX_VERSION:
        raise StateError(f"a key has at most {MAX_VERSION} versions; make another key.")
    return number


def _asked_before(
    connection: Connection, spec: KeySpec, kind: str, request_id: str | None
) -> VersionRecord | None:
    """What the same request made the first time."""
    if request_id is None:
        return None
    table = tables.versions
    row = connection.execute(
        select(table.c.name, table.c.number).where(
            table.c.tenant == spec.tenant, table.c.request_id == request_id
        )
    ).one_or_none()
    if row is None:
        return None
    found = _version(connection, spec.tenant, row.name, row.number)
    if found.spec != spec or (found.number == 1) != (kind == "key.create"):
        raise AlreadyExists("this request id was used for something else; choose another one.")
    return found


def _require_committed(connection: Connection, record: VersionRecord) -> None:
    """The log says of this version what the table says; the table could have been altered."""
    table = tables.log
    query = select(table.c.facts).where(
        table.c.tenant == record.tenant, table.c.position == record.log_index
    )
    facts = connection.scalar(query)
    committed = archive.committed(facts)
    if committed != (record.id, record.commitment):
        raise StateError(
            f"the log does not commit to {record.id}: the database was altered. Rotate the key."
        )


def _require_engine(connection: Connection, tenant: str, engine: str) -> EngineRecord:
    for found in enrolled(connection, tenant):
        if found.name == engine and found.revoked_at is None:
            return found
    raise NotFound("there is no such engine here, or it was revoked; enrol it.")


def _require_served(connection: Connection, record: VersionRecord, engine: str) -> None:
    its = _require_engine(connection, record.tenant, engine)
    if record.spec.model not in its.models:
        raise StateError(f"{record.id} is for the model {record.spec.model}, which {engine} lacks.")
    if record.state not in (State.PRE_ACTIVE, State.ACTIVE):
        raise StateError(f"{record.id} is {record.state}; there is nothing to acknowledge.")


def _here(record: VersionRecord) -> Any:
    table = tables.versions
    return and_(
        table.c.tenant == record.tenant,
        table.c.name == record.name,
        table.c.number == record.number,
    )


def _set(connection: Connection, record: VersionRecord, values: Mapping[str, object]) -> None:
    connection.execute(update(tables.versions).where(_here(record)).values(**values))


def _active(connection: Connection, tenant: str, name: str) -> VersionRecord | None:
    found = (version for version in _versions(connection, tenant, name) if version.state.marks)
    return next(found, None)


def _version(connection: Connection, tenant: str, name: str, number: int) -> VersionRecord:
    check_name("key", name)
    found = _versions(connection, tenant, name, number)
    if not found:
        raise NotFound("there is no such version of a key here; list the keys to see them.")
    return found[0]


def _versions(
    connection: Connection, tenant: str, name: str | None = None, number: int | None = None
) -> list[VersionRecord]:
    """Versions of a tenant, of one key or one alone, by name and number."""
    keys, table, said = tables.keys, tables.versions, tables.acknowledgements
    columns = [column for column in table.c if column.name not in ("salt", "wrapped_key", "sealed")]
    query = select(*columns).where(table.c.tenant == tenant)
    known = select(keys).where(keys.c.tenant == tenant)
    given = select(said.c.name, said.c.number, said.c.engine).where(said.c.tenant == tenant)
    if name is not None:
        query, known = query.where(table.c.name == name), known.where(keys.c.name == name)
        given = given.where(said.c.name == name)
    if number is not None:
        query, given = query.where(table.c.number == number), given.where(said.c.number == number)
    specs = {row.name: spec_of(row) for row in connection.execute(known)}
    engines = [engine for engine in enrolled(connection, tenant) if engine.revoked_at is None]
    acknowledged: dict[tuple[str, int], list[str]] = {}
    for row in connection.execute(given.order_by(said.c.engine)):
        acknowledged.setdefault((row.name, row.number), []).append(row.engine)
    found = connection.execute(query.order_by(table.c.name, table.c.number))
    return [
        _record(row, specs[row.name], acknowledged.get((row.name, row.number), []), engines)
        for row in found
    ]


def _record(
    row: Row[Any], spec: KeySpec, acknowledged: list[str], engines: list[EngineRecord]
) -> VersionRecord:
    state = State(row.state)
    waiting: tuple[str, ...] = ()
    if state in (State.PRE_ACTIVE, State.ACTIVE):
        waiting = tuple(
            engine.name
            for engine in engines
            if spec.model in engine.models and engine.name not in acknowledged
        )
    return VersionRecord(
        tenant=row.tenant,
        name=row.name,
        number=row.number,
        id=key_id(row.tenant, row.name, row.number),
        state=state,
        spec=spec,
        root_version=row.root_version,
        commitment=row.commitment,
        log_index=row.log_index,
        created_at=moment(row.created_at),
        promoted_at=maybe(row.promoted_at),
        retired_at=maybe(row.retired_at),
        compromised_since=maybe(row.compromised_since),
        destroyed_at=maybe(row.destroyed_at),
        acknowledged=tuple(acknowledged),
        waiting_for=waiting,
    )
