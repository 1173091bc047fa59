"""Whom a text was written for: asked for by one officer, agreed to by another, and logged.

1. POST /v1/trace/requests by the first officer: text, keys, users and purpose
2. POST /v1/approvals/{id}/approve by the second
3. POST /v1/trace by either of them, with the same text, keys, users, alpha and top; once, and by
   whoever did it again until the approval expires, for an answer that got lost
"""

from datetime import datetime
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from filigrane.service.answers import Hinted, TraceAnswer, query_of, traced_answer
from filigrane.service.auth import office_of, require
from filigrane.service.detecting import MAX_ALPHA
from filigrane.service.tracing import MAX_USERS
from filigrane.store.records import Principal, Role

router = APIRouter(prefix="/v1/trace", tags=["tracing"])

Officer = Annotated[Principal, Depends(require(Role.ATTRIBUTION_OFFICER))]
_LAST: Final = 2**63 - 1


class UsersBody(BaseModel):
    """Users first to first + count - 1."""

    model_config = ConfigDict(extra="forbid", strict=True)

    first: int = Field(0, ge=0, le=_LAST - MAX_USERS)
    count: int = Field(ge=1, le=MAX_USERS)

    def indices(self) -> range:
        """The users' indices."""
        return range(self.first, self.first + self.count)


class TracedBody(Hinted):
    """What is traced. alpha: who is named has at most this p-value; top: candidates to show."""

    users: UsersBody
    alpha: float = Field(1e-6, gt=0, le=MAX_ALPHA)
    top: int = Field(10, ge=1, le=100)


class TraceRequestBody(TracedBody):
    """What is to be traced, and why. purpose: kept in the log for ever; name no person in it."""

    purpose: str = Field(min_length=1, max_length=1000)


class TraceBody(TracedBody):
    """What is traced. approval: the id of the approval; the rest as it was asked for."""

    approval: str = Field(pattern=r"^[0-9a-f]{1,32}$")


class TraceRequested(BaseModel):
    """The approval that now waits for a second officer."""

    id: str
    subject: str
    purpose: str
    requested_by: str
    expires_at: datetime


@router.post("/requests", status_code=201)
def ask(body: TraceRequestBody, who: Officer, request: Request) -> TraceRequested:
    """Ask another officer to agree to one trace."""
    found = office_of(request).tracer.request(
        who, query_of(body, body.alpha), body.users.indices(), body.purpose, top=body.top
    )
    return TraceRequested(
        id=found.id,
        subject=found.subject,
        purpose=found.purpose,
        requested_by=found.requested_by,
        expires_at=found.expires_at,
    )


@router.post("")
def trace(body: TraceBody, who: Officer, request: Request) -> TraceAnswer:
    """Trace, with an approval that this uses up."""
    query = query_of(body, body.alpha)
    found = office_of(request).tracer.trace(
        who, query, body.users.indices(), approval=body.approval, top=body.top
    )
    return traced_answer(found)
