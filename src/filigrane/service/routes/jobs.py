"""Jobs: many texts tested in the background, their results kept until they are fetched or expire.

Texts lie encrypted until they are tested and are erased then; results hold none.
"""

import hashlib
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel

from filigrane.service.answers import ExpertAnswer
from filigrane.service.auth import office_of, require
from filigrane.service.jobs import Item, Options, read_items, results_of
from filigrane.service.office import Office
from filigrane.service.routes.paging import After, IdempotencyKey, Limit, page
from filigrane.store.records import JobRecord, JobState, Principal, Role

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

Expert = Annotated[Principal, Depends(require(Role.DETECTOR_EXPERT))]
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")]
_LINES: Final = ("application/x-ndjson", "application/jsonl")


class JobBody(BaseModel):
    """How far a job is. n_failed of n_done items could not be tested.

    state: waiting (no item is done yet), running (n_done are), done (all are), or cancelled. Ask
    again while it is waiting or running; done and cancelled are for good.
    """

    id: str
    state: Literal["waiting", "running", "done", "cancelled"]
    who: str
    n_items: int
    n_done: int
    n_failed: int
    created_at: datetime
    expires_at: datetime
    finished_at: datetime | None


class JobPage(BaseModel):
    """Jobs, oldest first."""

    jobs: list[JobBody]
    next: str | None


class JobResult(BaseModel):
    """One item's result: an answer or a problem, never both.

    state: waiting (not tested yet), done (answer), failed (problem says why it could not be
    tested), or cancelled (never tested).
    """

    index: int
    state: Literal["waiting", "done", "failed", "cancelled"]
    id: str | None = None
    answer: ExpertAnswer | None = None
    problem: str | None = None
    detail: str | None = None


class ResultPage(BaseModel):
    """Results in the order of the items. next: `start` of the following page; null at the end."""

    results: list[JobResult]
    next: int | None


async def _body(request: Request) -> bytes:
    return await request.body()


@router.post(
    "",
    status_code=202,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"type": "array", "minItems": 1, "items": Item.model_json_schema()}
                },
                "application/x-ndjson": {"schema": {"type": "string"}},
            },
        }
    },
)
def create(
    raw: Annotated[bytes, Depends(_body)],
    who: Expert,
    request: Request,
    model: Annotated[str | None, Query(max_length=128)] = None,
    key: Annotated[str | None, Query(max_length=64)] = None,
    tokenizer: Annotated[str | None, Query(max_length=128)] = None,
    alpha: Annotated[float | None, Query(gt=0, le=0.1, allow_inf_nan=False)] = None,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Put texts aside to be tested: a JSON list of items, or one item a line (x-ndjson)."""
    office = office_of(request)
    limits = office.settings.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    items = read_items(raw, lines=kind in _LINES, most=limits.job_items, longest=limits.text_tokens)
    options = Options(
        model=model,
        key=key,
        tokenizer=tokenizer,
        alpha=office.settings.detector.alpha if alpha is None else alpha,
    )
    contents = [item.model_dump_json(exclude_none=True).encode() for item in items]
    asked = None
    if idempotency_key is not None:
        asked = (idempotency_key, _digest(office, who, contents, options))
    made = office.jobs.create(
        who.tenant,
        who.name,
        contents,
        options.model_dump_json(exclude_none=True),
        lifetime=timedelta(days=limits.job_days),
        request=asked,
    )
    request.app.state.worker.wake()
    return _job(made)


@router.get("")
def jobs(who: Expert, request: Request, after: After = None, limit: Limit = None) -> JobPage:
    """The tenant's jobs that have not expired."""
    found = office_of(request).jobs.jobs(who.tenant)
    shown, following = page(request, found, lambda job: job.id, after, limit)
    return JobPage(jobs=[_job(job) for job in shown], next=following)


@router.get("/{job_id}")
def progress(job_id: JobId, who: Expert, request: Request) -> JobBody:
    """How far a job is."""
    return _job(office_of(request).jobs.progress(who.tenant, job_id))


@router.get("/{job_id}/results")
def results(
    job_id: JobId,
    who: Expert,
    request: Request,
    start: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
    limit: Limit = None,
) -> ResultPage:
    """Results from item `start` on, also while the job goes on."""
    office = office_of(request)
    most = min(limit or 1000, office.settings.limits.page)
    ended = office.jobs.progress(who.tenant, job_id).state is JobState.CANCELLED
    found = office.jobs.results(who.tenant, job_id, start, start + most + 1)
    shown = [JobResult(**one) for one in results_of(found[:most], start, ended=ended)]
    return ResultPage(results=shown, next=start + most if len(found) > most else None)


@router.post("/{job_id}/cancel")
def cancel(job_id: JobId, who: Expert, request: Request) -> JobBody:
    """Stop a job and erase the texts that are left; results so far stay."""
    return _job(office_of(request).jobs.cancel(who.tenant, job_id))


@router.delete("/{job_id}", status_code=204)
def forget(job_id: JobId, who: Expert, request: Request) -> None:
    """Erase a job with its texts and results."""
    office_of(request).jobs.forget(who.tenant, job_id)


def _digest(office: Office, who: Principal, contents: list[bytes], options: Options) -> str:
    """What tells one request from another; keyed, so that the database does not let anybody test a
    guess of the texts.
    """
    asked = hashlib.sha256(options.model_dump_json().encode())
    for content in contents:
        asked.update(hashlib.sha256(content).digest())
    return office.keybook.tenant_secret(who.tenant).content_hash(asked.digest())


def _job(record: JobRecord) -> JobBody:
    values: dict[str, Any] = {name: getattr(record, name) for name in JobBody.model_fields}
    return JobBody(**values | {"state": str(record.state)})
