"""The page of officers: asking, agreeing as the second one, and tracing."""

from datetime import UTC, datetime
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from filigrane.service.auth import office_of
from filigrane.service.detecting import CAUTIONS, Query
from filigrane.service.office import Office
from filigrane.service.tracing import MAX_USERS, Traced
from filigrane.service.web.answering import (
    OFFICERS,
    Said,
    acted,
    apart,
    for_roles,
    moved,
    shown,
)
from filigrane.service.web.approvals import agree, repeatable, usable
from filigrane.service.web.forms import Form
from filigrane.service.web.questions import query_of, readable
from filigrane.service.web.visits import Visitor

router = APIRouter(prefix="/trace")

_ALPHA: Final = 1e-6
"""Who is named here has at most this p-value, all users taken together."""
_LISTED: Final = 50


@router.get("")
async def show(request: Request) -> Response:
    """Asking, agreeing and tracing."""
    return await for_roles(request, OFFICERS, lambda visitor: _page(request, visitor, Form({})))


@router.post("/ask")
async def ask(request: Request) -> Response:
    """Ask a second officer."""
    office = office_of(request)

    async def act(visitor: Visitor, form: Form) -> Response:
        query, users = _wanted(office, form)
        await apart(office.tracer.request, visitor.who, query, users, form.line("purpose"))
        return moved("/trace?done=requested")

    async def again(visitor: Visitor, form: Form, said: Said) -> Response:
        return await _page(request, visitor, form, step="ask", said=said)

    return await acted(request, OFFICERS, act, again)


@router.post("/agree")
async def give(request: Request) -> Response:
    """Agree, as the second officer."""
    office = office_of(request)

    async def act(visitor: Visitor, form: Form) -> Response:
        done = await apart(agree, office, visitor.who, form, "trace")
        return moved(f"/trace?done={done}")

    async def again(visitor: Visitor, form: Form, said: Said) -> Response:
        return await _page(request, visitor, form, said=said)

    return await acted(request, OFFICERS, act, again)


@router.post("")
async def trace(request: Request) -> Response:
    """Trace, with an approval."""
    office = office_of(request)

    async def act(visitor: Visitor, form: Form) -> Response:
        query, users = _wanted(office, form)

        def run() -> Traced:
            found: Traced = office.tracer.trace(
                visitor.who, query, users, approval=form.line("approval")
            )
            return found

        return await _page(request, visitor, form, step="run", traced=await apart(run))

    async def again(visitor: Visitor, form: Form, said: Said) -> Response:
        return await _page(request, visitor, form, step="run", said=said)

    return await acted(request, OFFICERS, act, again)


def _wanted(office: Office, form: Form) -> tuple[Query, range]:
    query = query_of(office, form, alpha=_ALPHA)
    return query, range(form.whole("users", 1, MAX_USERS))


async def _page(
    request: Request,
    visitor: Visitor,
    form: Form,
    *,
    step: str = "",
    said: Said | None = None,
    traced: Traced | None = None,
) -> Response:
    office = office_of(request)
    now = datetime.now(UTC)

    def values() -> dict[str, Any]:
        asked = [one for one in office.access.approvals(visitor.who.tenant) if one.kind == "trace"]
        return {
            "keys": [key for key in readable(office, visitor.who) if key.spec.scheme],
            "tokenizers": office.tokenizers.names(),
            "approvals": asked[::-1][:_LISTED],
            "ready": [one for one in asked[::-1] if one.approved_by and usable(one, now)],
            "again": [one for one in asked[::-1] if repeatable(one, visitor.who, now)],
            "now": now,
            "max_users": MAX_USERS,
            "chosen": {
                "step": step,
                "text": form.fields.get("text", ""),
                "key": form.line("key"),
                "users": form.line("users"),
                "tokenizer": form.line("tokenizer"),
                "purpose": form.line("purpose") if step == "ask" else "",
                "approval": form.line("approval"),
            },
            "problem": said,
            "traced": traced,
            "cautions": [CAUTIONS[code] for code in (traced.cautions if traced else ())],
        }

    status = said.status if said is not None else 200
    return await shown(request, "trace.html", await apart(values), status, visitor=visitor)
