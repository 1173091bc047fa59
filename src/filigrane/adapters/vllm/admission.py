"""Each request, before vLLM takes it: `serving.decide`, counted, with vLLM's names.

Runs in the process that talks to clients. What is refused here raises RequestRefused, a ValueError,
which vLLM answers with HTTP 400 and the message. What is admitted takes along what was decided, in
the argument `filigrane_admitted` that no client can set: keys may change before an engine sees it,
and it is written with the key that it was admitted with.
"""

import hashlib
import hmac
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from filigrane.adapters.vllm import launch
from filigrane.errors import RequestRefused
from filigrane.keys import Key, UserKey
from filigrane.schemes import from_tag
from filigrane.serving.keyring import Keyring
from filigrane.serving.live import LiveKeyring, current
from filigrane.serving.orders import Decoding, Mark, Unmarked, decide
from filigrane.serving.readiness import known_answers

vetted = False
"""Whether the middleware stands before this process's requests; it says so when it is made."""

_TENANT: Final = "filigrane_tenant"
# Of this process: the middleware and the check of requests run in the same one.
_SEAL: Final = secrets.token_bytes(32)
_SEALED: Final = "~"
SEAL_SECONDS: Final = 60
ADMITTED: Final = "filigrane_admitted"
"""The argument in which a request takes along what was decided about it; sealed."""

_log = logging.getLogger("vllm.filigrane")


@lru_cache(maxsize=1)
def live() -> LiveKeyring | None:
    """The server's folder of keys in this process; None without FILIGRANE_KEYRING."""
    return LiveKeyring.from_environment()


def keyring() -> Keyring | None:
    """The server's keyring as it is now; None without FILIGRANE_KEYRING."""
    return current(live())


@lru_cache(maxsize=1)
def live_engine() -> LiveKeyring | None:
    """The same in a process that runs the model, where a thread looks after it.

    A keyring counts, and is told to the processes that talk to clients, when the known answers of
    its schemes have come out here. Raises NotReady if those of the first do not.
    """

    def accept(ring: Keyring) -> None:
        known_answers(ring.schemes)
        launch.publish(ring)

    keys = LiveKeyring.from_environment(accept=accept)
    if keys is not None:
        # Not only when a request comes: none does for a key that the engine has not read.
        threading.Thread(target=_look_after, args=(keys,), name="filigrane", daemon=True).start()
    return keys


def _look_after(keys: LiveKeyring) -> None:
    while True:
        time.sleep(1.0)
        keys.now()


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

    It is not decided again: vLLM fills in limits afterwards, keys change, and an error in an engine
    would end it for everybody.
    """
    pin = (params.extra_args or {}).get(ADMITTED)
    keys = live_engine()
    if not isinstance(pin, str) or keys is None:
        return decide(current(keys), arguments(params.extra_args, check=False), Decoding())
    what, *facts = pin.split(_SEALED)[:-1]
    if what == "unmarked":
        return Unmarked(reason=facts[0])
    key_id, fingerprint, tag = facts
    root, _, user = key_id.partition("/")
    entry = keys.known(root, fingerprint)
    if entry is None:
        # It was published as read, or the request would not be here.
        _log.error("filigrane: key %s has been lost; a text of it is unmarked.", root)
        return Unmarked(reason="engine")
    key = entry.key.user(int(user)) if user else entry.key
    return Mark(key=key, key_id=key_id, scheme=from_tag(tag))


def admit(params: Any) -> Mark | Unmarked:
    """Decide about a new request and count it. Raises RequestRefused, counted too.

    The request takes the decision along. Asked again about the same request (vLLM does so for
    processors that are loaded twice), it gives the same answer and counts nothing.
    """
    global _last
    try:
        extra = _without_pin(params.extra_args)
    except RequestRefused as error:
        count("refused", error.reason)
        raise
    ring = keyring()
    sampling = (params.temperature, params.top_k, params.top_p, params.max_tokens)
    asked = (params, ring, extra, sampling)
    again = (
        _last is not None
        and all(one is other for one, other in zip(_last[0][:2], asked[:2], strict=True))
        and _last[0][2:] == asked[2:]
        and time.monotonic() - _last[2] < 1.0
    )
    if _last is None or not again:
        _last = (asked, _admit(params, extra, ring), time.monotonic())
    decided = _last[1]
    if ring is not None:
        # Another mapping: the caller's may be shared.
        params.extra_args = {**extra, ADMITTED: _pin(decided)}
    return decided


_last: tuple[tuple[Any, ...], Mark | Unmarked, float] | None = None


def _pin(decided: Mark | Unmarked) -> str:
    if isinstance(decided, Mark):
        facts = ["mark", decided.key_id, _root(decided).fingerprint, decided.scheme.tag]
    else:
        facts = ["unmarked", decided.reason]
    said = _SEALED.join(facts)
    return f"{said}{_SEALED}{_pin_mac(said)}"


def _pin_mac(said: str) -> str:
    return hmac.new(_SEAL, f"admitted{_SEALED}{said}".encode(), hashlib.sha256).hexdigest()


def _without_pin(extra: Mapping[str, object] | None) -> dict[str, object]:
    """A request's arguments without what an earlier admission of it has added."""
    given = dict(extra or {})
    if ADMITTED in given:
        said, _, mac = str(given.pop(ADMITTED)).rpartition(_SEALED)
        if not hmac.compare_digest(_pin_mac(said).encode(), mac.encode()):
            raise RequestRefused(
                f"filigrane: {ADMITTED} is the server's own; leave it out.", reason="malformed"
            )
    return given


def _root(mark: Mark) -> Key:
    key = mark.key.root if isinstance(mark.key, UserKey) else mark.key
    assert isinstance(key, Key)
    return key


def _admit(params: Any, extra: Mapping[str, object], ring: Keyring | None) -> Mark | Unmarked:
    # vLLM searches beams by asking itself for single tokens with their alternatives, and leaves the
    # arguments of whoever asked behind. The middleware has seen those; without it nobody has.
    step = params.max_tokens == 1 and bool(params.logprobs) and not params.detokenize
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
            arguments(extra, check=True),
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
    root = _root(mark)
    id = mark.key_id.partition("/")[0]
    if not launch.has_read(id, root.fingerprint):
        raise RequestRefused(
            f"filigrane: the engine of this server has not read key {id} yet; try again in a "
            "second. (If it never does, it has another keyring than the process that answers.)",
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
