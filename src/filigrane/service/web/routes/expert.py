"""The page of experts: verdict, numbers, passages and heat map of a text, and their receipt."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from filigrane.service.auth import office_of
from filigrane.service.detecting import CAUTIONS, Finding
from filigrane.service.office import Office
from filigrane.service.problems import Problem
from filigrane.service.routes import detect as api
from filigrane.service.web import words
from filigrane.service.web.answering import EXPERTS, Said, acted, apart, download, for_roles, shown
from filigrane.service.web.forms import Form, exactly
from filigrane.service.web.heat import cut
from filigrane.service.web.questions import query_of, readable
from filigrane.service.web.visits import Visitor
from filigrane.store.records import Principal

router = APIRouter(prefix="/expert")

ALPHAS: Final = (
    ("0.001", "1 in 1,000"),
    ("1e-06", "1 in a million"),
    ("1e-09", "1 in a billion"),
    ("1e-12", "1 in a trillion"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A span as the page lists it: characters start to stop - 1, and how it begins."""

    start: int
    stop: int
    begins: str
    n_scored: int
    log_pvalue: float


@router.get("")
async def show(request: Request) -> Response:
    """The form for experts."""
    return await for_roles(request, EXPERTS, lambda visitor: _page(request, visitor, Form({})))


@router.post("")
async def check(request: Request) -> Response:
    """Verdict, numbers, passages and heat map of a text."""
    office = office_of(request)

    async def act(visitor: Visitor, form: Form) -> Response:
        text = form.text()
        finding = await apart(_finding, office, visitor.who, form)
        api.count("expert", finding)
        values = await apart(_values, office, visitor, form)
        values |= await apart(_finding_values, text, finding)
        return await shown(request, "expert.html", values, part="_finding.html", visitor=visitor)

    async def again(visitor: Visitor, form: Form, said: Said) -> Response:
        return await _page(request, visitor, form, said)

    return await acted(request, EXPERTS, act, again)


@router.post("/receipt")
async def receipt(request: Request) -> Response:
    """A signed receipt with the numbers, as a file."""
    office = office_of(request)

    async def act(visitor: Visitor, form: Form) -> Response:
        def issue() -> str:
            who = visitor.who
            finding = _finding(office, who, form)
            signed: str = office.receipts.issue(who.tenant, finding, expert=True, actor=who.name)
            return signed

        return download(await apart(issue))

    return await acted(request, EXPERTS, act)


async def _page(
    request: Request, visitor: Visitor, form: Form, said: Said | None = None
) -> Response:
    values = await apart(_values, office_of(request), visitor, form)
    return await shown(
        request,
        "expert.html",
        values | {"problem": said},
        200 if said is None else said.status,
        part=None if said is None else "_problem.html",
        visitor=visitor,
    )


def _values(office: Office, visitor: Visitor, form: Form) -> dict[str, Any]:
    default = repr(office.settings.detector.alpha)
    alphas = [*ALPHAS]
    if default not in dict(ALPHAS):
        alphas.insert(0, (default, f"{default}, this service’s own"))
    return {
        "keys": readable(office, visitor.who),
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


def _finding(office: Office, who: Principal, form: Form) -> Finding:
    try:
        alpha = float(form.line("alpha") or office.settings.detector.alpha)
    except ValueError:
        raise Problem(422, "alpha", "Choose one of the levels of the list.") from None
    query = query_of(office, form, alpha=alpha, evidence=True)
    office.pace.spend(who)
    found: Finding = office.detector.detect(who.tenant, query)
    return found


def _finding_values(text: str, finding: Finding) -> dict[str, Any]:
    heat = finding.heat
    spans = [
        Passage(
            start=span.start_char,
            stop=span.stop_char,
            begins=_beginning(text, span.start_char),
            n_scored=span.n_scored,
            log_pvalue=span.log_pvalue,
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


def _beginning(text: str, start: int) -> str:
    piece = " ".join(text[start : start + 80].split())
    return piece[:40] + "…" if len(piece) > 40 else piece
