"""Tenants by bearer token: `vllm serve ... --middleware filigrane.adapters.vllm.tenants.Tenants`.

vLLM's processors see a request's arguments and nothing of who sent it. This ASGI middleware looks
the token up in the keyring, writes the tenant into the body's `vllm_xargs`, and answers what is
refused before vLLM sees it. Answers to what it lets through say in their headers what marks them:

    filigrane-key: acme-2026/17
    filigrane-scheme: gumbel:context_width=4

Without tokens in the keyring it knows no tenants and does the rest.
"""

import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from filigrane.adapters.vllm import admission
from filigrane.errors import RequestRefused
from filigrane.serving.keyring import Keyring
from filigrane.serving.orders import Decoding, Mark, decide

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN: Final = frozenset({"/health", "/ping", "/metrics", "/metrics/", "/load", "/version"})
"""Paths that everybody may ask. All others want a token, if the keyring has any: vLLM has several
that generate (/v1/..., /invocations, /inference/...), and newer versions have more."""
GENERATING: Final = {
    **dict.fromkeys(
        (
            *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch"),
            *("/v1/responses", "/v1/messages", "/invocations"),
        ),
        ("vllm_xargs",),
    ),
    "/inference/v1/generate": ("sampling_params", "extra_args"),
}
"""Paths that write text, and where in their bodies vLLM looks for arguments. Others get no tenant;
what they write is marked with keys that everybody may use, or refused."""
MAX_BODY: Final = 64 * 2**20
"""Bytes; larger bodies are refused (413), not read."""

_log = logging.getLogger("vllm.filigrane")


class Tenants:
    """The middleware. Raises KeyringError when vLLM makes it, if the keyring cannot be read."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        admission.vetted = True
        if admission.keyring() is None:
            _log.warning("filigrane: no keyring; the middleware lets everything through.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        ring = admission.keyring()
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        guarded = scope["type"] in ("http", "websocket") and path not in OPEN
        if ring is None or not guarded or scope.get("method") == "OPTIONS":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        tenant = None
        if ring.knows_tokens:
            kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            if kind.lower() != "bearer":
                # Where Anthropic's clients put it (/v1/messages).
                token = headers.get(b"x-api-key", b"").decode("latin-1")
            tenant = ring.tenant_of(token.strip()) if token else None
            if tenant is None:
                admission.count("refused", "unknown_tenant")
                await _answer(
                    scope,
                    send,
                    401,
                    "unknown_tenant",
                    "this server knows its clients by bearer tokens: send one in the header "
                    "Authorization: Bearer TOKEN.",
                )
                return
        if scope["type"] == "websocket" or scope["method"] != "POST" or path not in GENERATING:
            await self._app(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:
            await _answer(scope, send, 413, "malformed", f"bodies have at most {MAX_BODY} bytes.")
            return
        try:
            body, applied = _changed(ring, body, tenant, GENERATING[path])
        except RequestRefused as error:
            admission.count("refused", error.reason)
            await _answer(scope, send, 400, error.reason, str(error).removeprefix("filigrane: "))
            return
        length = (b"content-length", str(len(body)).encode())
        kept = [(n, v) for n, v in scope["headers"] if n.lower() not in _LENGTHS]
        changed = {**scope, "headers": [*kept, length]}
        await self._app(changed, _replay(body, receive), _with_headers(send, applied))


_WRITES: Final = frozenset({"prompt", "messages", "input", "token_ids"})
_LENGTHS: Final = (b"content-length", b"transfer-encoding")


def _changed(
    ring: Keyring, body: bytes, tenant: str | None, place: tuple[str, ...]
) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The body as vLLM gets it, and the headers of its answer."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return body, []  # not JSON, or not well formed: vLLM says so, or it is a file
    if not isinstance(content, dict):
        return body, []
    holder = content
    for name in place[:-1]:
        holder = holder.setdefault(name, {})
        if not isinstance(holder, dict):
            return body, []  # vLLM refuses it
    given = holder.get(place[-1])
    if given is None:
        given = {}
    if not isinstance(given, dict):
        return body, []
    beside = {name: content.pop(name) for name in list(content) if name.startswith("filigrane_")}
    if beside:
        # Where other servers take them; vLLM would drop them without a word.
        if set(beside) & set(given):
            raise RequestRefused(
                f"filigrane: a field stands both in the body and in {'.'.join(place)}; use one.",
                reason="malformed",
            )
        given = {**given, **beside}
        holder[place[-1]] = given
        body = json.dumps(content).encode()
    if tenant is not None:
        if "filigrane_tenant" in given:
            raise RequestRefused(
                "filigrane: the tenant follows from the bearer token; leave filigrane_tenant out.",
                reason="malformed",
            )
        given = {**given, "filigrane_tenant": admission.seal(tenant)}
        holder[place[-1]] = given
        body = json.dumps(content).encode()
    # What the model's defaults make of temperature and length is vLLM's to say; it asks again.
    beams = content.get("use_beam_search") not in (None, False, 0, "false", "0", "no", "off")
    plain = admission.arguments(given, check=True)
    decided = decide(ring, plain, Decoding(beams=beams))
    if not isinstance(decided, Mark) or not _WRITES & set(content):
        if beams:
            admission.count("unmarked", "beams")
        return body, []
    scheme = decided.scheme.tag.encode()
    return body, [(b"filigrane-key", decided.key_id.encode()), (b"filigrane-scheme", scheme)]


async def _body(receive: Receive) -> bytes | None:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()  # the client's going away
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send: Send, headers: list[tuple[bytes, bytes]]) -> Send:
    async def sender(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return sender


async def _answer(scope: Scope, send: Send, status: int, reason: str, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    kind = "AuthenticationError" if status == 401 else "BadRequestError"
    error = {"message": f"filigrane: {message}", "type": kind, "code": status, "param": reason}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
