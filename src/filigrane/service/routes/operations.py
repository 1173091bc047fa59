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

Named = dict[str, tuple[int, frozenset[str]]]
"""Tenant -> revision of its keys, fingerprints of tokenizers that readable ones name."""
_READABLE: Final = "readable"
_CHECK_S: Final = 1.0
"""Whoever asks more often gets the last answer."""


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Component(BaseModel):
    """One thing that the service needs. problem: a class of errors, without its words.

    tokenizers: those of the settings; readable: every key that reads texts names one of them.
    """

    name: str
    ok: bool
    problem: str | None = None


class Readiness(BaseModel):
    """Whether everything that is needed answers."""

    ready: bool
    components: list[Component]


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process answers; says nothing of what it needs."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness}})
async def readyz(request: Request, response: Response) -> Readiness:
    """Whether database, key management, log, tokenizers and detection work: asked now, at most once
    a second.

    503 if one of them does not, with which. A key that names a tokenizer that this service has not
    ("readable") is shown, without a 503: its texts can be sent as token ids, and one tenant's key
    is no reason to serve nobody.
    """
    office = office_of(request)
    state = request.app.state
    now = time.monotonic()
    last: tuple[float, Readiness] | None = getattr(state, "readiness", None)
    if last is None or now - last[0] > _CHECK_S:
        if not hasattr(state, "named_tokenizers"):
            state.named_tokenizers = {}
        found = await anyio.to_thread.run_sync(check, office, state.named_tokenizers)
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


def check(office: Office, named: Named) -> Readiness:
    """Ask every component; takes as long as the slowest of them.

    named: what `_readable` knows from the last time.
    """
    asked: dict[str, Any] = {
        "database": office.database.check,
        "kms": office.kms.versions,
        "log": lambda: _log_writable(office),
        "tokenizers": office.tokenizers.load,
        _READABLE: lambda: _readable(office, named),
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
    ready = all(c.ok for c in components if c.name != _READABLE)
    return Readiness(ready=ready, components=components)


class _Undone(Exception):
    """Ends a transaction so that nothing of it stays."""


def _log_writable(office: Office) -> None:
    """Write a record and take it back. Raises FiligraneError if that cannot be done, or a log was
    found altered.
    """
    office.log.check()
    for tenant in office.database.tenants()[:1]:
        with contextlib.suppress(_Undone), office.database.tenant(tenant) as connection:
            office.log.append(tenant, "readyz", "log.try", {}, connection=connection)
            raise _Undone


def _readable(office: Office, named: Named) -> None:
    """Try every tokenizer that a readable key names. Raises ModelError if one is missing."""
    for tenant in office.database.tenants():
        revision = office.keybook.revision(tenant)
        if named.get(tenant, (None,))[0] != revision:
            named[tenant] = (
                revision,
                frozenset(
                    key.spec.tokenizer_sha256
                    for key in office.keybook.keys(tenant)
                    if key.spec.tokenizer_sha256 is not None
                    and any(version.state.reads for version in key.versions)
                ),
            )
    for sha256 in frozenset[str]().union(*(wanted for _, wanted in named.values())):
        office.tokenizers.encode("known", sha256)


def _known_answer() -> None:
    """A text of the public test key is found, and with which p. Raises NotReady."""
    from filigrane.schemes import from_tag
    from filigrane.serving.readiness import known_answers

    known_answers([from_tag("gumbel")])
