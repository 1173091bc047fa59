"""Logging in and out: a token is shown once and becomes a session of this browser."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from filigrane.keys import _Secret
from filigrane.service.auth import office_of
from filigrane.service.problems import Problem
from filigrane.service.web.answering import PAGES, REFUSALS, apart, failed, moved, said_of, shown
from filigrane.service.web.forms import read_form
from filigrane.service.web.visits import (
    LoggedOut,
    check_csrf,
    cookie_name,
    sessions_of,
    visitor_of,
)

router = APIRouter()


@router.get("/login")
async def show(request: Request) -> Response:
    """Where a token is shown once."""
    return await shown(request, "login.html", _values(request))


@router.post("/login")
async def log_in(request: Request) -> Response:
    """Turn a token into a session."""
    office = office_of(request)
    try:
        form = await read_form(request)
        token = _Secret(form.line("token"))
        who = await office.gatekeeper.principal(token)
        if who.engine is not None:
            raise Problem(403, "role", "This is the token of an engine; people have others.")
        cookie = await apart(sessions_of(request).seal, token)
    except REFUSALS as error:
        said = said_of(error)
        values = _values(request) | {"problem": said}
        return await shown(request, "login.html", values, said.status)
    answer = moved(next((address for address, _, roles in PAGES if roles & who.roles), "/"))
    web = office.settings.web
    answer.set_cookie(
        cookie_name(office),
        cookie.reveal(),
        max_age=web.session_s,
        path="/",
        secure=web.secure_cookie,
        httponly=True,
        samesite="strict",
    )
    return answer


@router.post("/logout")
async def log_out(request: Request) -> Response:
    """End the session of this browser."""
    try:
        visitor = await visitor_of(request)
        check_csrf(await read_form(request), visitor)
    except LoggedOut:
        pass
    except REFUSALS as error:
        return await failed(request, error)
    office = office_of(request)
    answer = moved("/login?done=out")
    answer.delete_cookie(
        cookie_name(office),
        path="/",
        secure=office.settings.web.secure_cookie,
        httponly=True,
        samesite="strict",
    )
    return answer


def _values(request: Request) -> dict[str, Any]:
    return {"minutes": office_of(request).settings.web.session_s // 60, "problem": None}
