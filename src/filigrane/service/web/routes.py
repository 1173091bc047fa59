"""What each address of the web page does. Pages under a role need a session; the first page is for
everybody and sets no cookie.

Every form is answered by the whole page, or, where htmx asks, by the part that changed. After a
change the browser is sent on to a page that can be loaded again.
"""

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import quote

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from filigrane.custody.hierarchy import KeySpec
from filigrane.errors import FiligraneError, NotFound
from filigrane.keys import _Secret
from filigrane.service import problems, telemetry
from filigrane.service.auth import check_roles, office_of
from filigrane.service.detecting import CAUTIONS, Finding, Query
from filigrane.service.office import Office
from filigrane.service.problems import Problem
from filigrane.service.public import BudgetSpent, PublicAnswer
from filigrane.service.routes import detect as api
from filigrane.service.tracing import MAX_USERS, Busy, Traced
from filigrane.service.web import words
from filigrane.service.web.forms import Form, exactly, read_form
from filigrane.service.web.heat import cut
from filigrane.service.web.rendering import HEADERS, page, static_file
from filigrane.service.web.sessions import Session, Sessions, same_secret
from filigrane.store.records import Approval, Principal, Role, VersionRecord

router = APIRouter(include_in_schema=False)

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
ALPHAS: Final = (
    ("0.001", "1 in 1,000"),
    ("1e-06", "1 in a million"),
    ("1e-09", "1 in a billion"),
    ("1e-12", "1 in a trillion"),
)
MARKS: Final = (
    ("gumbel", "Gumbel race: strongest, for sampling"),
    ("tournament", "Tournament: strong, some randomness stays"),
    ("delta", "Delta: medium, text law unchanged"),
    ("gamma", "Gamma: mild, text law unchanged"),
    ("greenlist", "Green list: for greedy and beam search too"),
)
_TITLES: Final = {
    400: "That could not be read",
    401: "This token does not open anything",
    403: "This is not yours to do",
    404: "There is no such thing",
    408: "That took too long",
    409: "That is not possible now",
    413: "That is too long",
    415: "That could not be read",
    422: "That cannot be used as it is",
    429: "Please wait a little",
    500: "Something went wrong here",
    503: "Not available at the moment",
}


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who is logged in."""

    who: Principal
    session: Session


@dataclass(frozen=True, slots=True)
class Said:
    """A refusal as the page says it."""

    status: int
    title: str
    detail: str


@dataclass(frozen=True, slots=True)
class Passage:
    """A span as the page lists it: characters start to stop - 1, and how it begins."""

    start: int
    stop: int
    begins: str
    n_scored: int
    log_pvalue: float


class _LoggedOut(Exception):
    """The page needs a session and there is none."""


# Public


@router.get("/")
async def public_page(request: Request) -> Response:
    """The page for everybody."""
    return await _shown(request, "public.html", _public_values(office_of(request)))


@router.post("/")
async def public_check(request: Request) -> Response:
    """One of three classes for a text."""
    office = office_of(request)
    values = _public_values(office)
    try:
        form = await read_form(request)
        values["text"] = form.fields.get("text", "")
        text = _text(form)
        answer = await _apart(_public_answer, office, text, _address(request))
        api.count("public", answer.finding, answer.verdict)
        values |= {"answer": answer, "exact": exactly(text), "alpha": _log_alpha(answer.finding)}
        return await _shown(request, "public.html", values, part="_public.html")
    except (FiligraneError, HTTPException) as error:
        said = _said(error)
        return await _shown(
            request, "public.html", values | {"problem": said}, said.status, part="_problem.html"
        )


@router.post("/receipt")
async def public_receipt(request: Request) -> Response:
    """A signed receipt of the public answer, as a file."""
    office = office_of(request)
    try:
        form = await read_form(request)

        def issue() -> str:
            answer = _public_answer(office, _text(form), _address(request), receipt=True)
            settings = office.settings.public
            assert settings is not None
            receipt: str = office.receipts.issue(
                settings.tenant, answer.as_told, expert=False, actor="public"
            )
            return receipt

        return _download(await _apart(issue))
    except (FiligraneError, HTTPException) as error:
        return await _failed(request, error)


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """A file of the page itself."""
    found = static_file(name)
    if found is None:
        raise NotFound("There is no such file.")
    return found


# Sessions


@router.get("/login")
async def login_page(request: Request) -> Response:
    """Where a token is shown once."""
    return await _shown(request, "login.html", _login_values(request))


@router.post("/login")
async def login(request: Request) -> Response:
    """Turn a token into a session."""
    office = office_of(request)
    try:
        form = await read_form(request)
        token = _Secret(form.line("token"))
        who = await office.gatekeeper.principal(token)
        if who.engine is not None:
            raise Problem(403, "role", "This is the token of an engine; people have others.")
        cookie = await _apart(_sessions(request).seal, token)
    except (FiligraneError, HTTPException) as error:
        said = _said(error)
        values = _login_values(request) | {"problem": said}
        return await _shown(request, "login.html", values, said.status)
    answer = _moved(next((address for address, _, roles in PAGES if roles & who.roles), "/"))
    web = office.settings.web
    answer.set_cookie(
        _cookie_name(office),
        cookie.reveal(),
        max_age=web.session_s,
        path="/",
        secure=web.secure_cookie,
        httponly=True,
        samesite="strict",
    )
    return answer


@router.post("/logout")
async def logout(request: Request) -> Response:
    """End the session of this browser."""
    try:
        visitor = await _visitor(request)
        _check_csrf(await read_form(request), visitor)
    except _LoggedOut:
        pass
    except (FiligraneError, HTTPException) as error:
        return await _failed(request, error)
    office = office_of(request)
    answer = _moved("/login?done=out")
    answer.delete_cookie(
        _cookie_name(office),
        path="/",
        secure=office.settings.web.secure_cookie,
        httponly=True,
        samesite="strict",
    )
    return answer


# Experts


@router.get("/expert")
async def expert_page(request: Request) -> Response:
    """The form for experts."""

    async def show(visitor: Visitor) -> Response:
        values = await _apart(_expert_values, office_of(request), visitor, Form({}))
        return await _shown(request, "expert.html", values, visitor=visitor)

    return await _for(request, EXPERTS, show)


@router.post("/expert")
async def expert_check(request: Request) -> Response:
    """Verdict, numbers, passages and heat map of a text."""
    office = office_of(request)

    async def check(visitor: Visitor) -> Response:
        form = await read_form(request)
        _check_csrf(form, visitor)
        values = await _apart(_expert_values, office, visitor, form)
        try:
            text = _text(form)
            finding = await _apart(_expert_finding, office, visitor.who, form, text, True)
        except (FiligraneError, HTTPException) as error:
            said = _said(error)
            return await _shown(
                request,
                "expert.html",
                values | {"problem": said},
                said.status,
                part="_problem.html",
                visitor=visitor,
            )
        api.count("expert", finding)
        values |= await _apart(_finding_values, text, finding)
        return await _shown(request, "expert.html", values, part="_finding.html", visitor=visitor)

    return await _for(request, EXPERTS, check)


@router.post("/expert/receipt")
async def expert_receipt(request: Request) -> Response:
    """A signed receipt with the numbers, as a file."""
    office = office_of(request)

    async def issue(visitor: Visitor) -> Response:
        form = await read_form(request)
        _check_csrf(form, visitor)

        def receipt() -> str:
            finding = _expert_finding(office, visitor.who, form, _text(form), True)
            signed: str = office.receipts.issue(
                visitor.who.tenant, finding, expert=True, actor=visitor.who.name
            )
            return signed

        return _download(await _apart(receipt))

    return await _for(request, EXPERTS, issue)


# Officers


@router.get("/trace")
async def trace_page(request: Request) -> Response:
    """Asking, agreeing and tracing."""

    async def show(visitor: Visitor) -> Response:
        return await _trace_page(request, visitor, Form({}))

    return await _for(request, OFFICERS, show)


@router.post("/trace/ask")
async def trace_ask(request: Request) -> Response:
    """Ask a second officer."""
    office = office_of(request)

    async def ask(visitor: Visitor) -> Response:
        form = await read_form(request)
        _check_csrf(form, visitor)
        try:
            query, users = _trace_query(office, form)
            purpose = form.line("purpose")
            await _apart(office.tracer.request, visitor.who, query, users, purpose)
        except (FiligraneError, HTTPException) as error:
            return await _trace_page(request, visitor, form, step="ask", said=_said(error))
        return _moved("/trace?done=requested")

    return await _for(request, OFFICERS, ask)


@router.post("/trace/agree")
async def trace_agree(request: Request) -> Response:
    """Agree, as the second officer."""
    office = office_of(request)

    async def agree(visitor: Visitor) -> Response:
        form = await read_form(request)
        _check_csrf(form, visitor)
        try:
            await _apart(_agree, office, visitor.who, form, "trace")
        except (FiligraneError, HTTPException) as error:
            return await _trace_page(request, visitor, Form({}), said=_said(error))
        return _moved("/trace?done=approved")

    return await _for(request, OFFICERS, agree)


@router.post("/trace")
async def trace(request: Request) -> Response:
    """Trace, with an approval."""
    office = office_of(request)

    async def run(visitor: Visitor) -> Response:
        form = await read_form(request)
        _check_csrf(form, visitor)
        try:
            query, users = _trace_query(office, form)
            traced = await _apart(
                lambda: office.tracer.trace(
                    visitor.who, query, users, approval=form.line("approval")
                )
            )
        except (FiligraneError, HTTPException) as error:
            return await _trace_page(request, visitor, form, step="run", said=_said(error))
        return await _trace_page(request, visitor, form, step="run", traced=traced)

    return await _for(request, OFFICERS, run)


# Keys


@router.get("/keys")
async def keys_page(request: Request) -> Response:
    """All keys and their versions."""

    async def show(visitor: Visitor) -> Response:
        return await _keys_page(request, visitor, Form({}))

    return await _for(request, KEEPERS, show)


@router.post("/keys/{what}")
async def keys_change(what: str, request: Request) -> Response:
    """Change something about a key, and show the keys again."""
    if what not in _CHANGES:
        raise NotFound("There is no such address.")
    roles, change = _CHANGES[what]
    office = office_of(request)

    async def act(visitor: Visitor) -> Response:
        form = await read_form(request)
        _check_csrf(form, visitor)
        try:
            done = await _apart(change, office, visitor.who, form)
        except (FiligraneError, HTTPException) as error:
            return await _keys_page(request, visitor, form, said=_said(error))
        return _moved(f"/keys?done={done}")

    return await _for(request, roles, act)


def _create(office: Office, who: Principal, form: Form) -> str:
    tokenizer = form.line("tokenizer")
    mark = form.line("mark")
    if mark not in dict(MARKS):
        raise Problem(422, "scheme", "Choose one of the marks of the list.")
    spec = KeySpec(
        tenant=who.tenant,
        name=form.line("name"),
        model=form.line("model"),
        scheme=mark,
        tokenizer_sha256=office.tokenizers.sha256(tokenizer) if tokenizer else None,
        slots=_whole(form, "slots", 1, 64),
    )
    office.keybook.create(spec, actor=who.name, request_id=form.line("request") or None)
    return "created"


def _rotate(office: Office, who: Principal, form: Form) -> str:
    request_id = form.line("request") or None
    office.keybook.rotate(who.tenant, form.line("key"), actor=who.name, request_id=request_id)
    return "rotated"


def _promote(office: Office, who: Principal, form: Form) -> str:
    found = _version(office, who, form)
    office.keybook.promote(who.tenant, found.name, found.number, actor=who.name)
    return "promoted"


def _retire(office: Office, who: Principal, form: Form) -> str:
    found = _version(office, who, form)
    office.keybook.retire(who.tenant, found.name, found.number, actor=who.name)
    return "retired"


def _compromise(office: Office, who: Principal, form: Form) -> str:
    _check_sure(form)
    found = _version(office, who, form)
    try:
        since = datetime.fromisoformat(form.line("since"))
    except ValueError:
        raise Problem(422, "since", "Say since when, as a date and a time in UTC.") from None
    since = since if since.tzinfo else since.replace(tzinfo=UTC)
    office.keybook.compromise(who.tenant, found.name, found.number, since=since, actor=who.name)
    return "compromised"


def _ask_destroy(office: Office, who: Principal, form: Form) -> str:
    found = _version(office, who, form)
    purpose = form.line("purpose")
    office.access.request_approval(who.tenant, "destroy", found.id, purpose, who)
    return "requested"


def _agree_destroy(office: Office, who: Principal, form: Form) -> str:
    return _agree(office, who, form, "destroy")


def _destroy(office: Office, who: Principal, form: Form) -> str:
    _check_sure(form)
    found = _version(office, who, form)
    office.keybook.destroy(
        who.tenant, found.name, found.number, actor=who.name, approval=form.line("approval")
    )
    return "destroyed"


_ADMINS: Final = frozenset({Role.KEY_ADMIN})
_CUSTODIANS: Final = frozenset({Role.CUSTODIAN})
_CHANGES: Final[Mapping[str, tuple[frozenset[Role], Callable[[Office, Principal, Form], str]]]] = {
    "create": (_ADMINS, _create),
    "rotate": (_ADMINS, _rotate),
    "promote": (_ADMINS, _promote),
    "retire": (_ADMINS, _retire),
    "compromise": (_ADMINS | _CUSTODIANS, _compromise),
    "ask": (_CUSTODIANS, _ask_destroy),
    "agree": (_CUSTODIANS, _agree_destroy),
    "destroy": (_CUSTODIANS, _destroy),
}
"""Last part of an address under /keys -> who may, and what it does; answers with a code of DONE."""


# What pages show


def _public_values(office: Office) -> dict[str, Any]:
    settings = office.settings.public
    return {
        "open": settings is not None,
        "min_tokens": 0 if settings is None else settings.min_tokens,
        "text": "",
        "answer": None,
        "problem": None,
    }


def _login_values(request: Request) -> dict[str, Any]:
    return {"minutes": office_of(request).settings.web.session_s // 60, "problem": None}


def _expert_values(office: Office, visitor: Visitor, form: Form) -> dict[str, Any]:
    default = repr(office.settings.detector.alpha)
    alphas = [*ALPHAS]
    if default not in dict(ALPHAS):
        alphas.insert(0, (default, f"{default}, this service’s own"))
    return {
        "keys": _readable(office, visitor.who),
        "tokenizers": office.tokenizers.names(),
        "alphas": alphas,
        "text": form.fields.get("text", ""),
        "chosen": {
            "key": form.line("key"),
            "alpha": form.line("alpha") or default,
            "tokenizer": form.line("tokenizer"),
            "receipt": form.line("receipt"),
        },
        "finding": None,
        "problem": None,
    }


def _finding_values(text: str, finding: Finding) -> dict[str, Any]:
    heat = finding.heat
    spans = [
        Passage(
            span.start_char,
            span.stop_char,
            _beginning(text, span.start_char),
            span.n_scored,
            span.log_pvalue,
        )
        for span in finding.spans
        if span.start_char is not None and span.stop_char is not None
    ]
    stretches: Any = ()
    if heat is not None and heat.offsets is not None:
        borders = [(span.start, span.stop) for span in spans]
        stretches = cut(text, borders, np.asarray(heat.evidence), np.asarray(heat.offsets))
    return {
        "finding": finding,
        "exact": exactly(text),
        "verdicts": words.VERDICTS,
        "states": words.STATES,
        "cautions": [CAUTIONS[code] for code in finding.cautions if code in CAUTIONS],
        "spans": spans,
        "stretches": stretches,
    }


async def _trace_page(
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
            "keys": [key for key in _readable(office, visitor.who) if key.spec.scheme],
            "approvals": asked[::-1][:50],
            "ready": [one for one in asked[::-1] if one.approved_by and _usable(one, now)],
            "now": now,
            "max_users": MAX_USERS,
            "chosen": {
                "step": step,
                "text": form.fields.get("text", ""),
                "key": form.line("key"),
                "users": form.line("users"),
                "purpose": form.line("purpose") if step == "ask" else "",
                "approval": form.line("approval"),
            },
            "problem": said,
            "traced": traced,
            "cautions": [CAUTIONS[code] for code in (traced.cautions if traced else ())],
        }

    status = said.status if said is not None else 200
    return await _shown(request, "trace.html", await _apart(values), status, visitor=visitor)


async def _keys_page(
    request: Request, visitor: Visitor, form: Form, *, said: Said | None = None
) -> Response:
    office, who = office_of(request), visitor.who
    now = datetime.now(UTC)

    def values() -> dict[str, Any]:
        destroying = {
            one.subject: one
            for one in office.access.approvals(who.tenant)
            if one.kind == "destroy" and _usable(one, now)
        }
        return {
            "keys": office.keybook.keys(who.tenant),
            "tokenizers": office.tokenizers.names(),
            "marks": MARKS,
            "states": words.STATES,
            "admin": Role.KEY_ADMIN in who.roles,
            "custodian": Role.CUSTODIAN in who.roles,
            "destroying": destroying,
            "now_input": f"{now:%Y-%m-%dT%H:%M}",
            # Sending the same form twice makes one key.
            "request_id": secrets.token_hex(8),
            "chosen": {
                name: form.line(name) for name in ("name", "model", "mark", "tokenizer", "slots")
            },
            "problem": said,
        }

    status = said.status if said is not None else 200
    return await _shown(request, "keys.html", await _apart(values), status, visitor=visitor)


# Parts of the work


def _public_answer(
    office: Office, text: str, address: str | None, *, receipt: bool = False
) -> PublicAnswer:
    settings = office.settings.public
    if settings is None:
        raise Problem(404, "no_public_tier", "This service answers nobody without a token.")
    try:
        found: PublicAnswer = office.public.answer(
            settings.tenant, text, identity=None, address=address, receipt=receipt
        )
        return found
    except BudgetSpent as error:
        raise api.spent(error) from None
    except NotFound:
        raise Problem(503, "no_keys", "This service has no keys yet that it could try.") from None


def _expert_finding(
    office: Office, who: Principal, form: Form, text: str, evidence: bool
) -> Finding:
    try:
        alpha = float(form.line("alpha") or office.settings.detector.alpha)
    except ValueError:
        raise Problem(422, "alpha", "Choose one of the levels of the list.") from None
    if len(text) > 4 * office.settings.limits.text_tokens:
        raise Problem(413, "too_long", "This text is too long; send parts of it.")
    query = Query(
        text=text,
        key=form.line("key") or None,
        tokenizer=form.line("tokenizer") or None,
        receipt=form.line("receipt") or None,
        alpha=alpha,
        evidence=evidence,
    )
    found: Finding = office.detector.detect(who.tenant, query)
    return found


def _trace_query(office: Office, form: Form) -> tuple[Query, range]:
    text = _text(form)
    if len(text) > 4 * office.settings.limits.text_tokens:
        raise Problem(413, "too_long", "This text is too long; send parts of it.")
    return Query(text=text, key=form.line("key") or None), range(
        _whole(form, "users", 1, MAX_USERS)
    )


def _agree(office: Office, who: Principal, form: Form, kind: str) -> str:
    found = office.access.approval(who.tenant, form.line("approval"))
    if found.kind != kind:
        raise Problem(404, "not_found", "There is no such request here.")
    office.access.approve(who.tenant, found.id, who)
    return "approved"


def _version(office: Office, who: Principal, form: Form) -> VersionRecord:
    return office.keybook.version(who.tenant, form.line("version"))


def _readable(office: Office, who: Principal) -> list[Any]:
    """Keys with a version that reads."""
    return [
        key
        for key in office.keybook.keys(who.tenant)
        if any(version.state.reads for version in key.versions)
    ]


def _usable(approval: Approval, now: datetime) -> bool:
    return approval.used_at is None and approval.expires_at > now


def _text(form: Form) -> str:
    text = form.text()
    if not text.strip():
        raise Problem(422, "empty", "Paste a text or choose a file first.")
    return text


def _whole(form: Form, name: str, low: int, high: int) -> int:
    value = form.line(name)
    if not value.isascii() or not value.isdigit() or not low <= int(value[:12]) <= high:
        raise Problem(422, name, f"{name.capitalize()}: a whole number from {low:,} to {high:,}.")
    return int(value)


def _check_sure(form: Form) -> None:
    if form.line("sure") != "yes":
        raise Problem(422, "sure", "Tick the box: this cannot be taken back.")


def _beginning(text: str, start: int) -> str:
    piece = " ".join(text[start : start + 80].split())
    return piece[:40] + "…" if len(piece) > 40 else piece


def _log_alpha(finding: Finding) -> float:
    return float(np.log(finding.alpha))


def _address(request: Request) -> str | None:
    return None if request.client is None else request.client.host


# Visitors and answers


async def _apart(work: Callable[..., _T], *given: Any) -> _T:
    """Work that may wait for a database or compute for a while, in a thread."""
    return await anyio.to_thread.run_sync(work, *given)


def _sessions(request: Request) -> Sessions:
    state = request.app.state
    if not hasattr(state, "web_sessions"):
        office = office_of(request)
        state.web_sessions = Sessions(office.kms, office.settings.web.session_s)
    sessions: Sessions = state.web_sessions
    return sessions


def _cookie_name(office: Office) -> str:
    # The prefix makes browsers insist on Secure, this host and the whole path.
    return "__Host-filigrane" if office.settings.web.secure_cookie else "filigrane-session"


async def _visitor(request: Request) -> Visitor:
    office = office_of(request)
    cookie = request.cookies.get(_cookie_name(office))
    if cookie is None:
        raise _LoggedOut
    session = await _apart(_sessions(request).open, cookie)
    if session is None:
        raise _LoggedOut
    try:
        return Visitor(await office.gatekeeper.principal(session.token), session)
    except Problem as problem:
        if problem.status_code == 401:
            raise _LoggedOut from None
        raise


async def _for(
    request: Request, roles: frozenset[Role], show: Callable[[Visitor], Awaitable[Response]]
) -> Response:
    """A page for visitors with one of the roles; others are sent to log in, or refused."""
    visitor: Visitor | None = None
    try:
        visitor = await _visitor(request)
        check_roles(visitor.who, roles)
        return await show(visitor)
    except _LoggedOut:
        if _partial(request):
            return Response(status_code=200, headers={**HEADERS, "HX-Redirect": "/login"})
        return _moved("/login")
    except (FiligraneError, HTTPException) as error:
        return await _failed(request, error, visitor)
    except Exception as error:
        # People get a page, whatever happened; the log gets its line.
        telemetry.failure(request.scope, error)
        return await _failed(request, error, visitor)


def _check_csrf(form: Form, visitor: Visitor) -> None:
    if not same_secret(form.line("csrf"), visitor.session.csrf):
        raise Problem(403, "csrf", "This form is of another session; open the page again.")


def _partial(request: Request) -> bool:
    return request.headers.get("hx-request") == "true"


def _said(error: Exception) -> Said:
    problem = problems.as_problem(
        Problem(503, "busy", str(error)) if isinstance(error, Busy) else error
    )
    status = problem.status_code
    detail = str(problem.detail)
    return Said(
        status, _TITLES.get(status, HTTPStatus(status).phrase), detail[:1].upper() + detail[1:]
    )


async def _failed(request: Request, error: Exception, visitor: Visitor | None = None) -> Response:
    said = _said(error)
    values = {"problem": said}
    return await _shown(
        request, "error.html", values, said.status, part="_problem.html", visitor=visitor
    )


async def _shown(
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
            visitor = await _visitor(request)
        except (_LoggedOut, FiligraneError, HTTPException):
            visitor = None
    menu = [("/", "Check")]
    if visitor is not None:
        roles = visitor.who.roles
        menu += [(address, name) for address, name, wanted in PAGES if wanted & roles]
    common = {
        "menu": menu,
        "here": request.url.path,
        "who": None if visitor is None else visitor.who,
        "csrf": "" if visitor is None else visitor.session.csrf,
        "done": words.DONE.get(request.query_params.get("done", "")),
    }
    name = part if part is not None and _partial(request) else template
    return page(name, status, common | values)


def _moved(address: str) -> RedirectResponse:
    return RedirectResponse(address, status_code=303, headers=HEADERS)


def _download(receipt: str) -> Response:
    name = f"filigrane-receipt-{datetime.now(UTC):%Y%m%d-%H%M%S}.jws"
    return Response(
        receipt + "\n",
        headers={
            **HEADERS,
            "Content-Disposition": f"attachment; filename={quote(name)}",
        },
        media_type="application/jose",
    )
