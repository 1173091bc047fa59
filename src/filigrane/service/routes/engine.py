"""Engines: fetch their keys, prove that they have them, report what they marked.

    POST /v1/engine/lease      {"nonce"} -> {"lease": JWE sealed to the engine, ...}
    POST /v1/engine/ack        {"version", "proof": token ids marked with it}
    POST /v1/engine/coverage   counts between two moments, by outcome and reason
    GET  /v1/engine/coverage   what engines reported, for auditors and tenant admins

No answer holds a key that anybody but the engine can read.
"""

from datetime import datetime
from typing import Annotated, Final, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from filigrane.adapters.leases.sealing import NONCE
from filigrane.service.auth import office_of, require
from filigrane.service.coverage import MOST_COUNTS, MOST_NUMBER, Count
from filigrane.store.records import Principal, Role

__all__ = ["router"]

router: Final = APIRouter(prefix="/v1/engine", tags=["engines"])
Engine = Annotated[Principal, Depends(require(Role.ENGINE))]
Reader = Annotated[Principal, Depends(require(Role.AUDITOR, Role.TENANT_ADMIN))]
Number = Annotated[int, Field(ge=0, le=MOST_NUMBER)]
TokenId = Annotated[int, Field(ge=0, le=2**32 - 2)]

_MOST_PROOF: Final = 20_000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class LeaseRequest(_Body):
    """What an engine sends. nonce: fresh randomness, which comes back inside the seal."""

    nonce: str = Field(pattern=f"^{NONCE}$")


class LeaseAnswer(BaseModel):
    """lease: compact JWE for the engine's identity; the rest says what it is without opening it."""

    lease: str
    engine: str
    issued_at: datetime
    expires_at: datetime
    versions: list[str] = Field(description="Ids of the versions in it.")


class Proof(_Body):
    """version: 'acme.chat@3'; proof: ids of a text that the engine marked with it."""

    version: str = Field(max_length=64)
    proof: list[TokenId] = Field(min_length=1, max_length=_MOST_PROOF)


class CountBody(_Body):
    """outcome, reason: as in filigrane_requests_total; reason is the scheme of marked ones."""

    outcome: Literal["marked", "unmarked", "refused"]
    reason: str = Field(max_length=64)
    requests: Number


class CoverageReport(_Body):
    """What an engine counted from `since` to `until`."""

    since: AwareDatetime = Field(strict=False)
    until: AwareDatetime = Field(strict=False)
    counts: list[CountBody] = Field(max_length=MOST_COUNTS)
    marked_tokens: Number = 0
    unmarked_tokens: Number = 0


class CoverageLine(BaseModel):
    """What one engine has reported altogether."""

    engine: str
    since: datetime
    until: datetime
    reports: int
    counts: list[CountBody]
    marked_tokens: int
    unmarked_tokens: int


class CoverageAnswer(BaseModel):
    """By engine."""

    engines: list[CoverageLine]


@router.post("/lease")
def lease(body: LeaseRequest, who: Engine, request: Request, response: Response) -> LeaseAnswer:
    """Lease the keys of the engine's models, sealed to its identity."""
    sealed, said = office_of(request).leases.issue(who, body.nonce)
    response.headers["Cache-Control"] = "no-store"
    return LeaseAnswer(
        lease=sealed,
        engine=said.engine,
        issued_at=said.issued_at,
        expires_at=said.expires_at,
        versions=[key.id for key in said.keys],
    )


@router.post("/ack", status_code=204)
def acknowledge(body: Proof, who: Engine, request: Request) -> None:
    """Prove, with a text that it marked, that the engine has a version."""
    proof = np.asarray(body.proof, dtype=np.int64)
    office_of(request).leases.acknowledge(who, body.version, proof)


@router.post("/coverage", status_code=204)
def report(body: CoverageReport, who: Engine, request: Request) -> None:
    """Report what the engine marked, left unmarked and refused, in numbers."""
    office = office_of(request)
    engine = office.leases.engine_of(who)
    office.coverage.report(
        who.tenant,
        engine.name,
        [Count(outcome=c.outcome, reason=c.reason, requests=c.requests) for c in body.counts],
        since=body.since,
        until=body.until,
        marked_tokens=body.marked_tokens,
        unmarked_tokens=body.unmarked_tokens,
    )


@router.get("/coverage")
def coverage(
    who: Reader,
    request: Request,
    since: AwareDatetime | None = None,
    until: AwareDatetime | None = None,
) -> CoverageAnswer:
    """What each engine has reported, of reports that end within these times."""
    found = office_of(request).coverage.engines(who.tenant, since=since, until=until)
    return CoverageAnswer(
        engines=[
            CoverageLine(
                engine=line.engine,
                since=line.since,
                until=line.until,
                reports=line.n_reports,
                counts=[
                    CountBody.model_construct(outcome=outcome, reason=reason, requests=number)
                    for (outcome, reason), number in sorted(line.requests.items())
                ],
                marked_tokens=line.marked_tokens,
                unmarked_tokens=line.unmarked_tokens,
            )
            for line in found
        ]
    )
