"""Testing texts. Who may see numbers sees them; everybody else gets one of three classes.

Nothing of a request is stored. A test that takes less time than a change of threads runs in the
event loop, where the keys are in memory anyway; all others run in threads.
"""

import functools
from typing import Annotated, Any, Final

import anyio.to_thread
import pydantic_core
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response
from starlette.routing import Route

from filigrane.errors import FiligraneError, KmsError, StoreError
from filigrane.service import problems, telemetry
from filigrane.service.answers import (
    DetectBody,
    ExpertAnswer,
    PublicAnswerBody,
    expert_answer,
    public_answer,
    query_of,
)
from filigrane.service.auth import office_of, optional, require
from filigrane.service.detecting import Finding, Query
from filigrane.service.office import Office
from filigrane.service.problems import Problem, no_token
from filigrane.service.public import PublicAnswer
from filigrane.store.records import Principal, Role

router = APIRouter(prefix="/v1", tags=["detection"])

MOST_ITEMS: Final = 10_000
_ANYONE: Final = optional(Role.DETECTOR_PUBLIC, Role.DETECTOR_EXPERT)
Expert = Annotated[Principal, Depends(require(Role.DETECTOR_EXPERT))]


class BatchBody(BaseModel):
    """Texts that are tested one by one, each at its own alpha."""

    model_config = ConfigDict(extra="forbid", strict=True)

    items: Annotated[list[DetectBody], Field(min_length=1, max_length=MOST_ITEMS)]


class BatchError(BaseModel):
    """Why an item was not tested, with the code and words of a problem."""

    tier: None = None
    code: str
    detail: str


class BatchAnswer(BaseModel):
    """Results in the order of the items. Each is corrected for its own keys only: among n texts
    without a mark, n alpha are detected on average.
    """

    results: list[ExpertAnswer | BatchError]


@router.post(
    "/detect",
    responses={200: {"model": ExpertAnswer | PublicAnswerBody, "description": "The answer."}},
    response_class=Response,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/DetectBody"}}
            },
        },
        "security": [{_ANYONE.scheme_name: []}, {}],
    },
)
async def detect(request: Request) -> Response:
    """Test one text for the marks of the tenant's keys.

    With the role detector-expert: everything that the test says. With detector-public, or without
    a token where the service has a public tier: one of three classes.
    """
    # Read here and not by FastAPI: half of the time of a short test would go into that.
    who = await _ANYONE(request)
    office = office_of(request)
    if who is not None and Role.DETECTOR_EXPERT in who.roles:
        # Before the body is parsed: that takes as long as the test.
        office.pace.spend(who)
        body = await _read(request)
        check_length(office, body)
        query = query_of(body, body.alpha or office.settings.detector.alpha)
        detector = office.detector
        if not body.issue_receipt and detector.is_quick(who.tenant, query):
            finding = detector.detect(who.tenant, query)
            receipt = None
        else:
            finding, receipt = await anyio.to_thread.run_sync(
                _expert, office, who, query, body.issue_receipt
            )
        count("expert", finding)
        return _json(expert_answer(finding, receipt))
    return await _for_public(office, await _read(request), who, request)


_NAMES: Final = problems.PLACES | frozenset(DetectBody.model_fields)

QUICK: Final = Route("/v1/detect", detect, methods=["POST"])
"""`detect` as a route of Starlette, for `app.application` to put before all others."""


async def _read(request: Request) -> DetectBody:
    try:
        return DetectBody.model_validate_json(await request.body())
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        raise problems.validation_problem(
            [{**item, "loc": ("body", *item["loc"])} for item in found], _NAMES
        ) from None


@router.post(
    "/detect/batch",
    responses={200: {"model": BatchAnswer, "description": "The answers."}},
    response_class=Response,
)
def batch(body: BatchBody, who: Expert, request: Request) -> Response:
    """Test some texts at once; for many, make a job of them."""
    office = office_of(request)
    most = office.settings.limits.batch_items
    if len(body.items) > most:
        raise Problem(422, "items", f"A batch has at most {most} items; make a job of more.")
    office.pace.spend(who, len(body.items))
    results: list[dict[str, Any]] = []
    for item in body.items:
        try:
            check_length(office, item)
            query = query_of(item, item.alpha or office.settings.detector.alpha)
            finding, receipt = _expert(office, who, query, item.issue_receipt)
            count("expert", finding)
            results.append(expert_answer(finding, receipt))
        except (KmsError, StoreError):
            # Nothing was tested for want of keys: that is no result of an item.
            raise
        except (FiligraneError, Problem) as error:
            problem = problems.as_problem(error)
            results.append({"tier": None, "code": problem.code, "detail": problem.detail})
    return _json({"results": results})


async def _for_public(
    office: Office, body: DetectBody, who: Principal | None, request: Request
) -> Response:
    settings = office.settings.public
    if who is None and settings is None:
        raise no_token()
    if body.text is None or body.model_fields_set - {"text", "issue_receipt"}:
        raise Problem(
            422,
            "public_tier",
            "The public tier takes text, and issue_receipt; ids, hints, alpha and evidence need "
            "the role detector-expert.",
        )
    if who is not None:
        tenant = who.tenant
    else:
        assert settings is not None
        tenant = settings.tenant
    answer, receipt = await anyio.to_thread.run_sync(
        _public,
        office,
        tenant,
        body.text,
        None if who is None else who.name,
        None if request.client is None else request.client.host,
        body.issue_receipt,
    )
    count("public", answer.finding, answer.verdict)
    return _json(public_answer(answer, receipt))


def _expert(
    office: Office, who: Principal, query: Query, wanted: bool
) -> tuple[Finding, str | None]:
    finding: Finding = office.detector.detect(who.tenant, query)
    receipt = None
    if wanted:
        receipt = office.receipts.issue(who.tenant, finding, expert=True, actor=who.name)
    return finding, receipt


def _public(
    office: Office, tenant: str, text: str, name: str | None, address: str | None, wanted: bool
) -> tuple[PublicAnswer, str | None]:
    answer: PublicAnswer = office.public.answer(
        tenant, text, identity=name, address=address, receipt=wanted
    )
    receipt = None
    if wanted:
        receipt = office.receipts.issue(
            tenant, answer.as_told, expert=False, actor=name or "public"
        )
    return answer, receipt


def check_length(office: Office, body: DetectBody) -> None:
    """Raise 422 for a text longer than `limits.text_tokens`, or four times as many characters."""
    most = office.settings.limits.text_tokens
    if len(body.tokens or ()) > most or len(body.text or "") > 4 * most:
        raise Problem(
            422,
            "too_long",
            f"A text has at most {most} tokens, or four times the letters; send parts of it.",
        )


def count(tier: str, finding: Finding, verdict: str | None = None) -> None:
    """Count a test in the metrics."""
    _counter(tier, verdict or finding.verdict).inc()
    telemetry.KEYS_READ.observe(finding.n_keys)


@functools.cache
def _counter(tier: str, verdict: str) -> Any:
    return telemetry.DETECTIONS.labels(tier, verdict)


def _json(value: dict[str, Any]) -> Response:
    return Response(pydantic_core.to_json(value), media_type="application/json")
