"""The audit log of a tenant: records, signed checkpoints, proofs, and all of it to take away.

Whoever has a token may see checkpoints and proofs, which are hashes; records are for auditors. The
export is verified offline: `filigrane audit verify`.
"""

import tempfile
from collections.abc import Iterator
from typing import IO, Annotated, BinaryIO, Final, cast

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from filigrane.custody.checkpoints import Checkpoint
from filigrane.errors import AuditError
from filigrane.service.auth import office_of, require
from filigrane.service.problems import Problem
from filigrane.service.routes.paging import Limit
from filigrane.store.records import Principal, Role

router = APIRouter(prefix="/v1/log", tags=["log"])

Anybody = Annotated[Principal, Depends(require())]
Auditor = Annotated[Principal, Depends(require(Role.AUDITOR))]
Index = Annotated[int, Query(ge=0, le=2**31 - 2)]
Size = Annotated[int, Query(ge=1, le=2**31 - 1)]

_IN_MEMORY: Final = 8_000_000
_PART: Final = 65_536


class RecordBody(BaseModel):
    """One record: who did what when, and facts about it; never a text, a score or a secret."""

    tenant: str
    index: int
    at: str
    actor: str
    kind: str
    facts: dict[str, str | int | bool | list[str] | None]


class RecordPage(BaseModel):
    """Records in their order. next: `start` of the following page; null at the end."""

    records: list[RecordBody]
    next: int | None


class CheckpointBody(BaseModel):
    """The log at one moment, signed with Ed25519 under a key of /.well-known/jwks.json.

    size: how many records; head: of their hash chain; root: of the RFC 6962 tree over them (hex).
    """

    tenant: str
    size: int
    head: str
    root: str
    at: str
    key_id: str
    signature: str


class ProofBody(BaseModel):
    """Hashes (hex) that lead from a leaf, or an older root, to the root of `size` records."""

    size: int
    hashes: list[str]


@router.get("/records")
def records(who: Auditor, request: Request, start: Index = 0, limit: Limit = None) -> RecordPage:
    """Records from `start` on."""
    office = office_of(request)
    most = min(limit or 1000, office.settings.limits.page)
    found = office.log.records(who.tenant, start, start + most + 1)
    return RecordPage(
        records=[
            RecordBody(
                tenant=record.tenant,
                index=record.index,
                at=record.at,
                actor=record.actor,
                kind=record.kind,
                facts=dict(record.facts),
            )
            for record in found[:most]
        ],
        next=start + most if len(found) > most else None,
    )


@router.get("/checkpoint")
def checkpoint(who: Anybody, request: Request) -> CheckpointBody:
    """The latest signed checkpoint."""
    found = office_of(request).log.latest(who.tenant)
    if found is None:
        raise Problem(
            404, "not_found", "There is no checkpoint yet; POST to this address signs one."
        )
    return _checkpoint(found)


@router.post("/checkpoint")
def sign(who: Auditor, request: Request) -> CheckpointBody:
    """Sign the log as it is now; the latest checkpoint again if nothing was added since."""
    return _checkpoint(office_of(request).log.checkpoint(who.tenant))


@router.get("/proof")
def proof(who: Anybody, request: Request, index: Index, size: Size) -> ProofBody:
    """That record `index` is among the first `size` (RFC 6962 inclusion proof)."""
    try:
        hashes = office_of(request).log.inclusion(who.tenant, index, size)
    except AuditError as error:
        raise _outside(error) from None
    return ProofBody(size=size, hashes=hashes)


@router.get("/consistency")
def consistency(who: Anybody, request: Request, old: Size, size: Size) -> ProofBody:
    """That the log of `size` records extends that of `old` (RFC 6962 consistency proof)."""
    try:
        hashes = office_of(request).log.consistency(who.tenant, old, size)
    except AuditError as error:
        raise _outside(error) from None
    return ProofBody(size=size, hashes=hashes)


@router.get(
    "/export",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-ndjson": {}}, "description": "JSON lines."}},
)
def export(who: Auditor, request: Request) -> StreamingResponse:
    """All records and checkpoints as JSON lines, for `filigrane audit verify`."""
    out = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by _parts
    try:
        office_of(request).log.export(who.tenant, cast(BinaryIO, out))
        out.seek(0)
    except BaseException:
        out.close()
        raise
    return StreamingResponse(_parts(out), media_type="application/x-ndjson")


def _parts(out: IO[bytes]) -> Iterator[bytes]:
    with out:
        while part := out.read(_PART):
            yield part


def _outside(error: AuditError) -> Problem:
    return Problem(422, "outside", str(error))


def _checkpoint(found: Checkpoint) -> CheckpointBody:
    return CheckpointBody(
        tenant=found.tenant,
        size=found.size,
        head=found.head,
        root=found.root,
        at=found.at,
        key_id=found.key_id,
        signature=found.signature,
    )
