"""The page for everybody, its answer in three classes, and the files that all pages stand on."""

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from filigrane.errors import NotFound
from filigrane.service.auth import office_of
from filigrane.service.detecting import Finding
from filigrane.service.office import Office
from filigrane.service.problems import Problem
from filigrane.service.public import PublicAnswer
from filigrane.service.routes import detect as api
from filigrane.service.web.answering import REFUSALS, apart, download, failed, said_of, shown
from filigrane.service.web.forms import exactly, read_form
from filigrane.service.web.rendering import static_file

router = APIRouter()


@router.get("/")
async def show(request: Request) -> Response:
    """The page for everybody."""
    return await shown(request, "public.html", _values(office_of(request)))


@router.post("/")
async def check(request: Request) -> Response:
    """One of three classes for a text."""
    office = office_of(request)
    values = _values(office)
    try:
        form = await read_form(request)
        values["text"] = form.fields.get("text", "")
        text = form.some_text()
        answer = await apart(_answer, office, text, _address(request))
        api.count("public", answer.finding, answer.verdict)
        values |= {"answer": answer, "exact": exactly(text), "alpha": _log_alpha(answer.finding)}
        return await shown(request, "public.html", values, part="_public.html")
    except REFUSALS as error:
        said = said_of(error)
        return await shown(
            request, "public.html", values | {"problem": said}, said.status, part="_problem.html"
        )


@router.post("/receipt")
async def receipt(request: Request) -> Response:
    """A signed receipt of the public answer, as a file."""
    office = office_of(request)
    try:
        form = await read_form(request)

        def issue() -> str:
            answer = _answer(office, form.some_text(), _address(request), receipt=True)
            settings = office.settings.public
            assert settings is not None
            signed: str = office.receipts.issue(
                settings.tenant, answer.as_told, expert=False, actor="public"
            )
            return signed

        return download(await apart(issue))
    except REFUSALS as error:
        return await failed(request, error)


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """A file of the page itself."""
    found = static_file(name)
    if found is None:
        raise NotFound("There is no such file.")
    return found


def _values(office: Office) -> dict[str, Any]:
    settings = office.settings.public
    return {
        "open": settings is not None,
        "min_tokens": 0 if settings is None else settings.min_tokens,
        "text": "",
        "answer": None,
        "problem": None,
    }


def _answer(
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
    except NotFound:
        raise Problem(503, "no_keys", "This service has no keys yet that it could try.") from None


def _log_alpha(finding: Finding) -> float:
    return float(np.log(finding.alpha))


def _address(request: Request) -> str | None:
    return None if request.client is None else request.client.host
