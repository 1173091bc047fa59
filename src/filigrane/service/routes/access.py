"""Tokens, engines and approvals of a tenant, and who one is."""

from datetime import datetime, timedelta
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Depends, Path, Request
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from filigrane.service.auth import check_roles, office_of, require
from filigrane.service.problems import Problem
from filigrane.service.routes.paging import After, Limit, page
from filigrane.store.records import (
    APPROVAL_ROLES,
    Approval,
    EngineRecord,
    Principal,
    Role,
    TokenRecord,
)

router = APIRouter(prefix="/v1", tags=["access"])

_OPERATORS: Final = frozenset({Role.CUSTODIAN, Role.ATTRIBUTION_OFFICER, Role.TENANT_ADMIN})
"""Roles that only the operator gives: one admin could otherwise be both of two people."""

Anybody = Annotated[Principal, Depends(require())]
Admin = Annotated[Principal, Depends(require(Role.TENANT_ADMIN))]
Watcher = Annotated[Principal, Depends(require(Role.TENANT_ADMIN, Role.AUDITOR, Role.KEY_ADMIN))]
Signer = Annotated[Principal, Depends(require(Role.CUSTODIAN, Role.ATTRIBUTION_OFFICER))]
Overseer = Annotated[
    Principal, Depends(require(Role.CUSTODIAN, Role.ATTRIBUTION_OFFICER, Role.AUDITOR))
]
Person = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class WhoBody(BaseModel):
    """What a token says of who holds it."""

    tenant: str
    name: str
    roles: list[str]
    engine: str | None


class NewToken(_Body):
    """A token for a person, or (engine: its name, role engine alone) for an engine."""

    name: Person
    roles: list[Annotated[Role, Field(strict=False)]] = Field(min_length=1, max_length=len(Role))
    engine: Person | None = None
    expires_at: AwareDatetime | None = Field(None, strict=False)


class TokenBody(BaseModel):
    """A token without its secret part."""

    id: str
    name: str
    roles: list[str]
    engine: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class TokenPage(BaseModel):
    """Tokens, oldest first."""

    tokens: list[TokenBody]
    next: str | None


class IssuedToken(BaseModel):
    """The token, shown this once: keep it as you keep passwords."""

    token: str


class PublicKey(_Body):
    """The public part of an engine's identity (`filigrane engine enrol`), a JWK."""

    kty: Literal["OKP"]
    crv: Literal["X25519"]
    x: str = Field(pattern=r"^[A-Za-z0-9_-]{43}$")


class NewEngine(_Body):
    """A server that marks, with the models that it serves."""

    name: Person
    models: list[Annotated[str, Field(max_length=128)]] = Field(min_length=1, max_length=64)
    public_key: PublicKey


class EngineBody(BaseModel):
    """An engine as it was enrolled, and when it was last here."""

    name: str
    models: list[str]
    public_key: dict[str, str]
    enrolled_at: datetime
    last_seen_at: datetime | None
    revoked_at: datetime | None


class EnginePage(BaseModel):
    """Engines by name."""

    engines: list[EngineBody]
    next: str | None


class NewApproval(_Body):
    """What a second person is asked to agree to, once.

    kind, subject: "destroy" and the id of a version, or "trace" and what is going to be traced;
    purpose: why; both are kept in the audit log for ever.
    """

    kind: Literal["destroy", "trace"]
    subject: str = Field(min_length=1, max_length=200)
    purpose: str = Field(min_length=1, max_length=1000)
    hours: int = Field(24, ge=1, le=168)


class ApprovalBody(BaseModel):
    """An approval: asked for, given by a second person, used once."""

    id: str
    kind: str
    subject: str
    purpose: str
    requested_by: str
    requested_at: datetime
    expires_at: datetime
    approved_by: str | None
    approved_at: datetime | None
    used_at: datetime | None


class ApprovalPage(BaseModel):
    """Approvals, oldest first."""

    approvals: list[ApprovalBody]
    next: str | None


@router.get("/whoami")
async def whoami(who: Anybody) -> WhoBody:
    """Who the token speaks for, and what it may."""
    return WhoBody(
        tenant=who.tenant, name=who.name, roles=sorted(map(str, who.roles)), engine=who.engine
    )


@router.get("/tokens")
def tokens(who: Admin, request: Request, after: After = None, limit: Limit = None) -> TokenPage:
    """All tokens ever issued, without their secrets."""
    found = office_of(request).access.tokens(who.tenant)
    shown, following = page(request, found, lambda token: token.id, after, limit)
    return TokenPage(tokens=[_token(token) for token in shown], next=following)


@router.post("/tokens", status_code=201)
def issue(body: NewToken, who: Admin, request: Request) -> IssuedToken:
    """Issue a token. It is shown in this answer only, so a repeated request makes another one.

    Not for custodians, attribution officers and tenant admins: the operator issues those, on the
    service's host, and answers for their being different people.
    """
    held = sorted(_OPERATORS.intersection(body.roles))
    if held:
        raise Problem(
            403,
            "operator_only",
            f"Tokens with the role {' or '.join(held)} are issued by the operator, on the "
            "service's host: filigrane access token TENANT NAME --role ROLE.",
        )
    token = office_of(request).access.issue_token(
        who.tenant,
        body.name,
        frozenset(body.roles),
        engine=body.engine,
        expires_at=body.expires_at,
        actor=who.name,
    )
    return IssuedToken(token=token)


@router.delete("/tokens/{token_id}", status_code=204)
def revoke(
    token_id: Annotated[str, Path(pattern=r"^[a-z0-9]{12}$")], who: Admin, request: Request
) -> None:
    """Let a token open nothing any more; other processes notice within seconds."""
    office_of(request).access.revoke_token(who.tenant, token_id, actor=who.name)


@router.get("/engines")
def engines(who: Watcher, request: Request, after: After = None, limit: Limit = None) -> EnginePage:
    """All engines ever enrolled."""
    found = office_of(request).access.engines(who.tenant)
    shown, following = page(request, found, lambda engine: engine.name, after, limit)
    return EnginePage(engines=[_engine(engine) for engine in shown], next=following)


@router.post("/engines", status_code=201)
def enrol(body: NewEngine, who: Admin, request: Request) -> EngineBody:
    """Enrol an engine: from then on promotions of its models' keys wait for it."""
    return _engine(
        office_of(request).access.enrol_engine(
            who.tenant, body.name, body.models, body.public_key.model_dump(), actor=who.name
        )
    )


@router.delete("/engines/{name}", status_code=204)
def dismiss(
    name: Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}$")],
    who: Admin,
    request: Request,
) -> None:
    """Revoke an engine: no more leases for it, and nobody waits for it."""
    office_of(request).access.revoke_engine(who.tenant, name, actor=who.name)


@router.get("/approvals")
def approvals(
    who: Overseer, request: Request, after: After = None, limit: Limit = None
) -> ApprovalPage:
    """All approvals asked for."""
    found = office_of(request).access.approvals(who.tenant)
    shown, following = page(request, found, lambda approval: approval.id, after, limit)
    return ApprovalPage(approvals=[_approval(one) for one in shown], next=following)


@router.post("/approvals", status_code=201)
def ask(body: NewApproval, who: Signer, request: Request) -> ApprovalBody:
    """Ask a second person, of the same role, to agree."""
    check_roles(who, frozenset({APPROVAL_ROLES[body.kind]}))
    return _approval(
        office_of(request).access.request_approval(
            who.tenant,
            body.kind,
            body.subject,
            body.purpose,
            who,
            lifetime=timedelta(hours=body.hours),
        )
    )


@router.post("/approvals/{approval_id}/approve")
def approve(
    approval_id: Annotated[str, Path(pattern=r"^[0-9a-f]{1,32}$")], who: Signer, request: Request
) -> ApprovalBody:
    """Agree, as the second person."""
    return _approval(office_of(request).access.approve(who.tenant, approval_id, who))


def _token(record: TokenRecord) -> TokenBody:
    return TokenBody(
        id=record.id,
        name=record.name,
        roles=sorted(map(str, record.roles)),
        engine=record.engine,
        created_at=record.created_at,
        expires_at=record.expires_at,
        revoked_at=record.revoked_at,
    )


def _engine(record: EngineRecord) -> EngineBody:
    return EngineBody(
        name=record.name,
        models=list(record.models),
        public_key=dict(record.public_key),
        enrolled_at=record.enrolled_at,
        last_seen_at=record.last_seen_at,
        revoked_at=record.revoked_at,
    )


def _approval(record: Approval) -> ApprovalBody:
    return ApprovalBody(
        id=record.id,
        kind=record.kind,
        subject=record.subject,
        purpose=record.purpose,
        requested_by=record.requested_by,
        requested_at=record.requested_at,
        expires_at=record.expires_at,
        approved_by=record.approved_by,
        approved_at=record.approved_at,
        used_at=record.used_at,
    )
