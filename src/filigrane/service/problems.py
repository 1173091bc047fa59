"""Errors of the service as RFC 9457 problems, which repeat nothing of what was sent.

    {"type": "about:blank", "title": "Conflict", "status": 409, "code": "state",
     "detail": "acme.chat@3 is retired, from which it cannot become active; possible: ..."}

`code` is what programs compare. Messages of filigrane's own errors are passed on where they are
made of names that the tenant itself gave to its keys; wherever a message could quote a request, a
fixed sentence stands instead.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from filigrane import errors
from filigrane.service.tokenizing import NoTokenizer

__all__ = [
    "MEDIA_TYPE",
    "PLACES",
    "Problem",
    "ProblemBody",
    "as_problem",
    "headers_of",
    "no_token",
    "response",
    "told",
    "unauthorized",
    "validation_problem",
]

MEDIA_TYPE: Final = "application/problem+json"

_OWN_WORDS: Final = (
    errors.NotFound,
    errors.AlreadyExists,
    errors.StateError,
    errors.ReceiptError,
    errors.AuditError,
    errors.NotReady,
    errors.Busy,
    NoTokenizer,
)
"""Errors whose messages may be shown as they are."""

_BY_ERROR: Final[Mapping[type[Exception], tuple[int, str, str]]] = {
    errors.KmsUnavailable: (
        503,
        "kms_unavailable",
        "The key management system does not answer; nothing was changed. Try again later.",
    ),
    errors.KmsError: (
        503,
        "kms",
        "The key management system refused; nothing was changed. The operator finds more in "
        "/readyz and in the log.",
    ),
    errors.StoreUnavailable: (
        503,
        "store_unavailable",
        "The database does not answer; nothing was changed. Try again later.",
    ),
    errors.StoreVersionError: (
        503,
        "store_version",
        "The database has tables of another version than the service; nothing was changed. Trying "
        "again does not help: have the operator run `filigrane keys migrate`, or the service of "
        "the tables' version.",
    ),
    errors.StoreFull: (
        503,
        "store_full",
        "There is no room left for the database; nothing was changed. What only reads goes on; "
        "for everything else have the operator free some room.",
    ),
    errors.StoreReadOnly: (
        503,
        "store_read_only",
        "The database takes no changes at present; nothing was changed. What only reads goes on; "
        "for everything else have the operator look at the database.",
    ),
    errors.StoreDamaged: (
        503,
        "store_damaged",
        "What the database holds was damaged or altered; nothing was done with it. Trying again "
        "does not help: have the operator look at the database and its backup.",
    ),
    errors.StoreError: (
        503,
        "store",
        "The database refused; nothing was changed. Trying again does not help: have the operator "
        "look at the service's log and the database.",
    ),
    errors.Busy: (503, "busy", ""),
    errors.NotFound: (404, "not_found", ""),
    errors.AlreadyExists: (409, "exists", ""),
    errors.StateError: (409, "state", ""),
    errors.ReceiptError: (422, "receipt", ""),
    errors.AuditError: (500, "audit", ""),
    errors.NotReady: (503, "not_ready", ""),
    errors.TooShort: (422, "too_short", "The text is too short to be tested; send more of it."),
    errors.VocabularyMismatch: (422, "vocabulary", "A token id is outside the vocabulary."),
    errors.TokenError: (
        422,
        "tokens",
        "Send one of the two: tokens, a list of whole numbers, 0 to 4294967294, or text, which is "
        "valid Unicode without lone surrogates and has at most 30 combining marks in a row.",
    ),
    errors.KeyFormatError: (
        422,
        "key",
        "A name or a key cannot be read: tenants and keys are named with a-z 0-9 -, and a key is "
        "the text that its export wrote.",
    ),
    errors.SchemeError: (
        422,
        "scheme",
        "There is no such scheme or profile, or its parameters are out of range; GET /v1/profiles "
        "lists them.",
    ),
    errors.ModelError: (422, "tokenizer", "A tokenizer of this service cannot be read; send ids."),
    errors.FiligraneError: (422, "refused", "The request cannot be carried out as it stands."),
}
"""Error -> status, code, what is said of it where its own words are not shown."""

_RETRY_S: Final = "5"
_LATER_S: Final[Mapping[type[Exception], str]] = {
    errors.Busy: "30",
    errors.StoreError: "60",
    errors.StoreVersionError: "60",
    errors.StoreFull: "60",
    errors.StoreReadOnly: "60",
    errors.StoreDamaged: "60",
}
"""Error -> when to try again, seconds, where `_RETRY_S` would be too soon to be of use."""
_SHOWN: Final = frozenset({"max_length", "min_length", "actual_length", "ge", "gt", "le", "lt"})
_MAX_ERRORS: Final = 10
_LONGEST_NAME: Final = 64
PLACES: Final = frozenset({"body", "query", "path", "header", "cookie"})
"""What the place of an error begins with."""
_TOLD: Final = "told"


class ProblemBody(BaseModel):
    """An error (RFC 9457); repeats nothing of the request."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    errors: list[dict[str, Any]] | None = None
    missing_roles: list[str] | None = None


class Problem(HTTPException):
    """What a route raises to refuse. code: for programs; detail: for people, says what to do."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, detail, headers=dict(headers) if headers else None)
        self.code = code
        self.more = dict(more or {})


def response(problem: Problem) -> Response:
    """The answer that says it."""
    body = {
        "type": "about:blank",
        "title": _title(problem.status_code),
        "status": problem.status_code,
        "code": problem.code,
        "detail": problem.detail,
        **problem.more,
    }
    return Response(
        json.dumps(body, ensure_ascii=False),
        status_code=problem.status_code,
        headers=headers_of(problem),
        media_type=MEDIA_TYPE,
    )


def headers_of(problem: Problem) -> dict[str, str]:
    """The headers that an answer with it has, whatever its body looks like."""
    headers = dict(problem.headers or {})
    if problem.status_code == 503:
        headers.setdefault("Retry-After", _RETRY_S)
    return headers


def as_problem(error: Exception) -> Problem:
    """What is said of an error: by its class, in its own words only where those are safe."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        return _of_framework(error)
    if isinstance(error, errors.BudgetSpent):
        return _too_often(error)
    for kind in type(error).__mro__:
        if kind in _BY_ERROR:
            status, code, words = _BY_ERROR[kind]
            detail = str(error) if isinstance(error, _OWN_WORDS) else words
            later = {"Retry-After": _LATER_S[kind]} if kind in _LATER_S else None
            return Problem(status, code, detail, headers=later)
    return Problem(500, "internal", "An error of the service itself; its log has a line about it.")


def unauthorized(detail: str, *, code: str = "token") -> Problem:
    """401 in words, with the challenge that RFC 6750 asks for."""
    error = "" if code == "no_token" else ', error="invalid_token"'
    return Problem(
        401,
        code,
        f"Not signed in: {detail}",
        headers={"WWW-Authenticate": f'Bearer realm="filigrane"{error}'},
    )


def no_token() -> Problem:
    """401 for a request without a token where one is needed."""
    return unauthorized("send Authorization: Bearer TOKEN.", code="no_token")


def told(words: str) -> PydanticCustomError:
    """What a validator raises whose words a refusal may show: fixed ones, nothing of a request."""
    return PydanticCustomError(_TOLD, "{words}", {"words": words})


def validation_problem(
    found: Sequence[Mapping[str, Any]],
    known: frozenset[str],
    *,
    offered: frozenset[str] | None = None,
    line: int | None = None,
) -> Problem:
    """422 from what pydantic found.

    known: names of fields and parameters of the API, the only ones that are named; what was sent,
    and names of it, are not. offered: those that this request could have had, all by default; one
    of them is named where an unknown field looks like it. line: of the body, where it has lines.
    """
    listed = []
    for item in found[:_MAX_ERRORS]:
        kind, place = str(item["type"]), list(item["loc"])
        hint = None
        if kind == "extra_forbidden":
            hint = _instead_of(str(place[-1]), known if offered is None else offered)
            if place[-1] not in known:
                place.pop()
        elif kind == _TOLD:
            kind, hint = "form", str(item["ctx"]["words"])
        where = [part if isinstance(part, int) or part in known else "?" for part in place]
        entry: dict[str, Any] = {"where": ".".join(map(str, where)), "problem": kind}
        if line is not None:
            entry["line"] = line
        if hint is not None:
            entry["hint"] = hint
        limits = {
            name: value
            for name, value in (item.get("ctx") or {}).items()
            if name in _SHOWN and isinstance(value, int | float)
        }
        if limits:
            entry["limits"] = limits
        listed.append(entry)
    if any(item["type"] == "json_invalid" for item in found):
        what = "The body" if line is None else f"Line {line} of the body"
        return Problem(400, "malformed", f"{what} is not JSON.")
    return Problem(
        422,
        "invalid",
        "The request does not have the form that /openapi.json describes.",
        more={"errors": listed},
    )


def _instead_of(name: str, offered: frozenset[str]) -> str:
    """What to do about an unknown field, which itself is not repeated."""
    near = difflib.get_close_matches(name[:_LONGEST_NAME], sorted(offered - PLACES), n=1)
    return f"No such field here; did you mean {near[0]}?" if near else "No such field here."


def _too_often(error: errors.BudgetSpent) -> Problem:
    """429, or 413 for a text that is too long for the public tier."""
    words = f"{str(error)[:1].upper()}{str(error)[1:]}"
    if error.reason == "length":
        return Problem(413, "too_large", words)
    return Problem(
        429,
        f"budget_{error.reason}",
        words,
        headers={"Retry-After": str(int(error.retry_after_s) + 1)},
    )


def _of_framework(error: HTTPException) -> Problem:
    codes = {
        400: ("malformed", "The body cannot be read."),
        404: ("not_found", "There is no such thing, or none that you may see."),
        405: ("method", "This address does not take this method."),
        413: ("too_large", "The body is too large."),
    }
    code, detail = codes.get(error.status_code, ("refused", _title(error.status_code) + "."))
    return Problem(error.status_code, code, detail, headers=error.headers)


def _title(status: int) -> str:
    return HTTPStatus(status).phrase
