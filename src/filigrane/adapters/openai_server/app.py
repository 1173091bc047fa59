"""The routes: who asks, what is answered, and in which form.

    POST /v1/completions, /v1/chat/completions    as OpenAI's, and `filigrane` beside the rest
    GET  /v1/models, /health, /metrics

A request is read (`bodies`), identified and admitted (`adapters.admission`), tokenized, handed to
the thread of the model (`adapters.model_thread`), and answered when its texts are done, or while
they grow. Logs hold ids, counts and reasons: no prompt, no answer, no token, no key.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import numpy as np

from filigrane.adapters.admission import Admitted, NotIdentified, admit, identify
from filigrane.adapters.model_thread import Job, ModelThread, Overloaded
from filigrane.adapters.models import LoadedModel
from filigrane.adapters.openai_server.bodies import Api, BadRequest, Wanted, parse
from filigrane.adapters.openai_server.decoding import Decoder
from filigrane.adapters.transformers import TransformersModel
from filigrane.adapters.writing import Order, Text
from filigrane.contexts import TokenIds
from filigrane.errors import (
    FiligraneError,
    MissingDependency,
    RequestRefused,
    UnsupportedDecoding,
)
from filigrane.serving.live import Keys, current
from filigrane.serving.orders import Mark
from filigrane.serving.readiness import known_answers

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise MissingDependency(
        "the server needs more packages: pip install 'filigrane[server]'"
    ) from error

_log: Final = logging.getLogger("filigrane.server")
_COMPLETION_TOKENS: Final = 16
"""What OpenAI's completions write if they are not told how much."""
_OBJECTS: Final = {"completions": "text_completion", "chat": "chat.completion"}
_PREFIXES: Final = {"completions": "cmpl", "chat": "chatcmpl"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server takes.

    context: most tokens of prompt and answer together, None for the model's own; answer: most of an
    answer, and what a chat gets that does not say; rows: most texts written at a time, and asked
    for in one request; waiting: most texts that wait; body: bytes.
    """

    context: int | None = None
    answer: int = 4096
    rows: int = 16
    waiting: int = 256
    body: int = 2**20


def application(
    model: LoadedModel, keys: Keys, *, name: str, limits: Limits | None = None
) -> Starlette:
    """The server as an ASGI application, to be run by uvicorn or another such server.

    keys: a Keyring, or a LiveKeyring whose changes count for the requests that come after them;
    name: what clients call the model. Raises NotReady if marks made here would not be found.
    """
    keyring = current(keys)
    # Before any request: a machine that computes something else must not serve.
    answers = known_answers(keyring.schemes) if keyring is not None else {}
    server = _Server(model, keys, name, limits or Limits())
    _log.info(
        "serving %s; %s",
        name,
        "no keyring: text is not marked"
        if keyring is None
        else f"{len(keyring.entries)} keys, policy {keyring.policy}, known answers found "
        f"({', '.join(f'{scheme} log10 p {value:.0f}' for scheme, value in answers.items())})",
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        server.thread.start()
        try:
            yield
        finally:
            await asyncio.to_thread(server.thread.close)
            server.tokenizing.shutdown()

    return Starlette(
        routes=[
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _fault},
        lifespan=lifespan,
    )


# ---------------------------------------------------------------- errors


def _error(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(_error_body(status, message, param=param, code=code), status, headers)


def _error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail), headers=error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    return _error(500, "a fault of the server; its log says more.", code="fault")


def _refusal(error: FiligraneError) -> JSONResponse:
    """What a client is told, by kind of error."""
    message = str(error)
    if isinstance(error, NotIdentified):
        headers = {"WWW-Authenticate": "Bearer"}
        return _error(401, message, code=error.reason, headers=headers)
    if isinstance(error, RequestRefused):
        return _error(400, message, code=error.reason)
    if isinstance(error, BadRequest):
        return _error(error.status, message, param=error.param, code=error.code)
    if isinstance(error, Overloaded):
        return _error(503, message, code="overloaded", headers={"Retry-After": "5"})
    return _error(400, message, code="malformed")


def _reason(error: FiligraneError) -> str:
    """A label of the counter: one of few words, whatever clients send."""
    if isinstance(error, RequestRefused):
        return error.reason
    if isinstance(error, BadRequest):
        return error.code
    return "overloaded" if isinstance(error, Overloaded) else "malformed"


# ---------------------------------------------------------------- one request


@dataclass(frozen=True, slots=True, kw_only=True)
class _News:
    """What is new of one text: characters to show, ids, and the reason if it has ended."""

    number: int
    shown: str
    ids: list[int]
    ended: str | None


class _Asked:
    """A request that is being answered: its texts as they grow, and who waits for them.

    `progress` runs in the thread of the model, everything else in the event loop.
    """

    def __init__(
        self, wanted: Wanted, admitted: Admitted, prompts: list[TokenIds], texts: list[Text]
    ) -> None:
        self.id = f"{_PREFIXES[wanted.api]}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.wanted, self.mark, self.prompts = wanted, admitted.mark, prompts
        self.texts = texts
        self.decoders: list[Decoder] = []
        self.failure: Exception | None = None
        self._read = [0] * len(texts)
        self._loop = asyncio.get_running_loop()
        # None when all is said.
        self.news: asyncio.Queue[_News | None] = asyncio.Queue()

    def progress(self) -> None:
        """Tell what is new of each text, and end those in which a stop text has appeared."""
        for number, (text, decoder) in enumerate(zip(self.texts, self.decoders, strict=True)):
            read = self._read[number]
            if read < 0:  # all of it is said
                continue
            ended, ids = text.ended, text.tokens[read:]
            if not ids and ended is None:
                continue
            shown = decoder.push(ids, last=ended is not None)
            if decoder.stopped:
                text.ended = ended = "stop"
            self._read[number] = -1 if ended is not None else read + len(ids)
            self._tell(_News(number=number, shown=shown, ids=ids, ended=ended))
        if all(read < 0 for read in self._read):
            self._tell(None)

    def fail(self, error: Exception) -> None:
        """Tell that nothing more will come."""
        self.failure = error
        self._tell(None)

    def _tell(self, news: _News | None) -> None:
        # The loop may have ended with the server.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.news.put_nowait, news)

    def cancel(self) -> None:
        """End what is still being written."""
        for text in self.texts:
            if text.ended is None:
                text.ended = "cancelled"

    def applied(self) -> dict[str, object]:
        """What is said of the mark."""
        if isinstance(self.mark, Mark):
            return {"marked": True, "key": self.mark.key_id, "scheme": self.mark.scheme.tag}
        return {"marked": False, "reason": self.mark.reason}

    def head(self, *, chunk: bool) -> dict[str, object]:
        """The fields that every answer begins with."""
        kind = _OBJECTS[self.wanted.api]
        if chunk and self.wanted.api == "chat":
            kind += ".chunk"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.wanted.model,
            "filigrane": self.applied(),
        }

    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt) for prompt in self.prompts)
        completion = sum(len(text.tokens) for text in self.texts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def choice(self, number: int) -> dict[str, object]:
        """One text of a whole answer."""
        text, shown = self.texts[number], self.decoders[number].text
        choice: dict[str, object] = {"index": number}
        if self.wanted.api == "chat":
            choice["message"] = {"role": "assistant", "content": shown, "refusal": None}
        else:
            choice["text"] = shown
        choice |= {"logprobs": None, "finish_reason": text.ended, "marked_tokens": text.n_marked}
        if self.wanted.return_token_ids:
            choice["token_ids"] = text.tokens
            choice["prompt_token_ids"] = text.order.prompt.tolist()
        return choice

    def delta(self, news: _News, ids: list[int]) -> dict[str, object]:
        """What is new of one text, for a stream; ids: all that were not told before."""
        text = self.texts[news.number]
        choice: dict[str, object] = {"index": news.number}
        if self.wanted.api == "chat":
            choice["delta"] = {"content": news.shown}
        else:
            choice["text"] = news.shown
        choice |= {"logprobs": None, "finish_reason": news.ended}
        if news.ended is not None:
            choice["marked_tokens"] = text.n_marked
        if self.wanted.return_token_ids:
            choice["token_ids"] = ids
        return choice


class _Server:
    def __init__(self, model: LoadedModel, keys: Keys, name: str, limits: Limits) -> None:
        lm = TransformersModel(model)
        self.thread = ModelThread(lm, rows=limits.rows, waiting=limits.waiting)
        # One thread: tokenizers are not made for several.
        self.tokenizing = ThreadPoolExecutor(1, "filigrane-tokenizer")
        self._tokenizer = model.tokenizer
        self._stop_ids = frozenset(lm.stop_ids)
        self._vocab_size = lm.vocab_size
        self._keys, self._name, self._limits = keys, name, limits
        own = getattr(model.model.config, "max_position_embeddings", None)
        sizes = [size for size in (own, limits.context) if isinstance(size, int)]
        self._context = min(sizes, default=2**31)
        self._started = int(time.time())
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "filigrane_requests",
            "Requests by what became of them; reason is the scheme of marked ones",
            ["outcome", "reason"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "filigrane_tokens",
            "Positions of marked texts, by whether they carry the mark",
            ["state"],
            registry=self._registry,
        )

    # -------------------------------------------------------------- small routes

    async def health(self, request: Request) -> Response:
        """200 while requests can be taken."""
        return Response(status_code=200 if self.thread.alive else 503)

    async def metrics(self, request: Request) -> Response:
        """Counters, as Prometheus reads them."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """The one model."""
        try:
            identify(current(self._keys), _bearer(request))
        except FiligraneError as error:
            return _refusal(error)
        own = {"id": self._name, "object": "model", "created": self._started}
        card = {**own, "owned_by": "filigrane", "max_model_len": self._context}
        return JSONResponse({"object": "list", "data": [card]})

    # -------------------------------------------------------------- answers

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, "completions")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, "chat")

    async def _answer(self, request: Request, api: Api) -> Response:
        try:
            asked = await self._take(request, api)
        except FiligraneError as error:
            reason = _reason(error)
            self._requests.labels("refused", reason).inc()
            _log.info("%s refused: %s", api, reason)
            return _refusal(error)
        self._requests.labels(*asked.mark.outcome).inc()
        if asked.wanted.stream:
            return StreamingResponse(
                self._stream(asked),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        return await self._whole(request, asked)

    async def _take(self, request: Request, api: Api) -> _Asked:
        """From the request to texts that wait for the model. Raises FiligraneError."""
        keyring = current(self._keys)
        tenant = identify(keyring, _bearer(request))
        wanted = parse(await _body(request, self._limits.body), api)
        if wanted.model != self._name:
            raise BadRequest(
                f"there is no such model here; this server has {self._name}.",
                param="model",
                code="model_not_found",
                status=404,
            )
        answers = wanted.n * max(1, len(wanted.prompts))
        if answers > self._limits.rows:
            raise BadRequest(
                f"{answers} texts in one request; at most {self._limits.rows}.", param="n"
            )
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self.tokenizing, self._encode, wanted)
        max_tokens = self._room(wanted, max(len(prompt) for prompt in prompts))
        try:
            admitted = admit(
                keyring,
                wanted.arguments,
                tenant=tenant,
                temperature=wanted.temperature,
                top_k=wanted.top_k,
                top_p=wanted.top_p,
                max_tokens=max_tokens,
            )
        except UnsupportedDecoding as error:
            raise BadRequest(str(error)) from None
        orders = [
            Order(
                prompt=prompt,
                max_tokens=max_tokens,
                sampling=admitted.sampling,
                mark=admitted.mark,
                seed=wanted.seed,
                number=number,
                stop=frozenset() if wanted.ignore_eos else self._stop_ids,
            )
            for prompt in prompts
            for number in range(wanted.n)
        ]
        asked = _Asked(wanted, admitted, prompts, [Text(order) for order in orders])
        asked.decoders = [Decoder(self._tokenizer, wanted.stop) for _ in orders]
        self.thread.submit(Job(tuple(asked.texts), asked.progress, asked.fail))
        return asked

    def _encode(self, wanted: Wanted) -> list[TokenIds]:
        """Token ids of the prompts. Raises BadRequest."""
        if wanted.api == "chat":
            rows = [self._tokenizer(self._render(wanted), add_special_tokens=False)["input_ids"]]
        else:
            rows = [
                self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
                for prompt in wanted.prompts
            ]
        prompts = [np.asarray(row, dtype=np.int64) for row in rows]
        for prompt in prompts:
            if not len(prompt):
                raise BadRequest("a prompt has no token at all.", param="prompt")
            if int(prompt.max()) >= self._vocab_size:
                raise BadRequest(
                    f"token id {int(prompt.max())} is none of this model's {self._vocab_size}.",
                    param="prompt",
                )
        return prompts

    def _render(self, wanted: Wanted) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise BadRequest("this model has no chat template; use POST /v1/completions.")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(wanted.messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like, jinja2 a dozen things
            raise BadRequest(
                f"the model's chat template refuses these messages: {str(error)[:200]}",
                param="messages",
            ) from None
        return text

    def _room(self, wanted: Wanted, longest: int) -> int:
        """How many tokens an answer may have. Raises BadRequest if the prompt is too long."""
        left = self._context - longest
        asked = wanted.max_tokens
        if asked is None:
            asked = _COMPLETION_TOKENS if wanted.api == "completions" else max(1, left)
            asked = min(asked, self._limits.answer)
        if asked > self._limits.answer:
            raise BadRequest(
                f"max_tokens is {asked}; this server writes at most {self._limits.answer}.",
                param="max_tokens",
            )
        if asked > left:
            raise BadRequest(
                f"the prompt has {longest} tokens and the answer may have {asked}, together more "
                f"than the model's context length of {self._context}.",
                param="max_tokens" if longest < self._context else "prompt",
                code="context_length_exceeded",
            )
        return asked

    async def _whole(self, request: Request, asked: _Asked) -> Response:
        """Wait for all texts, unless the client goes away before."""
        gone = asyncio.ensure_future(_disconnected(request))
        done = asyncio.ensure_future(_until_done(asked))
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                return Response(status_code=499)  # nobody reads it
            failure = _failure(asked)
            if failure is not None:
                return _error(*failure, code="model")
            choices = [asked.choice(number) for number in range(len(asked.texts))]
            return JSONResponse(
                {**asked.head(chunk=False), "choices": choices, "usage": asked.usage()}
            )
        except asyncio.CancelledError:
            # Only the end of the server does this, when its patience is over: say so.
            return _refusal(Overloaded("this server is being stopped."))
        finally:
            gone.cancel()
            done.cancel()
            self._end(asked)

    async def _stream(self, asked: _Asked) -> AsyncIterator[bytes]:
        """Server-sent events, one for each step of a text that shows something."""
        head = asked.head(chunk=True)
        # Clients that read the usage expect the field in every chunk.
        rest: dict[str, object] = {"usage": None} if asked.wanted.usage_in_stream else {}
        try:
            if asked.wanted.api == "chat":
                for number in range(len(asked.texts)):
                    delta = {"role": "assistant", "content": ""}
                    first = {"index": number, "delta": delta, "finish_reason": None}
                    yield _event({**head, "choices": [first], **rest})
            kept: list[list[int]] = [[] for _ in asked.texts]
            while (news := await asked.news.get()) is not None:
                kept[news.number] += news.ids
                if news.shown or news.ended is not None:
                    choice = asked.delta(news, kept[news.number])
                    kept[news.number] = []
                    yield _event({**head, "choices": [choice], **rest})
            failure = _failure(asked)
            if failure is not None:
                yield _event(_error_body(*failure, code="model"))
            elif asked.wanted.usage_in_stream:
                yield _event({**head, "choices": [], "usage": asked.usage()})
            yield b"data: [DONE]\n\n"
        finally:
            self._end(asked)

    def _end(self, asked: _Asked) -> None:
        """However it ended: stop the texts, count them, and write the log's line."""
        asked.cancel()
        if isinstance(asked.mark, Mark):
            marked = sum(text.n_marked for text in asked.texts)
            total = sum(len(text.tokens) for text in asked.texts)
            self._tokens.labels("marked").inc(marked)
            self._tokens.labels("unmarked").inc(total - marked)
        applied = asked.applied()
        _log.info(
            "%s %s, %d tokens, %s",
            asked.id,
            f"marked with {applied['key']} {applied['scheme']}"
            if applied["marked"]
            else f"unmarked ({applied['reason']})",
            asked.usage()["completion_tokens"],
            "+".join(sorted({str(text.ended) for text in asked.texts})),
        )


def _event(content: Mapping[str, object]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


def _failure(asked: _Asked) -> tuple[int, str] | None:
    """Status and message if the texts could not be written."""
    if isinstance(asked.failure, Overloaded):
        return 503, str(asked.failure)
    if asked.failure is not None:
        return 500, "the model failed; the server's log says more."
    errors = [text.error for text in asked.texts if text.error is not None]
    return (500, str(errors[0])) if errors else None


async def _until_done(asked: _Asked) -> None:
    while await asked.news.get() is not None:
        pass


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _bearer(request: Request) -> str | None:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" and token.strip() else None


async def _body(request: Request, most: int) -> bytes:
    """The body, of at most so many bytes. Raises BadRequest, with status 413."""
    too_large = BadRequest(f"the body has more than {most} bytes.", code="too_large", status=413)
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > most:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large
        parts.append(part)
    return b"".join(parts)
