"""Keys and their versions: created, rotated, promoted, retired, reported compromised, destroyed.

No answer holds a secret, and none is taken: keys are derived from the root. Keys from elsewhere are
imported at the terminal (`filigrane keys create --import`).
"""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from filigrane.custody.hierarchy import KeySpec
from filigrane.errors import NotFound
from filigrane.service.auth import office_of, require
from filigrane.service.problems import Problem
from filigrane.service.routes.paging import After, IdempotencyKey, Limit, page
from filigrane.store.records import KeyRecord, Principal, Role, VersionRecord

router = APIRouter(prefix="/v1/keys", tags=["keys"])

Reader = Annotated[Principal, Depends(require(Role.KEY_ADMIN, Role.CUSTODIAN, Role.AUDITOR))]
Admin = Annotated[Principal, Depends(require(Role.KEY_ADMIN))]
Custodian = Annotated[Principal, Depends(require(Role.CUSTODIAN))]
Reporter = Annotated[Principal, Depends(require(Role.KEY_ADMIN, Role.CUSTODIAN))]
Name = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9-]{0,27}$", description="The key's name.")]
Number = Annotated[int, Path(ge=1, le=999_999, description="The version's number.")]


class VersionBody(BaseModel):
    """One version of a key; nothing in it is secret."""

    id: str = Field(examples=["acme.chat@3"])
    number: int
    state: str = Field(description="pre-active, active, retired, compromised or destroyed.")
    commitment: str = Field(description="Published in the audit log before first use; 64 hex.")
    log_index: int
    root_version: int
    created_at: datetime
    promoted_at: datetime | None
    retired_at: datetime | None
    compromised_since: datetime | None
    destroyed_at: datetime | None
    acknowledged: list[str] = Field(description="Engines that proved that they have it.")
    waiting_for: list[str] = Field(description="Engines that have not; promotion waits for them.")


class KeyBody(BaseModel):
    """A key and its versions, ascending."""

    name: str
    model: str
    scheme: str | None
    profile: str | None
    tokenizer_sha256: str | None
    slots: int
    source: str
    versions: list[VersionBody]


class KeyPage(BaseModel):
    """Keys by name. next: send it as `after` for the following ones; null at the end."""

    keys: list[KeyBody]
    next: str | None


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewKey(_Body):
    """A key to be made, for a model: with a scheme of filigrane's, or another tool's profile.

    tokenizer: the model's, by its name in the service's settings, or tokenizer_sha256: by its
    fingerprint; not both. With neither, texts are read only while the settings have exactly one.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,27}$")
    model: str = Field(max_length=128)
    scheme: str | None = Field(None, max_length=256, examples=["gumbel"])
    profile: str | None = Field(None, max_length=256)
    tokenizer: str | None = Field(None, min_length=1, max_length=256)
    tokenizer_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    slots: int = Field(8, ge=1, le=64)


class Compromise(_Body):
    """since: texts dated later prove nothing any more; the moment of the leak, or before it."""

    since: AwareDatetime = Field(strict=False)


class Destroy(_Body):
    """approval: the id of one that another custodian gave (POST /v1/approvals)."""

    approval: str = Field(pattern=r"^[0-9a-f]{1,32}$")


@router.get("")
def keys(who: Reader, request: Request, after: After = None, limit: Limit = None) -> KeyPage:
    """The tenant's keys with all their versions."""
    found = office_of(request).keybook.keys(who.tenant)
    shown, following = page(request, found, lambda key: key.spec.name, after, limit)
    return KeyPage(keys=[_key(key) for key in shown], next=following)


@router.post("", status_code=201)
def create(
    body: NewKey, who: Admin, request: Request, idempotency_key: IdempotencyKey = None
) -> VersionBody:
    """Make a key: its version 1, pre-active, committed to in the audit log."""
    office = office_of(request)
    sha256 = body.tokenizer_sha256
    if body.tokenizer is not None:
        if sha256 is not None:
            raise Problem(422, "tokenizer", "Send one of the two: tokenizer or tokenizer_sha256.")
        sha256 = office.tokenizers.sha256(body.tokenizer)
    spec = KeySpec(
        tenant=who.tenant,
        name=body.name,
        model=body.model,
        scheme=body.scheme,
        profile=body.profile,
        tokenizer_sha256=sha256,
        slots=body.slots,
    )
    return _version(office.keybook.create(spec, actor=who.name, request_id=idempotency_key))


@router.get("/{name}")
def key(name: Name, who: Reader, request: Request) -> KeyBody:
    """One key with all its versions."""
    for found in office_of(request).keybook.keys(who.tenant):
        if found.spec.name == name:
            return _key(found)
    raise NotFound("There is no such key here; GET /v1/keys lists them.")


@router.post("/{name}/versions", status_code=201)
def rotate(
    name: Name, who: Admin, request: Request, idempotency_key: IdempotencyKey = None
) -> VersionBody:
    """Make the next version, pre-active; the present one marks until the next is promoted."""
    keybook = office_of(request).keybook
    return _version(keybook.rotate(who.tenant, name, actor=who.name, request_id=idempotency_key))


@router.post("/{name}/versions/{number}/promote")
def promote(name: Name, number: Number, who: Admin, request: Request) -> VersionBody:
    """Let a version mark, when every engine of its model has it; the active one retires."""
    keybook = office_of(request).keybook
    return _version(keybook.promote(who.tenant, name, number, actor=who.name))


@router.post("/{name}/versions/{number}/retire")
def retire(name: Name, number: Number, who: Admin, request: Request) -> VersionBody:
    """Let a version mark no more; it goes on reading."""
    keybook = office_of(request).keybook
    return _version(keybook.retire(who.tenant, name, number, actor=who.name))


@router.post("/{name}/versions/{number}/compromise")
def compromise(
    name: Name, number: Number, body: Compromise, who: Reporter, request: Request
) -> VersionBody:
    """Report that somebody else has a version: from `since` on its mark proves nothing."""
    keybook = office_of(request).keybook
    return _version(keybook.compromise(who.tenant, name, number, since=body.since, actor=who.name))


@router.post("/{name}/versions/{number}/destroy")
def destroy(
    name: Name, number: Number, body: Destroy, who: Custodian, request: Request
) -> VersionBody:
    """Erase a version for good, as two custodians agreed: its texts are never found again."""
    keybook = office_of(request).keybook
    return _version(
        keybook.destroy(who.tenant, name, number, actor=who.name, approval=body.approval)
    )


def _key(record: KeyRecord) -> KeyBody:
    spec = record.spec
    return KeyBody(
        name=spec.name,
        model=spec.model,
        scheme=spec.scheme,
        profile=spec.profile,
        tokenizer_sha256=spec.tokenizer_sha256,
        slots=spec.slots,
        source=spec.source,
        versions=[_version(version) for version in record.versions],
    )


def _version(record: VersionRecord) -> VersionBody:
    return VersionBody(
        id=record.id,
        number=record.number,
        state=str(record.state),
        commitment=record.commitment,
        log_index=record.log_index,
        root_version=record.root_version,
        created_at=record.created_at,
        promoted_at=record.promoted_at,
        retired_at=record.retired_at,
        compromised_since=record.compromised_since,
        destroyed_at=record.destroyed_at,
        acknowledged=list(record.acknowledged),
        waiting_for=list(record.waiting_for),
    )
