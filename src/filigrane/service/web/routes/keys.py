"""The page of those who look after keys: what there is, and each change that a role may make."""

import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from filigrane.custody.hierarchy import KeySpec
from filigrane.errors import NotFound
from filigrane.service.auth import office_of
from filigrane.service.office import Office
from filigrane.service.problems import Problem
from filigrane.service.web import words
from filigrane.service.web.answering import KEEPERS, Said, acted, apart, for_roles, moved, shown
from filigrane.service.web.approvals import agree, usable
from filigrane.service.web.forms import Form
from filigrane.service.web.visits import Visitor
from filigrane.store.records import Principal, Role, VersionRecord

router = APIRouter(prefix="/keys")

MARKS: Final = (
    ("gumbel", "Gumbel race: strongest"),
    ("tournament", "Tournament: strong"),
    ("delta", "Delta: medium"),
    ("gamma", "Gamma: mild"),
    ("greenlist", "Green list: every mode"),
)


@router.get("")
async def show(request: Request) -> Response:
    """All keys and their versions."""
    return await for_roles(request, KEEPERS, lambda visitor: _page(request, visitor, Form({})))


@router.post("/{what}")
async def change(what: str, request: Request) -> Response:
    """Change something about a key, and show the keys again."""
    if what not in _CHANGES:
        raise NotFound("There is no such address.")
    roles, make = _CHANGES[what]
    office = office_of(request)

    async def act(visitor: Visitor, form: Form) -> Response:
        return moved(f"/keys?done={await apart(make, office, visitor.who, form)}")

    async def again(visitor: Visitor, form: Form, said: Said) -> Response:
        return await _page(request, visitor, form, said)

    return await acted(request, roles, act, again)


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
        slots=form.whole("slots", 1, 64),
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
    form.require_sure()
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
    return agree(office, who, form, "destroy")


def _destroy(office: Office, who: Principal, form: Form) -> str:
    form.require_sure()
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


async def _page(
    request: Request, visitor: Visitor, form: Form, said: Said | None = None
) -> Response:
    office, who = office_of(request), visitor.who
    now = datetime.now(UTC)

    def values() -> dict[str, Any]:
        destroying = {
            one.subject: one
            for one in office.access.approvals(who.tenant)
            if one.kind == "destroy" and usable(one, now)
        }
        return {
            "keys": office.keybook.keys(who.tenant),
            "tokenizers": office.tokenizers.names(),
            "only_tokenizer": office.tokenizers.only,
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
    return await shown(request, "keys.html", await apart(values), status, visitor=visitor)


def _version(office: Office, who: Principal, form: Form) -> VersionRecord:
    return office.keybook.version(who.tenant, form.line("version"))
