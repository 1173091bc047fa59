"""What every page does around its own work: let in or refuse, show, send on, and say what failed.

A form of a session goes one way only, through `acted`: read, checked for where it came from, acted
on; a refusal is said on the page that the form stands on, with what was typed still in it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import quote

import anyio.to_thread
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from filigrane.errors import FiligraneError
from filigrane.service import problems, telemetry
from filigrane.service.auth import check_roles
from filigrane.service.web import words
from filigrane.service.web.forms import Form, read_form
from filigrane.service.web.rendering import HEADERS, page
from filigrane.service.web.visits import LoggedOut, Visitor, check_csrf, visitor_of
from filigrane.store.records import Role

__all__ = [
    "EXPERTS",
    "KEEPERS",
    "OFFICERS",
    "PAGES",
    "REFUSALS",
    "Said",
    "acted",
    "apart",
    "download",
    "failed",
    "for_roles",
    "menu_of",
    "moved",
    "said_of",
    "shown",
]

_T = TypeVar("_T")

EXPERTS: Final = frozenset({Role.DETECTOR_EXPERT})
OFFICERS: Final = frozenset({Role.ATTRIBUTION_OFFICER})
KEEPERS: Final = frozenset({Role.KEY_ADMIN, Role.CUSTODIAN, Role.AUDITOR})
PAGES: Final = (
    ("/expert", "Evidence", EXPERTS),
    ("/trace", "Trace", OFFICERS),
    ("/keys", "Keys", KEEPERS),
)
"""Address, name and roles of the pages that need a session."""
REFUSALS: Final = (FiligraneError, HTTPException)
"""What is said to people in words; everything else is an error of the service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A refusal as the page says it."""

    status: int
    title: str
    detail: str


async def apart(work: Callable[..., _T], *given: Any) -> _T:
    """Work that may wait for a database or compute for a while, in a thread."""
    return await anyio.to_thread.run_sync(work, *given)


async def for_roles(
    request: Request, roles: frozenset[Role], show: Callable[[Visitor], Awaitable[Response]]
) -> Response:
    """A page for visitors with one of the roles; others are sent to log in, or refused."""
    visitor: Visitor | None = None
    try:
        visitor = await visitor_of(request)
        check_roles(visitor.who, roles)
        return await show(visitor)
    except LoggedOut:
        if _partial(request):
            return Response(status_code=200, headers={**HEADERS, "HX-Redirect": "/login"})
        return moved("/login")
    except REFUSALS as error:
        return await failed(request, error, visitor)
    except Exception as error:
        # People get a page, whatever happened; the log gets its line.
        telemetry.failure(request.scope, error)
        return await failed(request, error, visitor)


async def acted(
    request: Request,
    roles: frozenset[Role],
    act: Callable[[Visitor, Form], Awaitable[Response]],
    again: Callable[[Visitor, Form, Said], Awaitable[Response]] | None = None,
) -> Response:
    """The answer to a form of a session.

    act: does what the form asks for and answers; again: the page of the form, with a refusal said
    on it (without it, a page of its own says it).
    """

    async def run(visitor: Visitor) -> Response:
        form = await read_form(request)
        check_csrf(form, visitor)
        try:
            return await act(visitor, form)
        except REFUSALS as error:
            if again is None:
                raise
            return await again(visitor, form, said_of(error))

    return await for_roles(request, roles, run)


def said_of(error: Exception) -> Said:
    """An error in words for people."""
    problem = problems.as_problem(error)
    status, detail = problem.status_code, str(problem.detail)
    return Said(
        status=status,
        title=words.REFUSALS.get(status, HTTPStatus(status).phrase),
        detail=detail[:1].upper() + detail[1:],
    )


async def failed(request: Request, error: Exception, visitor: Visitor | None = None) -> Response:
    """A page of its own that says an error."""
    said = said_of(error)
    return await shown(
        request,
        "error.html",
        {"problem": said},
        said.status,
        part="_problem.html",
        visitor=visitor,
    )


async def shown(
    request: Request,
    template: str,
    values: dict[str, Any],
    status: int = 200,
    *,
    part: str | None = None,
    visitor: Visitor | None = None,
) -> Response:
    """A page, or the part of it that htmx asked for, with who is logged in."""
    if visitor is None:
        try:
            visitor = await visitor_of(request)
        except (LoggedOut, *REFUSALS):
            visitor = None
    common = {
        "menu": menu_of(visitor),
        "here": request.url.path,
        "who": None if visitor is None else visitor.who,
        "csrf": "" if visitor is None else visitor.session.csrf,
        "done": words.DONE.get(request.query_params.get("done", "")),
    }
    name = part if part is not None and _partial(request) else template
    return page(name, status, common | values)


def menu_of(visitor: Visitor | None) -> list[tuple[str, str]]:
    """Address and name of the pages that somebody may open."""
    roles = frozenset[Role]() if visitor is None else visitor.who.roles
    return [("/", "Check")] + [(address, name) for address, name, may in PAGES if may & roles]


def moved(address: str) -> RedirectResponse:
    """Send the browser on to a page that can be loaded again."""
    return RedirectResponse(address, status_code=303, headers=HEADERS)


def download(receipt: str) -> Response:
    """A receipt as a file."""
    name = f"filigrane-receipt-{datetime.now(UTC):%Y%m%d-%H%M%S}.jws"
    return Response(
        receipt + "\n",
        headers={
            **HEADERS,
            "Content-Disposition": f"attachment; filename={quote(name)}",
        },
        media_type="application/jose",
    )


def _partial(request: Request) -> bool:
    return request.headers.get("hx-request") == "true"
