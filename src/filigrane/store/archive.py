"""A tenant's archive: what a fresh store needs, with the same root, to read its old texts again.

    {"body": {"format": "filigrane-archive-1", "tenant": ..., "at": ..., "revision": ...,
              "keys": [...], "versions": [...], "engines": [...], "acknowledgements": [...],
              "log": [lines as exported]},
     "key_id": "log-<r>", "signature": base64url}

The signature is Ed25519 over "filigrane/v1/archive" || SHA-256(canonical body), by the key that
signs checkpoints. Nothing in it opens anything without the key management system; it holds the
salts, so whoever wants a version destroyed has to destroy its archives too.
"""

import base64
import binascii
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from sqlalchemy import Connection, LargeBinary, Table, insert, select

from filigrane.custody import checkpoints, verification
from filigrane.custody.chain import Fact
from filigrane.custody.hierarchy import KeySpec, check_name, key_id
from filigrane.errors import AlreadyExists, AuditError, FiligraneError
from filigrane.store import tables
from filigrane.store.database import Database, lock_tenant, stamp
from filigrane.store.log import Log, append
from filigrane.store.log import export as export_log

__all__ = ["FORMAT", "committed", "export", "restore"]

FORMAT: Final = "filigrane-archive-1"
_PURPOSE: Final = b"filigrane/v1/archive"
_TABLES: Final = (tables.keys, tables.versions, tables.engines, tables.acknowledgements)
_BATCH: Final = 500


def export(database: Database, log: Log, tenant: str, actor: str) -> bytes:
    """The archive of a tenant as JSON; that it was made stands in the log, and in it."""
    at = stamp(database.clock())
    log.append(tenant, actor, "archive.export", {})
    log.checkpoint(tenant)
    signer = log.signer()
    with database.reading(tenant) as connection:
        body = {
            "format": FORMAT,
            "tenant": tenant,
            "at": at,
            "revision": connection.scalar(
                select(tables.tenants.c.revision).where(tables.tenants.c.tenant == tenant)
            ),
            "log": _log_lines(connection, tenant),
        }
        for table in _TABLES:
            body[table.name] = _rows(connection, table, tenant)
    signature = base64.urlsafe_b64encode(signer.sign(_signed(body))).decode("ascii").rstrip("=")
    return _canonical({"body": body, "key_id": signer.key_id, "signature": signature})


def restore(database: Database, log: Log, data: bytes, actor: str) -> int:
    """Put a tenant's archive into a store that has no such tenant; how many versions it has."""
    body = _opened(data, log.jwks())
    tenant = str(body["tenant"])
    check_name("tenant", tenant)
    report = verification.verify_log(body["log"], log.jwks())
    if report.tenant != tenant:
        raise AuditError(f"this archive of {tenant} holds the log of {report.tenant}.")
    _require_commitments(body)
    at = stamp(database.clock())
    with database.tenant(tenant) as connection:
        known = tables.tenants.c.tenant
        if connection.scalar(select(known).where(known == tenant)) is not None:
            raise AlreadyExists(
                f"the tenant {tenant!r} is here already; an archive is restored into a store that "
                "does not have it."
            )
        connection.execute(
            insert(tables.tenants).values(
                tenant=tenant, created_at=at, revision=int(body["revision"]) + 1
            )
        )
        for table in _TABLES:
            _insert(connection, table, [_row(table, tenant, row) for row in body[table.name]])
        _insert_log(connection, tenant, body["log"])
        lock_tenant(connection, tenant)
        facts: dict[str, Fact] = {
            "made_at": str(body["at"]),
            "versions": len(body["versions"]),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        append(connection, tenant, at, actor, "archive.import", facts)
    return len(body["versions"])


def committed(facts: str | None) -> tuple[object, object]:
    """The version and the commitment that a record of the log states."""
    said = {} if facts is None else json.loads(facts)
    return said.get("key"), said.get("commitment")


def _log_lines(connection: Connection, tenant: str) -> list[dict[str, Any]]:
    out = io.BytesIO()
    export_log(connection, tenant, out)
    out.seek(0)
    return list(verification.read_lines(out))


def _rows(connection: Connection, table: Table, tenant: str) -> list[dict[str, Any]]:
    query = select(table).where(table.c.tenant == tenant).order_by(*table.primary_key.columns)
    return [
        {
            name: value.hex() if isinstance(value, bytes | memoryview) else value
            for name, value in row._mapping.items()
        }
        for row in connection.execute(query)
    ]


def _row(table: Table, tenant: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A row with exactly the table's columns, of this tenant."""
    if set(values) != {column.name for column in table.columns} or values["tenant"] != tenant:
        raise AuditError(f"this archive holds a row that does not belong into {table.name}.")
    binary = {column.name for column in table.columns if isinstance(column.type, LargeBinary)}
    return {
        name: bytes.fromhex(value) if name in binary and value is not None else value
        for name, value in values.items()
    }


def _insert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    for start in range(0, len(rows), _BATCH):
        connection.execute(insert(table), [dict(row) for row in rows[start : start + _BATCH]])


def _insert_log(connection: Connection, tenant: str, lines: Sequence[Mapping[str, Any]]) -> None:
    records = [
        {
            "tenant": tenant,
            "position": line["record"]["index"],
            "at": line["record"]["at"],
            "actor": line["record"]["actor"],
            "kind": line["record"]["kind"],
            "facts": json.dumps(line["record"]["facts"], sort_keys=True, separators=(",", ":")),
            "hash": bytes.fromhex(line["hash"]),
        }
        for line in lines
        if "record" in line
    ]
    points = [dict(line["checkpoint"]) for line in lines if "checkpoint" in line]
    _insert(connection, tables.log, records)
    _insert(connection, tables.checkpoints, points)


def _require_commitments(body: Mapping[str, Any]) -> None:
    """Every version was committed to in the log that comes with it."""
    records = [line["record"] for line in body["log"] if "record" in line]
    for row in body["versions"]:
        name = key_id(body["tenant"], row["name"], row["number"])
        index = row["log_index"]
        facts = records[index]["facts"] if 0 <= index < len(records) else {}
        if (facts.get("key"), facts.get("commitment")) != (name, row["commitment"]):
            raise AuditError(f"the log of this archive does not commit to {name}.")
    for row in body["keys"]:
        # Raises for what could not be made here either.
        KeySpec(**{name: row[name] for name in KeySpec.__dataclass_fields__})


def _opened(data: bytes, jwks: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body of an archive whose signature holds."""
    damaged = AuditError("this is not an archive of filigrane, or it is damaged.")
    try:
        held = json.loads(data)
        body, name, signature = held["body"], held["key_id"], held["signature"]
        raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
        if body["format"] != FORMAT:
            raise damaged
    except (ValueError, KeyError, TypeError, binascii.Error, RecursionError) as error:
        if isinstance(error, FiligraneError):
            raise
        raise damaged from None
    try:
        checkpoints.public_key(jwks, name).verify(raw, _signed(body))
    except (InvalidSignature, AuditError):
        raise AuditError(
            "this archive was altered, or was made under another root: nothing was restored."
        ) from None
    return body


def _signed(body: Mapping[str, Any]) -> bytes:
    return _PURPOSE + hashlib.sha256(_canonical(body)).digest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
