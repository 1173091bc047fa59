"""A model behind an OpenAI-compatible address: chat and completions, over a network that fails.

Knows nothing of marks, files or what the answers are for. It asks until it has an answer or knows
that there will be none, at a bearable pace, and says which of the two it was.
"""

import contextlib
import functools
import json
import socket
import ssl
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

from filigrane.adapters.endpoints.addresses import PATHS, address
from filigrane.adapters.endpoints.answers import (
    Answer,
    Parameters,
    Unusable,
    output_tokens,
    read_answer,
    their_words,
)
from filigrane.adapters.endpoints.keys import KEY_VARIABLE, ApiKey
from filigrane.adapters.endpoints.pacing import Budget, Pace, retry_after
from filigrane.errors import EndpointError, MissingDependency

Api = Literal["chat", "completions"]

R = TypeVar("R")
Read = Callable[[dict[str, Any], str], R]
"""Takes an answer's JSON and the name that the model was asked for by."""

_BUSY: Final = (408, 409, 425, 429)
_MAX_BYTES: Final = 1 << 28  # the laws of a long document are some tens of megabytes
_LONGEST_BACKOFF: Final = 60.0
_GRACE: Final = 2.0
_OPTIONAL: Final = ("return_token_ids", "return_tokens_as_token_ids", "max_tokens")
"""Fields that not every server knows, and that can be left out or renamed."""


class Unanswered(EndpointError):
    """This one request gets no answer; others may."""


@functools.cache
def _tls() -> Any:
    """Whom to trust: the system's authorities, or SSL_CERT_FILE. Reading them takes a while."""
    import httpx2

    return httpx2.create_ssl_context()


class _Fault(Exception):
    """One try went wrong in a way that another may not.

    wait: seconds that the endpoint asked for; charged: whether it may have written an answer, and
    counted it; down: whether there is no connection at all; tries: fewer than usual.
    """

    def __init__(
        self,
        message: str,
        *,
        wait: float | None = None,
        charged: bool = False,
        down: bool = False,
        tries: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.wait, self.charged = message, wait, charged
        self.down, self.tries = down, tries


class _Adapted(Exception):
    """The endpoint refuses a field that can be left out, and is to be asked again without it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Endpoint:
    """A model at an address; safe to use from several threads, and closed by `with`.

    url: what is before /chat/completions, with or without /v1; timeout: seconds for a whole
    answer; retries: tries after the first; requests_per_minute counts every try; backoff: seconds
    before the second try, doubled for each further one; jitter: draws from [0, 1), spreads the
    tries of several clients (random.random; the default spreads nothing); longest_wait: seconds
    that the endpoint may ask to wait.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: Api = "chat",
        key: ApiKey | None = None,
        timeout: float = 120.0,
        connect_timeout: float = 10.0,
        retries: int = 6,
        requests_per_minute: float | None = None,
        backoff: float = 1.0,
        jitter: Callable[[], float] = lambda: 1.0,
        longest_wait: float = 600.0,
        budget: Budget | None = None,
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise MissingDependency(
                "asking an endpoint needs one more package: pip install 'filigrane[endpoints]'"
            ) from error
        self._http = httpx2
        self._base, self._query, self.url = address(url)
        self.model, self.api = model, api
        self.budget = budget or Budget()
        self._key, self._timeout, self._retries = key, timeout, retries
        self._backoff, self._jitter, self._longest_wait = backoff, jitter, longest_wait
        self._pace = Pace(requests_per_minute)
        self._lock = threading.Lock()
        self._idle = threading.Condition()
        self._active = 0
        self._served: str | None = None
        self._answered = False
        self._refused: frozenset[str] = frozenset()
        self._client = httpx2.Client(
            headers={"User-Agent": "filigrane", **(key.header() if key else {})},
            timeout=httpx2.Timeout(timeout, connect=connect_timeout, pool=None),
            verify=_tls(),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            # A redirection would carry the key to wherever the endpoint likes.
            follow_redirects=False,
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r}, api={self.api!r})"

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        # A request under way cannot be called back; a moment lets most of them end in order.
        with self._idle:
            self._idle.wait_for(
                lambda: not self._active, timeout=0.0 if kind is KeyboardInterrupt else _GRACE
            )
        self._client.close()

    def stop(self) -> None:
        """Begin no further try; requests that wait for one raise Stopped."""
        self._pace.stop()

    def expect(self, model: str) -> None:
        """Hold the endpoint to the model id of earlier answers."""
        self._served = model

    def ask(self, prompt: str, system: str | None, parameters: Parameters) -> Answer:
        """One answer to one prompt.

        Raises Unanswered if only this prompt gets none, Stopped after `stop` or at the end of the
        budget, and EndpointError if the endpoint is down, refuses, or serves another model now.
        """
        body: dict[str, Any] = {
            "temperature": parameters.temperature,
            "top_p": parameters.top_p,
            "max_tokens": parameters.max_tokens,
            "return_token_ids": True,
        }
        if parameters.seed is not None:
            body["seed"] = parameters.seed
        if self.api == "chat":
            turns = [] if system is None else [{"role": "system", "content": system}]
            body["messages"] = [*turns, {"role": "user", "content": prompt}]
            if parameters.top_logprobs:
                body |= {"logprobs": True, "top_logprobs": parameters.top_logprobs}
                body["return_tokens_as_token_ids"] = True
        else:
            if system is not None:
                raise EndpointError(
                    "completions know no system prompt; write it into the prompts, or use chat."
                )
            body["prompt"] = prompt
            if parameters.top_logprobs:
                body |= {"logprobs": parameters.top_logprobs, "return_tokens_as_token_ids": True}
        return self.post(body, read_answer)

    def post(self, body: Mapping[str, Any], read: Read[R]) -> R:
        """Send a request of this API and read what comes back, with retries.

        body: without the model's name; read: takes the answer's JSON and the model's name, returns
        what is wanted and raises Unusable for anything less. Errors are those of `ask`.
        """
        failed = 0
        adapted: set[str] = set()
        while True:
            try:
                return self._try(dict(body), read)
            except _Adapted as refusal:
                adapted.add(refusal.name)
            except Unanswered:
                # It was not for those fields: some servers repeat a whole request when they refuse.
                self._refused -= adapted
                raise
            except _Fault as fault:
                failed += 1
                tries = 1 + self._retries
                if fault.tries is not None:
                    tries = min(tries, fault.tries)
                if fault.down and not self._answered:
                    tries = 1  # more likely a wrong address than a server that restarts
                if failed >= tries:
                    kind = EndpointError if fault.down else Unanswered
                    times = f" ({failed} tries)" if failed > 1 else ""
                    raise kind(f"{fault.message}{times}") from None
                if fault.wait:
                    self._pace.hold(fault.wait)
                else:
                    longest = min(_LONGEST_BACKOFF, self._backoff * 2.0 ** (failed - 1))
                    self._pace.sleep(longest * (0.5 + 0.5 * self._jitter()))

    # ------------------------------------------------------------ one try

    def _try(self, body: dict[str, Any], read: Read[R]) -> R:
        most = int(body.get("max_tokens") or 0)
        self._pace.wait()
        body["model"] = self.model
        self._adapt(body)
        self.budget.begin(most)
        used = 0
        try:
            status, headers, content = self._send(body)
            if status != 200:
                if status in (400, 422):
                    self._learn(body, content)
                self._refuse(status, headers, content)
            found = self._parse(content)
            # A server that does not count has perhaps written all that it was allowed to.
            counted = output_tokens(found)
            used = most if counted is None else counted
            try:
                result = read(found, self.model)
            except Unusable as error:
                raise _Fault(
                    f"{self.url}: {self._sentence(str(error))}", tries=error.tries
                ) from None
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise _Fault(
                    f"{self.url}: the answer has another form than the API's ({error!r:.80})."
                ) from error
            self._check_model(found)
            self._answered = True
            return result
        except _Fault as fault:
            used = most if fault.charged else used
            raise
        finally:
            self.budget.settle(most, used)

    def _send(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        with self._idle:
            self._active += 1
        try:
            return self._exchange(body)
        finally:
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    def _exchange(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        http = self._http
        url = f"{self._base}/{PATHS[self.api]}{self._query}"
        deadline = time.monotonic() + self._timeout
        # Read in pieces: a server that dribbles would outlast a time limit on each of them.
        try:
            with self._client.stream("POST", url, json=body) as response:
                content = bytearray()
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > _MAX_BYTES:
                        raise Unanswered(f"{self.url}: the answer is longer than 256 MiB.")
                    if time.monotonic() > deadline:
                        raise http.ReadTimeout("too slow")
                return response.status_code, response.headers, bytes(content)
        except http.ConnectTimeout as error:
            raise _Fault(
                f"{self.url}: no connection in time; is the host up, and the port right?",
                down=True,
            ) from error
        except http.TimeoutException as error:
            raise _Fault(
                f"{self.url}: no whole answer within {self._timeout:g} s; allow more (timeout), or "
                "ask for fewer tokens.",
                charged=True,
            ) from error
        except http.ConnectError as error:
            raise self._no_connection(error) from error
        except (http.NetworkError, http.RemoteProtocolError, http.DecodingError) as error:
            raise _Fault(
                f"{self.url}: the connection broke before the answer was whole.", charged=True
            ) from error
        except http.ProxyError as error:
            raise EndpointError(
                f"{self.url}: the proxy refuses: {self._sentence(str(error))} Check "
                "HTTPS_PROXY and NO_PROXY."
            ) from error
        except (http.TransportError, http.InvalidURL) as error:
            raise EndpointError(f"{self.url}: {self._sentence(str(error))}") from error

    def _no_connection(self, error: BaseException) -> Exception:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLError):
                why = getattr(cause, "verify_message", "") or cause.reason or str(cause)
                return EndpointError(
                    f"{self.url}: no safe connection (TLS): {self._sentence(str(why))} If the "
                    "certificate is your own, name its authority in SSL_CERT_FILE; if the server "
                    "speaks plain HTTP, begin the address with http://."
                )
            if isinstance(cause, socket.gaierror):
                return _Fault(
                    f"{self.url}: the name of this host is not known (DNS); check its spelling and "
                    "your network.",
                    down=True,
                )
            cause = cause.__cause__ or cause.__context__
        return _Fault(
            f"{self.url}: no connection; is the server running, and on this port?",
            down=True,
        )

    def _refuse(self, status: int, headers: Any, content: bytes) -> None:
        """Raise what a status other than 200 means."""
        words = self._sentence(their_words(content))
        said = f"{self.url} answers {status}: {words}" if words else f"{self.url} answers {status}."
        if status == 401:
            have = "check the API key" if self._key else f"set {KEY_VARIABLE} to your API key"
            raise EndpointError(f"{said} It wants another key: {have}.")
        if status == 402 or "insufficient_quota" in words or b"insufficient_quota" in content:
            raise EndpointError(f"{said} The account has no credit left; what was collected stays.")
        if status == 403:
            raise EndpointError(f"{said} This key has no right to model {self.model!r}.")
        if status == 404:
            raise EndpointError(f"{said} Check the address and the model's name.{self._serves()}")
        if status in _BUSY or (status >= 500 and status != 501):
            wait = retry_after(headers.get("retry-after"))
            if wait is not None and wait > self._longest_wait:
                raise EndpointError(
                    f"{said} It asks to wait {wait:.0f} s; go on after that, what was collected "
                    "stays."
                )
            # A gateway that loses patience does not stop the model behind it.
            raise _Fault(said, wait=wait, charged=status in (408, 504, 524))
        if 300 <= status < 400:
            where = self._clean(str(headers.get("location", "")))
            raise EndpointError(f"{said} It sends us on to {where!r}; pass that address instead.")
        raise Unanswered(said)

    def _parse(self, content: bytes) -> dict[str, Any]:
        if self._key is not None and self._key.sent_back(content):
            raise EndpointError(
                f"{self.url} sends the API key back in its answer, which is not kept; revoke the "
                "key, and ask whoever runs this server why."
            )
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            start = content.lstrip()[:9].lower()
            if start.startswith((b"<!doctype", b"<html")):
                raise EndpointError(
                    f"{self.url} answers with a web page instead of JSON; check the address (most "
                    "end in /v1)."
                ) from None
            raise _Fault(
                f"{self.url}: the answer is not JSON (or was cut): it begins "
                f"{self._clean(repr(content[:60]))}"
            ) from None
        if not isinstance(found, dict):
            raise _Fault(f"{self.url}: the answer is not a JSON object.")
        return found

    def _check_model(self, found: Mapping[str, Any]) -> None:
        name = found.get("model")
        if not isinstance(name, str) or not name:
            return
        with self._lock:
            if self._served is None:
                self._served = name
            served = self._served
        if name != served:
            raise EndpointError(
                f"{self.url} answers as model {self._clean(name)!r} now; until here it was "
                f"{self._clean(served)!r}. What was collected stays, and holds nothing of the new "
                "one: ask that one into a file of its own."
            )

    # ------------------------------------------------------------ differences between servers

    def _adapt(self, body: dict[str, Any]) -> None:
        """Leave out, or rename, what this server has refused."""
        for name in self._refused & body.keys():
            value = body.pop(name)
            if name == "max_tokens":
                body["max_completion_tokens"] = value

    def _learn(self, body: Mapping[str, Any], content: bytes) -> None:
        """Raise _Adapted if a refusal is of a field that can be left out."""
        text = content.decode("utf-8", "replace")
        for name in _OPTIONAL:
            # Newer models of OpenAI want max_completion_tokens, and say so.
            hint = "max_completion_tokens" if name == "max_tokens" else name
            if name in body and hint in text:
                self._refused |= {name}
                raise _Adapted(name)

    def _serves(self) -> str:
        """The models that the endpoint lists, as a sentence, or nothing."""
        with contextlib.suppress(Exception):
            response = self._client.get(f"{self._base}/models{self._query}", timeout=5.0)
            names = [str(row["id"]) for row in response.json()["data"]]
            return f" It serves {self._clean(', '.join(names))}."
        return ""

    def _clean(self, words: str) -> str:
        """Somebody else's words as one short sentence, without the key."""
        text = self._key.hide(words) if self._key else words
        text = "".join(c if c.isprintable() else " " for c in text)
        return textwrap.shorten(text, 240, placeholder=" ...")

    def _sentence(self, words: str) -> str:
        text = self._clean(words)
        return text if not text or text.endswith((".", "!", "?")) else f"{text}."
