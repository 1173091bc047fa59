"""Whether the service lives, whether it can work, and what it counted."""

import contextlib
import time
from typing import Any, Final, Literal

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from filigrane.errors import FiligraneError
from filigrane.service import telemetry
from filigrane.service.auth import office_of
from filigrane.service.office import Office
from filigrane.service.problems import Problem

router = APIRouter(tags=["operations"])

_CHECK_S: Final = 1.0
"""Whoever asks more often gets the last answer."""


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Component(BaseModel):
    """One thing that the service needs. problem: a class of errors, without its words."""

    name: str
    ok: bool
    problem: str | None = None


class Readiness(BaseModel):
    """Whether everything that is needed answers. marks: known answers come out right."""

    ready: bool
    components: list[Component]


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process answers; says nothing of what it needs."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness}})
async def readyz(request: Request, response: Response) -> Readiness:
    """Whether database, key management, log and detection work: asked now, at most once a second.

    503 if one of them does not, with which.
    """
    office = office_of(request)
    state = request.app.state
    now = time.monotonic()
    last: tuple[float, Readiness] | None = getattr(state, "readiness", None)
    if last is None or now - last[0] > _CHECK_S:
        found = await anyio.to_thread.run_sync(check, office)
        last = state.readiness = (now, found)
    if not last[1].ready:
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    return last[1]


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "In Prometheus's text format."}},
)
async def metrics(request: Request) -> Response:
    """Counters and times, in Prometheus's format; no tenant, name or text is among the labels."""
    if not office_of(request).settings.telemetry.metrics:
        raise Problem(404, "not_found", "Metrics are switched off; [telemetry] metrics = true.")
    text, kind = telemetry.metrics_text()
    return Response(text, media_type=kind)


def check(office: Office) -> Readiness:
    """Ask every component; takes as long as the slowest of them."""
    asked: dict[str, Any] = {
        "database": office.database.check,
        "kms": office.kms.versions,
        "log": lambda: _log_writable(office),
        "detection": _known_answer,
    }
    components = []
    for name, ask in asked.items():
        try:
            ask()
            component = Component(name=name, ok=True)
        except FiligraneError as error:
            component = Component(name=name, ok=False, problem=type(error).__name__)
        telemetry.COMPONENT_UP.labels(name).set(component.ok)
        components.append(component)
    return Readiness(ready=all(c.ok for c in components), components=components)


class _Undone(Exception):
    """Ends a transaction so that nothing of it stays."""


def _log_writable(office: Office) -> None:
    """Write a record and take it back. Raises FiligraneError if that cannot be done."""
    for tenant in office.database.tenants()[:1]:
        with contextlib.suppress(_Undone), office.database.tenant(tenant) as connection:
            office.log.append(tenant, "readyz", "log.try", {}, connection=connection)
            raise _Undone


def _known_answer() -> None:
    """A text of the public test key is found, and with which p. Raises NotReady."""
    from filigrane.schemes import from_tag
    from filigrane.serving.readiness import known_answers

    known_answers([from_tag("gumbel")])
