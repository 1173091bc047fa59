"""Each request, before vLLM takes it: `serving.decide`, counted, with vLLM's names.

Runs in the process that talks to clients. What is refused here raises RequestRefused, a ValueError,
which vLLM answers with HTTP 400 and the message.
"""

import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from filigrane.adapters.vllm import launch
from filigrane.errors import RequestRefused
from filigrane.serving.keyring import Keyring
from filigrane.serving.orders import Decoding, Mark, Unmarked, decide

vetted = False
"""Whether the middleware stands before this process's requests; it says so when it is made."""

_TENANT: Final = "filigrane_tenant"
# Of this process: the middleware and the check of requests run in the same one.
_SEAL: Final = secrets.token_bytes(32)
_SEALED: Final = "~"
SEAL_SECONDS: Final = 60


@lru_cache(maxsize=1)
def keyring() -> Keyring | None:
    """The server's keyring, read once in each process; None without FILIGRANE_KEYRING.

    Raises KeyringError if it is not the one that the server was started with.
    """
    ring = Keyring.from_environment()
    if ring is not None:
        launch.same_keyring(ring)
    return ring


def seal(tenant: str) -> str:
    """A tenant's name as the middleware hands it on, so that no client can say it itself.

    Good for SEAL_SECONDS: vLLM looks at it at once, and who gets hold of one cannot keep it.
    """
    return _sealed(tenant, f"{time.monotonic():.0f}")


def _sealed(tenant: str, moment: str) -> str:
    mac = hmac.new(_SEAL, f"{moment}{_SEALED}{tenant}".encode(), hashlib.sha256).hexdigest()
    return f"{tenant}{_SEALED}{moment}{_SEALED}{mac}"


def _open(value: object) -> str:
    name, _, rest = str(value).partition(_SEALED)
    moment = rest.partition(_SEALED)[0]
    age = time.monotonic() - int(moment) if re.fullmatch("[0-9]{1,12}", moment) else math.inf
    # Bytes: texts beyond ASCII cannot be compared.
    same = hmac.compare_digest(_sealed(name, moment).encode(), str(value).encode())
    if not same or age > SEAL_SECONDS:
        raise RequestRefused(
            "filigrane: this server knows tenants by their bearer tokens "
            "(Authorization: Bearer ...); leave filigrane_tenant out.",
            reason="unknown_tenant",
        )
    return name


def arguments(extra: Mapping[str, object] | None, *, check: bool) -> dict[str, object]:
    """A request's arguments with the tenant's seal taken off.

    check: refuse a tenant that the middleware has not sealed, if tenants have tokens. Engines do
    not check again what was admitted.
    """
    given = dict(extra or {})
    if _TENANT in given:
        ring = keyring()
        if check and ring is not None and ring.knows_tokens:
            given[_TENANT] = _open(given[_TENANT])
        elif isinstance(given[_TENANT], str):
            given[_TENANT] = str(given[_TENANT]).partition(_SEALED)[0]
    return given


def admitted(params: Any) -> Mark | Unmarked:
    """What has been decided about a request that was admitted; for the engine.

    How it is decoded was checked then. It is not checked again: vLLM fills in limits afterwards,
    and an error in an engine would end it for everybody.
    """
    return decide(keyring(), arguments(params.extra_args, check=False), Decoding())


def admit(params: Any) -> Mark | Unmarked:
    """Decide about a new request and count it. Raises RequestRefused, counted too.

    Asked again about the same request (vLLM does so for processors that are loaded twice), it gives
    the same answer and counts nothing.
    """
    global _last
    extra = dict(params.extra_args or {})
    asked = (params, extra, params.temperature, params.top_k, params.top_p, params.max_tokens)
    if _last is not None and _last[0][0] is params and _last[0][1:] == asked[1:]:
        return _last[1]
    decided = _admit(params)
    _last = (asked, decided)
    return decided


_last: tuple[tuple[Any, ...], Mark | Unmarked] | None = None


def _admit(params: Any) -> Mark | Unmarked:
    # vLLM searches beams by asking itself for single tokens with their alternatives, and leaves the
    # arguments of whoever asked behind. The middleware has seen those; without it nobody has.
    step = params.max_tokens == 1 and bool(params.logprobs) and not params.detokenize
    ring = keyring()
    if step and vetted and ring is not None and ring.policy != "enforce":
        return Unmarked(reason="beams")
    try:
        if step and ring is not None:
            raise RequestRefused(
                "filigrane: beam search chooses among whole texts, which undoes the mark of each "
                "token. Sample instead; or, if the policy lets text go unmarked, start the server "
                "with --middleware filigrane.adapters.vllm.tenants.Tenants, which knows who asked.",
                reason="beams",
            )
        decided = decide(
            ring,
            arguments(params.extra_args, check=True),
            Decoding(
                temperature=params.temperature,
                top_k=max(params.top_k, 0),
                top_p=params.top_p,
                max_tokens=params.max_tokens,
            ),
        )
        if isinstance(decided, Mark):
            _require_engine(decided)
    except RequestRefused as error:
        count("refused", error.reason)
        raise
    if ring is not None:
        count(*decided.outcome)
    return decided


def _require_engine(mark: Mark) -> None:
    if not launch.ready(mark.scheme.acts_on):
        raise RequestRefused(
            "filigrane: the engine of this server does not mark text: "
            "its logits processors were not loaded. vLLM leaves them out with speculative decoding "
            "unless model runner V2 is used, and without the plugin 'filigrane' if VLLM_PLUGINS "
            "is set and does not name it.",
            reason="engine",
        )


def count(outcome: str, reason: str) -> None:
    """Count one request: filigrane_requests_total{outcome, reason} of /metrics."""
    counter = _counter()
    if counter is not None:
        counter.labels(outcome=outcome, reason=reason).inc()


@lru_cache(maxsize=1)
def _counter() -> Any:
    try:
        from prometheus_client import REGISTRY, Counter
        from prometheus_client.core import CounterMetricFamily
    except ImportError:
        return None

    class Tokens:
        """Reads the engines' counts when it is asked."""

        def collect(self) -> Iterator[Any]:
            family = CounterMetricFamily(
                "filigrane_tokens",
                "Positions of marked texts, by whether they carry the mark",
                labels=["state"],
            )
            for state, number in launch.counts().items():
                family.add_metric([state], number)
            yield family

    REGISTRY.register(Tokens())
    return Counter(
        "filigrane_requests",
        "Requests by what became of them; reason is the scheme of marked ones",
        ["outcome", "reason"],
    )
