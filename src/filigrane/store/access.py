"""Who may do what: API tokens, engines and approvals of one tenant each.

A token reads fgt_<tenant>_<id>_<secret>: it names its tenant, so that the right rows can be looked
at, and the database holds only SHA-256 of the secret's 260 random bits. Nothing here knows HTTP.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, final

from sqlalchemy import Connection, Row, insert, select, update

from filigrane.custody.chain import Fact
from filigrane.custody.hierarchy import check_name
from filigrane.errors import AlreadyExists, KeyFormatError, NotFound, StateError
from filigrane.store import tables
from filigrane.store.database import Database, lock_tenant, moment, stamp
from filigrane.store.log import append
from filigrane.store.records import (
    APPROVAL_ROLES,
    Approval,
    EngineRecord,
    Principal,
    Role,
    TokenRecord,
    parts_of,
)

__all__ = ["APPROVAL_ROLES", "Access", "Principal", "Role", "spend_approval"]

_TOKEN: Final = re.compile(r"fgt_([a-z0-9][a-z0-9-]{0,23})_([a-z0-9]{12})_([a-z2-7]{52})")
_PERSON: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_COORDINATE: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_RESERVED: Final = re.compile(r"oidc[.@].*|operator|public|readyz", re.IGNORECASE)
"""What the log calls people of the identity provider, the operator and the service itself."""
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz234567"
_NOBODY: Final = "0" * 64
_APPROVAL_LIFETIME: Final = timedelta(hours=24)
_SEEN_EVERY: Final = timedelta(seconds=60)


@final
class Access:
    """The tokens, engines and approvals of all tenants. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Tokens

    def issue_token(
        self,
        tenant: str,
        name: str,
        roles: Sequence[Role] | frozenset[Role],
        *,
        engine: str | None = None,
        expires_at: datetime | None = None,
        actor: str,
    ) -> str:
        """A new token, shown this once. Treat what comes back as a secret.

        name: of the person or machine, 1 to 64 of A-Z a-z 0-9 . _ @ + -, and none that the log uses
        otherwise; one name is one person in approvals. engine: an enrolled one; exactly with the
        role engine, which stands alone.
        Raises KeyFormatError, NotFound, StateError.
        """
        _check_person(name)
        if _RESERVED.fullmatch(name):
            raise KeyFormatError(
                "operator, public, readyz and what begins with oidc. or oidc@ are names of others "
                "in the log; choose another one."
            )
        granted = frozenset(Role(role) for role in roles)
        if not granted:
            raise KeyFormatError("a token without a role opens nothing; name at least one.")
        if (Role.ENGINE in granted) != (engine is not None) or (engine and len(granted) > 1):
            raise KeyFormatError("the token of an engine names it and has the role engine alone.")
        at = self._database.clock()
        if expires_at is not None and expires_at <= at:
            raise StateError("this token would have expired already; choose a later time.")
        token_id = "".join(secrets.choice(_LETTERS) for _ in range(12))
        secret = "".join(secrets.choice(_LETTERS) for _ in range(52))
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            if engine is not None and _engine(connection, tenant, engine).revoked_at is not None:
                raise StateError(f"engine {engine} is revoked; enrol another one.")
            connection.execute(
                insert(tables.tokens).values(
                    tenant=tenant,
                    id=token_id,
                    name=name,
                    roles=json.dumps(sorted(granted)),
                    engine=engine,
                    digest=_digest(secret),
                    created_at=stamp(at),
                    expires_at=None if expires_at is None else stamp(expires_at),
                )
            )
            facts: dict[str, Fact] = {
                "token": token_id,
                "name": name,
                "roles": [str(role) for role in sorted(granted)],
                "engine": engine,
                "expires_at": None if expires_at is None else stamp(expires_at),
            }
            append(connection, tenant, stamp(at), actor, "token.issue", facts)
        return f"fgt_{tenant}_{token_id}_{secret}"

    def revoke_token(self, tenant: str, token_id: str, *, actor: str) -> None:
        """Let a token open nothing any more. Raises NotFound, StateError if it was revoked."""
        table = tables.tokens
        at = stamp(self._database.clock())
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            here = (table.c.tenant == tenant) & (table.c.id == token_id)
            row = connection.execute(select(table).where(here)).one_or_none()
            if row is None:
                raise NotFound("there is no such token here; list them to see their ids.")
            if row.revoked_at is not None:
                raise StateError(f"token {token_id} was revoked before.")
            connection.execute(update(table).where(here).values(revoked_at=at))
            facts = {"token": token_id, "name": str(row.name)}
            append(connection, tenant, at, actor, "token.revoke", facts)

    def tokens(self, tenant: str) -> tuple[TokenRecord, ...]:
        """All tokens ever issued, oldest first, without their secrets."""
        table = tables.tokens
        query = select(table).where(table.c.tenant == tenant).order_by(table.c.created_at)
        with self._database.reading(tenant) as connection:
            return tuple(_token(row) for row in connection.execute(query))

    def authenticate(self, token: str) -> Principal:
        """Who shows this token.

        Raises NotFound, always with the same words, for a forged, expired, revoked or damaged one,
        and StoreError if the database cannot say.
        """
        refusal = NotFound("this token opens nothing here; ask for a new one.")
        parsed = _TOKEN.fullmatch(token)
        if parsed is None:
            raise refusal
        tenant, token_id, secret = parsed.groups()
        table = tables.tokens
        query = select(table).where(table.c.tenant == tenant, table.c.id == token_id)
        with self._database.reading(tenant) as connection:
            row = connection.execute(query).one_or_none()
        known = _NOBODY if row is None else str(row.digest)
        same = hmac.compare_digest(_digest(secret), known)
        if row is None or not same or row.revoked_at is not None:
            raise refusal
        if row.expires_at is not None and moment(row.expires_at) <= self._database.clock():
            raise refusal
        found = _token(row)
        return Principal(
            tenant=tenant,
            name=found.name,
            roles=found.roles,
            engine=found.engine,
            token_id=found.id,
        )

    # Engines

    def enrol_engine(
        self,
        tenant: str,
        name: str,
        models: Sequence[str],
        public_key: Mapping[str, str],
        *,
        actor: str,
    ) -> EngineRecord:
        """Let a server that marks in. From then on promotions wait for it.

        models: those it serves; public_key: its identity, a JWK of kty OKP and crv X25519 without
        the private part. Raises KeyFormatError, AlreadyExists, NotFound without the tenant.
        """
        _check_person(name)
        served = tuple(dict.fromkeys(models))
        if not served:
            raise KeyFormatError("an engine serves at least one model; name it.")
        for model in served:
            check_name("model", model)
        key = _public_key(public_key)
        at = stamp(self._database.clock())
        with self._database.tenant(tenant) as connection:
            revision = lock_tenant(connection, tenant)
            if _find_engine(connection, tenant, name) is not None:
                raise AlreadyExists(f"there is, or was, an engine {name!r}; choose another name.")
            connection.execute(
                insert(tables.engines).values(
                    tenant=tenant,
                    name=name,
                    models=json.dumps(served),
                    public_key=json.dumps(key, sort_keys=True),
                    enrolled_at=at,
                )
            )
            facts: dict[str, Fact] = {
                "engine": name,
                "models": list(served),
                "public_key": key["x"],
            }
            append(connection, tenant, at, actor, "engine.enrol", facts)
            # Whom a version waits for has changed.
            bump(connection, tenant, revision)
            return _engine(connection, tenant, name)

    def revoke_engine(self, tenant: str, name: str, *, actor: str) -> None:
        """Let a server out: no more leases, its tokens end, nobody waits for it.

        Raises NotFound, or StateError if it was revoked before.
        """
        at = stamp(self._database.clock())
        with self._database.tenant(tenant) as connection:
            revision = lock_tenant(connection, tenant)
            if _engine(connection, tenant, name).revoked_at is not None:
                raise StateError(f"engine {name} was revoked before.")
            for table, column in ((tables.engines, "name"), (tables.tokens, "engine")):
                here = (table.c.tenant == tenant) & (table.c[column] == name)
                connection.execute(
                    update(table).where(here, table.c.revoked_at.is_(None)).values(revoked_at=at)
                )
            append(connection, tenant, at, actor, "engine.revoke", {"engine": name})
            bump(connection, tenant, revision)

    def engines(self, tenant: str) -> tuple[EngineRecord, ...]:
        """All engines ever enrolled, by name."""
        with self._database.reading(tenant) as connection:
            return enrolled(connection, tenant)

    def engine(self, tenant: str, name: str) -> EngineRecord:
        """One engine. Raises NotFound."""
        with self._database.reading(tenant) as connection:
            return _engine(connection, tenant, name)

    def seen(self, tenant: str, engine: str) -> None:
        """Note that an engine came by; written at most once a minute."""
        table = tables.engines
        at = self._database.clock()
        here = (table.c.tenant == tenant) & (table.c.name == engine)
        with self._database.reading(tenant) as connection:
            last = _engine(connection, tenant, engine).last_seen_at
        if last is not None and at - last < _SEEN_EVERY:
            return
        with self._database.tenant(tenant) as connection:
            connection.execute(update(table).where(here).values(last_seen_at=stamp(at)))

    # Approvals

    def request_approval(
        self,
        tenant: str,
        kind: str,
        subject: str,
        purpose: str,
        who: Principal,
        *,
        lifetime: timedelta = _APPROVAL_LIFETIME,
    ) -> Approval:
        """Ask a second person to agree to something, once.

        kind: "destroy" or "trace"; subject: what to, 1 to 200 characters, to destroy the id of a
        version that there is; purpose: why, 1 to 1000 characters, kept in the log for ever. Raises
        KeyFormatError, NotFound, StateError if `who` may not.
        """
        _require_role(tenant, kind, who)
        for what, value, most in (("a subject", subject, 200), ("a purpose", purpose, 1000)):
            if not 1 <= len(value.strip()) <= most or not value.isprintable():
                raise KeyFormatError(f"{what} has 1 to {most} characters, all of them visible.")
        at = self._database.clock()
        approval_id = secrets.token_hex(8)
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            if kind == "destroy":
                _require_version(connection, tenant, subject)
            connection.execute(
                insert(tables.approvals).values(
                    tenant=tenant,
                    id=approval_id,
                    kind=kind,
                    subject=subject,
                    purpose=purpose,
                    requested_by=who.name,
                    requested_token=who.token_id or None,
                    requested_at=stamp(at),
                    expires_at=stamp(at + lifetime),
                )
            )
            facts = {"approval": approval_id, "for": kind, "subject": subject, "purpose": purpose}
            append(connection, tenant, stamp(at), who.name, "approval.request", facts)
            return _find_approval(connection, tenant, approval_id)

    def approve(self, tenant: str, approval_id: str, who: Principal) -> Approval:
        """Agree, as a second person.

        Raises NotFound, StateError for the same person, another role, or what expired, was used or
        approved before.
        """
        at = self._database.clock()
        table = tables.approvals
        with self._database.tenant(tenant) as connection:
            lock_tenant(connection, tenant)
            found = _find_approval(connection, tenant, approval_id)
            _require_role(tenant, found.kind, who)
            if who.name == found.requested_by:
                raise StateError("who asked cannot also approve; ask another person.")
            if found.approved_by is not None:
                raise StateError(f"approval {approval_id} was given before.")
            if found.expires_at <= at:
                raise StateError(f"approval {approval_id} expired; ask for it again.")
            here = (table.c.tenant == tenant) & (table.c.id == approval_id)
            given = {
                "approved_by": who.name,
                "approved_token": who.token_id or None,
                "approved_at": stamp(at),
            }
            connection.execute(update(table).where(here).values(given))
            facts = {"approval": approval_id, "for": found.kind, "subject": found.subject}
            append(connection, tenant, stamp(at), who.name, "approval.give", facts)
            return _find_approval(connection, tenant, approval_id)

    def approval(self, tenant: str, approval_id: str) -> Approval:
        """One approval. Raises NotFound."""
        with self._database.reading(tenant) as connection:
            return _find_approval(connection, tenant, approval_id)

    def approvals(self, tenant: str) -> tuple[Approval, ...]:
        """All approvals, oldest first."""
        table = tables.approvals
        query = select(table).where(table.c.tenant == tenant)
        with self._database.reading(tenant) as connection:
            found = connection.execute(query.order_by(table.c.requested_at, table.c.id))
            return tuple(_approval(row) for row in found)

    def spend_approval(
        self,
        tenant: str,
        approval_id: str,
        *,
        kind: str,
        subject: str,
        actor: str,
        again: bool = False,
        connection: Connection | None = None,
    ) -> Approval:
        """Use an approval, which can be done once.

        again: whether who used it may use it for the same thing until it expires, for what changes
        nothing and whose answer can get lost; the log calls that approval.repeat. connection: of a
        transaction of this tenant, with which it is used or not. Raises NotFound, StateError if it
        is for something else, was used, expired, nobody approved, or the token of one of the two
        was revoked since.
        """
        at = self._database.clock()
        if connection is not None:
            return spend_approval(
                connection, tenant, approval_id, kind, subject, actor, at, again=again
            )
        with self._database.tenant(tenant) as own:
            return spend_approval(own, tenant, approval_id, kind, subject, actor, at, again=again)


def spend_approval(
    connection: Connection,
    tenant: str,
    approval_id: str,
    kind: str,
    subject: str,
    actor: str,
    at: datetime,
    *,
    again: bool = False,
) -> Approval:
    """`Access.spend_approval` inside a transaction. actor: one of the two people, by name."""
    lock_tenant(connection, tenant)
    found = _find_approval(connection, tenant, approval_id)
    if (found.kind, found.subject) != (kind, subject):
        raise StateError(
            f"approval {approval_id} is to {found.kind} {found.subject}, nothing else; ask for one "
            "of your own."
        )
    if found.approved_by is None:
        raise StateError(f"approval {approval_id} waits for a second person.")
    repeated = found.used_at is not None
    if repeated and not (again and found.used_by == actor):
        raise StateError(f"approval {approval_id} was used before; ask for another one.")
    if found.expires_at <= at:
        raise StateError(f"approval {approval_id} expired; ask for another one.")
    if actor not in (found.requested_by, found.approved_by):
        raise StateError(f"approval {approval_id} is for the two people who agreed on it.")
    _require_unrevoked(connection, tenant, approval_id)
    table = tables.approvals
    here = (table.c.tenant == tenant) & (table.c.id == approval_id)
    if not repeated:
        connection.execute(update(table).where(here).values(used_at=stamp(at), used_by=actor))
    facts = {"approval": approval_id, "for": kind, "subject": subject}
    did = "approval.repeat" if repeated else "approval.use"
    append(connection, tenant, stamp(at), actor, did, facts)
    return _find_approval(connection, tenant, approval_id)


def bump(connection: Connection, tenant: str, revision: int) -> None:
    """Say that something about a tenant's keys has changed; revision: what it was when locked."""
    table = tables.tenants
    here = table.c.tenant == tenant
    connection.execute(update(table).where(here).values(revision=revision + 1))


def enrolled(connection: Connection, tenant: str) -> tuple[EngineRecord, ...]:
    """All engines ever enrolled, by name, inside a transaction."""
    table = tables.engines
    query = select(table).where(table.c.tenant == tenant).order_by(table.c.name)
    return tuple(_engine_record(row) for row in connection.execute(query))


def _require_version(connection: Connection, tenant: str, version_id: str) -> None:
    parts = parts_of(version_id)
    table = tables.versions
    if parts is not None and parts[0] == tenant:
        here = (table.c.tenant == tenant) & (table.c.name == parts[1])
        query = select(table.c.number).where(here, table.c.number == parts[2])
        if connection.scalar(query) is not None:
            return
    raise NotFound("there is no such version of a key here; list the keys to see them.")


def _require_unrevoked(connection: Connection, tenant: str, approval_id: str) -> None:
    """Who was let out meanwhile agrees to nothing; people of an identity provider have no token."""
    given, token = tables.approvals, tables.tokens
    by = token.c.id.in_([given.c.requested_token, given.c.approved_token])
    query = (
        select(token.c.name)
        .join(given, (given.c.tenant == token.c.tenant) & by)
        .where(given.c.tenant == tenant, given.c.id == approval_id)
        .where(token.c.revoked_at.is_not(None))
    )
    name = connection.scalars(query).first()
    if name is not None:
        raise StateError(
            f"the token with which {name} agreed to approval {approval_id} was revoked; ask anew."
        )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def _check_person(name: str) -> None:
    if not _PERSON.fullmatch(name):
        raise KeyFormatError("this cannot be a name; use 1 to 64 of A-Z a-z 0-9 . _ @ + -.")


def _require_role(tenant: str, kind: str, who: Principal) -> None:
    if kind not in APPROVAL_ROLES:
        raise KeyFormatError(f"approvals are for {' or '.join(APPROVAL_ROLES)}.")
    if who.tenant != tenant or APPROVAL_ROLES[kind] not in who.roles:
        raise StateError(f"to {kind} is for those with the role {APPROVAL_ROLES[kind]}.")


def _public_key(jwk: Mapping[str, str]) -> dict[str, str]:
    """The members that say which key it is, checked; anything else is not kept."""
    if "d" in jwk:
        raise KeyFormatError("this JWK holds the private part; give the public one, without d.")
    if jwk.get("kty") != "OKP" or jwk.get("crv") != "X25519":
        raise KeyFormatError("an engine's identity is a JWK of kty OKP and crv X25519.")
    x = jwk.get("x")
    if not isinstance(x, str) or not _COORDINATE.fullmatch(x):
        raise KeyFormatError("the x of an X25519 key is 43 characters of base64url.")
    return {"kty": "OKP", "crv": "X25519", "x": x}


def _find_engine(connection: Connection, tenant: str, name: str) -> EngineRecord | None:
    table = tables.engines
    query = select(table).where(table.c.tenant == tenant, table.c.name == name)
    row = connection.execute(query).one_or_none()
    return None if row is None else _engine_record(row)


def _engine(connection: Connection, tenant: str, name: str) -> EngineRecord:
    found = _find_engine(connection, tenant, name)
    if found is None:
        raise NotFound("there is no such engine here; list them to see their names.")
    return found


def _find_approval(connection: Connection, tenant: str, approval_id: str) -> Approval:
    table = tables.approvals
    query = select(table).where(table.c.tenant == tenant, table.c.id == approval_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound("there is no such approval here; list them to see their ids.")
    return _approval(row)


def maybe(written: str | None) -> datetime | None:
    """The time of a column that may be empty."""
    return None if written is None else moment(written)


def _token(row: Row[Any]) -> TokenRecord:
    return TokenRecord(
        tenant=row.tenant,
        id=row.id,
        name=row.name,
        roles=frozenset(Role(role) for role in json.loads(row.roles)),
        engine=row.engine,
        created_at=moment(row.created_at),
        expires_at=maybe(row.expires_at),
        revoked_at=maybe(row.revoked_at),
    )


def _engine_record(row: Row[Any]) -> EngineRecord:
    return EngineRecord(
        tenant=row.tenant,
        name=row.name,
        models=tuple(json.loads(row.models)),
        public_key=json.loads(row.public_key),
        enrolled_at=moment(row.enrolled_at),
        last_seen_at=maybe(row.last_seen_at),
        revoked_at=maybe(row.revoked_at),
    )


def _approval(row: Row[Any]) -> Approval:
    return Approval(
        id=row.id,
        tenant=row.tenant,
        kind=row.kind,
        subject=row.subject,
        purpose=row.purpose,
        requested_by=row.requested_by,
        requested_at=moment(row.requested_at),
        expires_at=moment(row.expires_at),
        approved_by=row.approved_by,
        approved_at=maybe(row.approved_at),
        used_at=maybe(row.used_at),
        used_by=row.used_by,
    )
