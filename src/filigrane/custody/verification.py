"""Offline verification of a tenant's audit log, as it was exported.

A chain shows that a record was changed, dropped or moved. What it cannot show is that the end was
cut or the whole written anew: for that somebody outside has to keep a checkpoint, which
`verify_log` takes as `trusted`. Knows nothing of databases: it needs the export and public keys.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Never

from filigrane.custody.chain import MAX_RECORD_BYTES, Record, genesis, link
from filigrane.custody.checkpoints import Checkpoint, verify_checkpoint
from filigrane.custody.forms import members
from filigrane.custody.merkle import Tree
from filigrane.errors import AuditError

__all__ = ["LogReport", "read_lines", "verify_log"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogReport:
    """What `verify_log` found in order.

    n_covered: records that some checkpoint fixes; what follows them is in the chain only.
    n_backwards: records with an earlier time than the one before: the clock was set back.
    """

    tenant: str
    n_records: int
    n_checkpoints: int
    n_covered: int
    n_backwards: int
    head: str
    root: str
    first_at: str | None
    last_at: str | None


def read_lines(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The objects of an export, one a line; AuditError naming a line that is none.

    A name that occurs twice in an object, and numbers with a fraction, are refused: two readers
    could understand two things.
    """
    number = 0
    while line := stream.readline(2 * MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > 2 * MAX_RECORD_BYTES:
            raise AuditError(f"line {number} of the log is too long to be a record.")
        try:
            value = json.loads(
                line,
                object_pairs_hook=_unique,
                parse_float=_no_number,
                parse_constant=_no_number,
            )
        except (ValueError, RecursionError) as error:
            said = f": {error}" if isinstance(error, AuditError) else ""
            raise AuditError(f"line {number} of the log is not a JSON object{said}.") from None
        if not isinstance(value, dict):
            raise AuditError(f"line {number} of the log is not a JSON object.")
        yield value


def verify_log(
    lines: Iterable[Mapping[str, Any]],
    jwks: Mapping[str, Any],
    trusted: Checkpoint | None = None,
) -> LogReport:
    """Check a tenant's whole log, as exported; raises AuditError that names the first bad record.

    lines: objects {"record": ..., "hash": hex} in order, {"checkpoint": ...} anywhere after its
    last record, and {"jwks": ...}, which is skipped: keys inside the file would prove nothing.
    jwks: the service's public keys, from elsewhere. trusted: a checkpoint that was kept before; the
    log must extend it. Without one nobody can tell that the end of a log was cut together with its
    last checkpoints, or that all of it was written anew with the service's key.
    """
    tree, hashes = Tree(), list[bytes]()
    tenant: str | None = None
    first_at: str | None = None
    last_at: str | None = None
    n_checkpoints = n_covered = n_backwards = 0
    head = b""

    def fits(point: Checkpoint) -> None:
        verify_checkpoint(point, jwks)
        if tenant is not None and point.tenant != tenant:
            raise AuditError(f"a checkpoint of {point.tenant} stands in the log of {tenant}.")
        if point.size > len(hashes):
            raise AuditError(
                f"record {len(hashes)} is missing: a checkpoint of {point.at} covers {point.size} "
                "records, the log was cut."
            )
        there = hashes[point.size - 1] if point.size else genesis(point.tenant)
        if there.hex() != point.head or tree.root(point.size).hex() != point.root:
            raise AuditError(
                f"the first {point.size} records are not those that the checkpoint of {point.at} "
                "covers: the log was forked or written anew."
            )

    for line in lines:
        if "jwks" in line:
            continue
        if "checkpoint" in line:
            members(line, "checkpoint line", ("checkpoint",))
            point = Checkpoint.from_json(line["checkpoint"])
            tenant = tenant or point.tenant
            fits(point)
            n_checkpoints += 1
            n_covered = max(n_covered, point.size)
            continue
        index = len(hashes)
        try:
            members(line, "line", ("record", "hash"))
            record = Record.from_json(line["record"])
        except AuditError as error:
            raise AuditError(f"record {index} is damaged: {error}") from None
        tenant = tenant or record.tenant
        if record.tenant != tenant:
            raise AuditError(f"record {index} is of {record.tenant}, in the log of {tenant}.")
        if record.index != index:
            raise AuditError(
                f"record {index} is missing or out of place: the line says {record.index}."
            )
        head = link(head or genesis(tenant), record)
        if line["hash"] != head.hex():
            raise AuditError(
                f"record {index} is not what was logged, or follows another record: its hash "
                "does not fit."
            )
        if last_at is not None and record.at < last_at:
            n_backwards += 1
        first_at, last_at = first_at or record.at, record.at
        hashes.append(head)
        tree.append(head)
    if trusted is not None:
        tenant = tenant or trusted.tenant
        fits(trusted)
        n_covered = max(n_covered, trusted.size)
    if tenant is None:
        raise AuditError("this log holds neither a record nor a checkpoint.")
    return LogReport(
        tenant=tenant,
        n_records=len(hashes),
        n_checkpoints=n_checkpoints,
        n_covered=n_covered,
        n_backwards=n_backwards,
        head=(head or genesis(tenant)).hex(),
        root=tree.root().hex(),
        first_at=first_at,
        last_at=last_at,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise AuditError("a name occurs twice")
    return made


def _no_number(text: str) -> Never:
    raise AuditError("a log holds whole numbers only")
