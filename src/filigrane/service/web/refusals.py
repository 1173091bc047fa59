"""What is said to a browser where no page could answer: an address that does not exist, a body that
is too large, a service that is too busy.

Programs get problems of RFC 9457 from everywhere, and so does everybody from the addresses of the
API; who asks for HTML elsewhere is a person and gets a page with a way back.
"""

from typing import Final

from fastapi import Request
from starlette.responses import Response
from starlette.types import Scope

from filigrane.errors import FiligraneError
from filigrane.service import problems
from filigrane.service.problems import Problem
from filigrane.service.web.answering import failed, menu_of, said_of
from filigrane.service.web.rendering import page

__all__ = ["bare_page", "for_people", "full_page"]

_OF_PROGRAMS: Final = ("/v1/", "/.well-known/", "/openapi.json", "/healthz", "/readyz", "/metrics")


def for_people(scope: Scope) -> bool:
    """Whether a request of the page, or of a browser for no address of programs."""
    headers = dict(scope["headers"])
    if scope["path"].startswith(_OF_PROGRAMS):
        return False
    kinds = headers.get(b"accept", b"").split(b",")
    wanted = any(kind.partition(b";")[0].strip().lower() == b"text/html" for kind in kinds)
    return wanted or headers.get(b"hx-request") == b"true"


async def full_page(request: Request, error: Exception) -> Response:
    """A refusal as a page that knows who is logged in."""
    problem = problems.as_problem(error)
    if problem.status_code == 404 and not isinstance(error, Problem | FiligraneError):
        # The router's own: nothing was looked for that others could have.
        problem = Problem(
            404,
            "not_found",
            "No page has this address. Look for a slip in it, or begin at the start.",
        )
    return _with_headers(await failed(request, problem), problem)


def bare_page(scope: Scope, problem: Problem) -> Response:
    """The same for what never reached the application: nobody is asked who is logged in."""
    said = said_of(problem)
    values = {
        "problem": said,
        "menu": menu_of(None),
        "here": scope["path"],
        "who": None,
        "csrf": "",
        "done": None,
    }
    partial = dict(scope["headers"]).get(b"hx-request") == b"true"
    name = "_problem.html" if partial else "error.html"
    return _with_headers(page(name, said.status, values), problem)


def _with_headers(answer: Response, problem: Problem) -> Response:
    """Connection, Allow and Retry-After belong to a refusal whatever it looks like."""
    for name, value in problems.headers_of(problem).items():
        answer.headers.setdefault(name, value)
    return answer
