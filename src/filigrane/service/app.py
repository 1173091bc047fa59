"""The ASGI application: routes, problems, and what every request passes before it is parsed.

`Gate` is plain ASGI around everything: it checks the content type, reads the body up to its limit
within its time, counts requests in flight, bounds the time until an answer begins, and writes the
headers that every answer has. What it refuses never reaches a parser. Large bodies are read from
those who may send them, and bodies together never take more memory than was set aside for them.
"""

import asyncio
import contextlib
import importlib
import ipaddress
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from filigrane import __version__
from filigrane.service import problems, telemetry
from filigrane.service.auth import Require, require
from filigrane.service.office import Office
from filigrane.service.problems import Problem
from filigrane.service.settings import Limits

__all__ = ["Gate", "application"]

ROUTES: Final = (
    "detect",
    "trace",
    "receipts",
    "keys",
    "access",
    "engine",
    "log",
    "jobs",
    "wellknown",
    "operations",
)
"""Modules of `filigrane.service.routes`, in the order of the documentation."""

JOBS: Final = "/v1/jobs"
_SLOW: Final = frozenset({"/v1/trace", "/trace"})
"""Addresses whose answers may take `limits.trace_seconds`."""
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_CLOSE: Final = {"Connection": "close"}
_HSTS: Final = (b"strict-transport-security", b"max-age=31536000")
_JSON: Final = frozenset({b"application/json"})
_LINES: Final = frozenset({b"application/json", b"application/x-ndjson", b"application/jsonl"})
_FORMS: Final = frozenset({b"application/x-www-form-urlencoded", b"multipart/form-data"})
_UNPARSED: Final = frozenset({"GET", "HEAD", "OPTIONS", "DELETE", "TRACE"})


def application(office: Office, *, owns_office: bool = False) -> FastAPI:
    """The service of an office, ready to be served.

    owns_office: whether the office is closed when the application is.
    """
    from filigrane.service.jobs import Worker
    from filigrane.service.routes.detect import QUICK
    from filigrane.store.records import Role

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        worker = app.state.worker = Worker(office)
        worker.start()
        try:
            yield
        finally:
            worker.stop()
            if owns_office:
                office.close()

    app = FastAPI(
        title="filigrane",
        version=__version__,
        summary="Keys, detection, tracing and receipts of keyed text watermarks.",
        lifespan=life,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # What it would tell of a request is more than `telemetry` lets out: addresses, and the
        # words of errors. The environment can switch it on.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
        responses={
            status: {"model": problems.ProblemBody, "description": words}
            for status, words in _REFUSALS.items()
        },
    )
    app.state.office = office
    telemetry.configure(office.settings.telemetry)
    for router in _routers(office):
        app.include_router(router)
    # The same function as the documented route, found first and without FastAPI's way to it, which
    # takes as long as a short test.
    app.router.routes.insert(0, QUICK)
    web = office.settings.web.enabled
    _handle_errors(app, web=web)
    _describe(app)
    app.add_middleware(
        Gate,
        say=_say_to_people if web else _say,
        limits=office.settings.limits,
        tls=office.settings.listen.tls_key is not None,
        first={JOBS: require(Role.DETECTOR_EXPERT)},
    )
    return app


_REFUSALS: Final = {
    400: "The body cannot be read.",
    401: "No token, or one that is unknown, expired, revoked or of somebody else.",
    403: "The token lacks a role.",
    404: "There is no such thing, or it is another tenant's.",
    409: "Not possible in the present state, or with this idempotency key.",
    413: "The body is too large.",
    415: "The content type is not one that this address takes.",
    422: "The request does not have the form that is asked for.",
    429: "Too many requests.",
    503: "Something that is needed does not answer; nothing was changed.",
}


def _routers(office: Office) -> Iterable[APIRouter]:
    for name in ROUTES:
        yield importlib.import_module(f"filigrane.service.routes.{name}").router
    if office.settings.web.enabled:
        yield importlib.import_module("filigrane.service.web.routes").router


def _say(scope: Scope, problem: Problem) -> Response:
    return problems.response(problem)


def _say_to_people(scope: Scope, problem: Problem) -> Response:
    """Before or around the application: a page for browsers, a problem for programs."""
    from filigrane.service.web import refusals

    if refusals.for_people(scope):
        return refusals.bare_page(scope, problem)
    return problems.response(problem)


def _handle_errors(app: FastAPI, *, web: bool) -> None:
    names: dict[str, frozenset[str]] = {}

    async def refused(request: Request, error: Exception) -> Response:
        problem = problems.as_problem(error)
        if problem.status_code >= 500:
            telemetry.failure(request.scope, error)
        if web:
            from filigrane.service.web import refusals

            if refusals.for_people(request.scope):
                return await refusals.full_page(request, error)
        return problems.response(problem)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        schema = app.openapi()
        if not names:
            names[""] = _field_names(schema, schema)
        # What this operation takes, of all that the API knows.
        place = f"{request.method} {getattr(request.scope.get('route'), 'path', '')}"
        if place not in names:
            method, _, path = place.partition(" ")
            operation = schema["paths"].get(path, {}).get(method.lower(), {})
            taken = {name: operation.get(name) for name in ("parameters", "requestBody")}
            names[place] = _field_names(schema, taken)
        return problems.response(
            problems.validation_problem(error.errors(), names[""], offered=names[place])
        )

    from filigrane.errors import FiligraneError

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(FiligraneError, refused)


def _field_names(schema: dict[str, Any], part: object) -> frozenset[str]:
    """Every name of a field or parameter in a part of the API's schema: of all of it, the only ones
    that an error may repeat.
    """
    found = set(problems.PLACES)
    waiting: list[Any] = [part]
    followed: set[str] = set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            reference = item.get("$ref")
            if isinstance(reference, str) and reference not in followed:
                followed.add(reference)
                waiting.append(schema["components"]["schemas"][reference.rpartition("/")[2]])
            properties = item.get("properties")
            if isinstance(properties, dict):
                found |= set(properties)
            if isinstance(item.get("in"), str) and isinstance(item.get("name"), str):
                found.add(item["name"])
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return frozenset(found)


def _describe(app: FastAPI) -> None:
    """Replace FastAPI's own error schema, which shows what was sent, by problems."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                routes=app.routes,
            )
            for operations in made["paths"].values():
                for operation in operations.values():
                    for status, answer in operation.get("responses", {}).items():
                        content = answer.get("content", {})
                        if status[0] in "45" and "application/json" in content:
                            content[problems.MEDIA_TYPE] = content.pop("application/json")
            for name in ("HTTPValidationError", "ValidationError"):
                made.get("components", {}).get("schemas", {}).pop(name, None)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = schema


class _Stopped(Exception):
    """The client went away while it was sending."""


class _Answer:
    """One request's answer on its way: adds headers, and gives up on what takes too long.

    A thread cannot be cancelled, so a request that hangs in one is answered from here while the
    thread ends in its own time; what it says then is dropped.
    """

    __slots__ = (
        *("_headers", "_late", "_receive", "_say", "_scope", "_send", "_task", "_timer"),
        "status",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: tuple[tuple[bytes, bytes], ...],
        seconds: float,
        say: Callable[[Scope, Problem], Response],
    ) -> None:
        self.status = 0
        self._say = say
        self._scope, self._receive, self._send = scope, receive, send
        self._headers = headers
        self._late: asyncio.Task[None] | None = None
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._give_up)

    async def __call__(self, message: Message) -> None:
        """Send on a message of the application."""
        if self._late is not None:
            return
        # A long answer may take its time once it has begun.
        self._timer.cancel()
        await self._pass(message)

    async def refuse(self, problem: Problem) -> None:
        """Answer with a problem, unless an answer has begun."""
        if not self.status:
            await self._say(self._scope, problem)(self._scope, self._receive, self)

    async def close(self) -> None:
        """Let the last word be sent."""
        self._timer.cancel()
        if self._late is not None:
            await self._late

    @property
    def is_late(self) -> bool:
        """Whether it was given up."""
        return self._late is not None

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message["headers"] = list(message.get("headers", ()))
            present = {name.lower() for name, _ in headers}
            headers += [header for header in self._headers if header[0] not in present]
        await self._send(message)

    def _give_up(self) -> None:
        problem = Problem(503, "late", "This took too long and was given up.")
        answer = self._say(self._scope, problem)(self._scope, self._receive, self._pass)
        self._late = asyncio.get_running_loop().create_task(answer)
        if self._task is not None:
            self._task.cancel()


@dataclass(slots=True)
class _Sender:
    """One address: how many requests it has not sent to their end, and bytes of bodies it holds."""

    sending: int = 0
    held: int = 0


@dataclass(slots=True)
class _Held:
    """How many bytes one request holds."""

    size: int = 0


class Gate:
    """What every request passes, as pure ASGI: no task and no thread of its own.

    first: path -> who may send a body there, asked before it is read; say: what a refusal of the
    gate's own looks like.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        tls: bool,
        first: Mapping[str, Require],
        say: Callable[[Scope, Problem], Response] = _say,
    ) -> None:
        self._app = app
        self._say = say
        self._limits = limits
        self._headers = (*_HEADERS, _HSTS) if tls else _HEADERS
        self._first = first
        self._running = 0
        self._held = 0
        self._senders: defaultdict[str, _Sender] = defaultdict(_Sender)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        started = time.perf_counter()
        limits = self._limits
        seconds = limits.trace_seconds if scope["path"] in _SLOW else limits.seconds
        answer = _Answer(scope, receive, send, self._headers, seconds, self._say)
        sender, held = _address_of(scope), _Held()
        try:
            with telemetry.request_span(scope):
                body = await self._body(scope, receive, sender, held)
                # Only now: who sends slowly takes nobody's place.
                with self._place():
                    await self._app(scope, _replay(body, receive), answer)
        except Problem as problem:
            await answer.refuse(problem)
        except _Stopped:
            answer.status = 499
        except asyncio.CancelledError:
            if not answer.is_late:
                raise
        except Exception as error:
            telemetry.failure(scope, error)
            await answer.refuse(problems.as_problem(error))
        finally:
            self._let_go(sender, held)
            await answer.close()
            telemetry.finished(scope, answer.status, time.perf_counter() - started)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self._running >= self._limits.concurrent:
            raise Problem(503, "busy", "Too many requests at once; try again in a moment.")
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def _body(self, scope: Scope, receive: Receive, sender: str, held: _Held) -> bytes:
        """The body of a request, for which room is held then; or a refusal."""
        headers = dict(scope["headers"])
        method, path = scope["method"], scope["path"]
        length = headers.get(b"content-length")
        # In HTTP/2 a body may come without either header.
        may_be_silent = scope.get("http_version", "1.1").startswith("2")
        announced = length is not None or b"transfer-encoding" in headers
        if not announced and (method in _UNPARSED or not may_be_silent):
            return b""
        job = path == JOBS and method == "POST"
        most = self._limits.job_bytes if job else self._limits.body_bytes
        too_large = Problem(
            413,
            "too_large",
            f"A body has at most {most} bytes here; send less at a time, or make a job of it.",
            headers=_CLOSE,
        )
        if length is not None and (not length.isdigit() or int(length) > most):
            raise too_large
        _check_content_type(scope, headers.get(b"content-type"), empty=length == b"0", job=job)
        with self._sending(sender):
            known = path in self._first
            if known:
                await self._first[path](Request(scope))
            # One growing array: many small parts would take many times their size.
            body = bytearray()
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    while True:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise _Stopped
                        part = message.get("body", b"")
                        if len(body) + len(part) > most:
                            raise too_large
                        self._hold(sender, held, len(part), known)
                        body += part
                        if not message.get("more_body", False):
                            return bytes(body)
            except TimeoutError:
                raise Problem(
                    408, "slow", "The body did not arrive in time.", headers=_CLOSE
                ) from None

    @contextlib.contextmanager
    def _sending(self, sender: str) -> Iterator[None]:
        """Count a request whose body is on its way, unless its sender has too many of them."""
        if self._senders[sender].sending >= self._limits.unfinished:
            raise _too_much_of_yours()
        self._senders[sender].sending += 1
        try:
            yield
        finally:
            self._senders[sender].sending -= 1

    def _hold(self, sender: str, held: _Held, size: int, known: bool) -> None:
        """Make room for a part of a body: for one address a quarter of all, unless it is known who
        sends.
        """
        most = self._limits.buffered_bytes
        if not known and self._senders[sender].held + size > most // 4:
            raise _too_much_of_yours()
        if self._held + size > most:
            raise Problem(
                503, "busy", "Too many large requests at once; try again soon.", headers=_CLOSE
            )
        held.size += size
        self._held += size
        self._senders[sender].held += size

    def _let_go(self, sender: str, held: _Held) -> None:
        self._held -= held.size
        its = self._senders[sender]
        its.held -= held.size
        if not its.held and not its.sending:
            del self._senders[sender]


def _address_of(scope: Scope) -> str:
    """Whom a request counts for: an address, of IPv6 the /64 that a host has to itself."""
    host = str((scope.get("client") or ("",))[0])
    try:
        where = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    if where.ipv4_mapped is not None:
        return str(where.ipv4_mapped)
    return str(ipaddress.IPv6Network((where, 64), strict=False))


def _too_much_of_yours() -> Problem:
    return Problem(
        429,
        "unfinished",
        "Too many requests of your address are not complete; finish them, then send more.",
        headers={**_CLOSE, "Retry-After": "5"},
    )


def _check_content_type(scope: Scope, sent: bytes | None, *, empty: bool, job: bool) -> None:
    if scope["method"] in _UNPARSED or (empty and sent is None):
        return
    kind = (sent or b"").partition(b";")[0].strip().lower()
    taken = _LINES if job else _JSON
    if not scope["path"].startswith("/v1/"):
        taken |= _FORMS
    if kind not in taken:
        names = " or ".join(sorted(name.decode() for name in taken))
        raise Problem(415, "content_type", f"Send {names} as the Content-Type.")


def _replay(body: bytes, receive: Receive) -> Receive:
    done = False

    async def again() -> Message:
        nonlocal done
        if done:
            return await receive()
        done = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
