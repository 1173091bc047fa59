"""What becomes of a request: marked with which key and scheme, unmarked and why, or refused.

Requests say what they want in four arguments (in vLLM's `vllm_xargs`, in a server's body), none of
them secret:

    filigrane_key     id of a key of the server's keyring, "acme-2026", or of one of its users,
                      "acme-2026/17"; "acme.chat" is the active one of "acme.chat@1", "acme.chat@2"
    filigrane_scheme  a scheme's tag, one of those that the keyring allows for that key
    filigrane_mark    false opts out, true asks for the mark
    filigrane_tenant  on whose behalf; to be set by whoever authenticates (a gateway, or
                      the middleware of `adapters.vllm.tenants`), who removes what clients write

Knows nothing of engines: they hand over the arguments and how the text is going to be decoded.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from filigrane.embedding import Sampling, refuse_unmarkable
from filigrane.errors import RequestRefused, SchemeError, UnsupportedDecoding
from filigrane.keys import MAX_INDEX, MarkingKey
from filigrane.schemes import Scheme, from_tag
from filigrane.serving.keyring import Entry, Keyring

ARGUMENTS: Final = (
    "filigrane_key",
    "filigrane_scheme",
    "filigrane_mark",
    "filigrane_tenant",
)
GREEDY: Final = 1e-5
"""Temperatures below are greedy, as in vLLM."""
_PREFIX: Final = "filigrane_"
_LONGEST: Final = 256
_BOOLEANS: Final = {
    **{"true": True, "1": True, "yes": True, "on": True},
    **{"false": False, "0": False, "no": False, "off": False},
}

REASONS: Final = {
    "malformed": "an argument has the wrong name, type or form",
    "no_keyring": "the server has no keyring",
    "unknown_tenant": "the tenant is not one of the keyring's",
    "unknown_key": "no such key, or another tenant's",
    "retired_key": "the key marks no more",
    "staged_key": "the key marks not yet",
    "lease_expired": "the time for which this server has the key is over",
    "no_key": "the request names no key and there is no default",
    "scheme": "the keyring does not allow the scheme with this key",
    "opt_out": "the server marks everything",
    "greedy": "nothing is left to choose",
    "beams": "beams choose among whole texts",
    "too_short": "at most as many tokens as a window has",
    "engine": "this engine, as started, cannot carry the mark",
}
"""Why requests are refused: code (a label of the counter) -> what it means."""
UNMARKED: Final = {
    "opted_out": "the request says so, and the policy lets it",
    "not_asked": "the policy marks what asks for it, and the request does not",
    "beams": "beam search, and the policy lets text go unmarked",
    "lease_expired": "the key's time is over, and the keyring says to go on without it",
}
"""Why requests are served without a mark."""
_STARTED: Final = (datetime.now(UTC), time.monotonic())


def now() -> datetime:
    """The time, by which leases expire; setting the clock back does not turn it back."""
    wall, monotonic = _STARTED
    return max(datetime.now(UTC), wall + timedelta(seconds=time.monotonic() - monotonic))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How a request wants its text drawn. max_tokens: None if there is no limit."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = None
    beams: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A request that is to be marked: with this key, known by this id, and this scheme."""

    key: MarkingKey
    key_id: str
    scheme: Scheme

    @property
    def outcome(self) -> tuple[str, str]:
        """How a request is counted: what became of it, and the reason or scheme."""
        return "marked", self.scheme.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmarked:
    """A request that is not to be marked. reason: of UNMARKED."""

    reason: str

    @property
    def outcome(self) -> tuple[str, str]:
        """How a request is counted: what became of it, and the reason or scheme."""
        return "unmarked", self.reason


def decide(
    keyring: Keyring | None,
    arguments: Mapping[str, object] | None,
    decoding: Decoding,
    *,
    at: datetime | None = None,
) -> Mark | Unmarked:
    """What becomes of one request.

    arguments: the request's, of which those that begin with "filigrane_" are read; keyring: None if
    the server has none, which serves requests that ask for nothing; at: the moment, `now()` by
    default. Raises RequestRefused, whose `reason` is one of REASONS; never returns Unmarked where a
    mark was asked for or is enforced.
    """
    given = _given(arguments)
    if keyring is None:
        if given:
            raise _no("no_keyring", "this server has no keyring, it cannot mark text.")
        return Unmarked(reason="not_asked")
    tenant = _tenant(keyring, given)
    wanted = _boolean(given.get("filigrane_mark"))
    if wanted is False:
        if keyring.policy == "enforce":
            raise _no("opt_out", "this server marks all text; leave filigrane_mark out.")
        # Even so a key that is not theirs is an error: somebody is mistaken.
        if "filigrane_key" in given:
            _key(keyring, tenant, given)
        return Unmarked(reason="opted_out")
    asked = wanted or "filigrane_key" in given or "filigrane_scheme" in given
    if keyring.policy == "opt-in" and not asked:
        return Unmarked(reason="not_asked")
    entry, key, key_id = _key(keyring, tenant, given)
    if entry.expired(at or now()):
        if keyring.expired == "unmarked" and not asked:
            return Unmarked(reason="lease_expired")
        raise _no(
            "lease_expired",
            f"the time for which this server has key {entry.id} is over, and text without its mark "
            "is not written; `filigrane engine lease` renews it.",
        )
    scheme = _scheme(entry, given)
    _check_decoding(scheme, decoding, keyring.policy != "enforce")
    return Mark(key=key, key_id=key_id, scheme=scheme)


def _no(reason: str, message: str) -> RequestRefused:
    return RequestRefused(f"filigrane: {message}", reason=reason)


def _given(arguments: Mapping[str, object] | None) -> dict[str, object]:
    given = {name: value for name, value in (arguments or {}).items() if name.startswith(_PREFIX)}
    for name, value in given.items():
        if name not in ARGUMENTS:
            raise _no(
                "malformed", f"unknown argument {_short(name)}; known are {', '.join(ARGUMENTS)}."
            )
        if name != "filigrane_mark" and (not isinstance(value, str) or len(value) > _LONGEST):
            raise _no("malformed", f"{name} is a text of at most {_LONGEST} characters.")
    return given


def _short(text: str) -> str:
    # What clients send is shown to them again, not their megabytes.
    return repr(text if len(text) <= 64 else text[:61] + "...")


def _boolean(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    # vLLM's request bodies carry texts and numbers only, and read true as the number 1.
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    raise _no("malformed", "filigrane_mark is true or false.")


def _tenant(keyring: Keyring, given: Mapping[str, object]) -> str | None:
    name = given.get("filigrane_tenant")
    if name is None:
        return None
    known = {entry.tenant for entry in keyring.entries.values()} | set(keyring.tenants)
    if name not in known:
        raise _no("unknown_tenant", f"there is no tenant {_short(str(name))} here.")
    return str(name)


def _key(
    keyring: Keyring, tenant: str | None, given: Mapping[str, object]
) -> tuple[Entry, MarkingKey, str]:
    key_id = given.get("filigrane_key")
    if key_id is None:
        of_tenant = keyring.tenants.get(tenant or "")
        key_id = (of_tenant.default if of_tenant else None) or keyring.default
        if key_id is None:
            raise _no("no_key", _without_default(keyring, tenant))
    root, slash, index = str(key_id).partition("/")
    entry = keyring.entry(root)
    # One answer for both: whether another tenant has a key of that name is none of theirs.
    if entry is None or entry.tenant not in (None, tenant):
        whose = "a request without a tenant" if tenant is None else "this tenant"
        raise _no("unknown_key", f"no key {_short(root)} here for {whose}.")
    if entry.state == "staged":
        raise _no("staged_key", f"key {entry.id} is staged: it marks when it is promoted.")
    if not entry.active:
        raise _no("retired_key", f"key {entry.id} is retired: it detects and marks no more.")
    if not slash:
        return entry, entry.key, entry.id
    if not (index.isascii() and index.isdigit() and len(index) <= 20 and int(index) <= MAX_INDEX):
        raise _no("malformed", "after the slash of a key id comes a user's number, as in acme/17.")
    return entry, entry.key.user(int(index)), f"{entry.id}/{int(index)}"


def _without_default(keyring: Keyring, tenant: str | None) -> str:
    """What is missing where a request names no key and none is the default."""
    if tenant is not None:
        return (
            f"tenant {tenant} has no default key here: name one in filigrane_key, or have default "
            f"set in [tenants.{tenant}] of the keyring."
        )
    if keyring.entries and all(entry.tenant is not None for entry in keyring.entries.values()):
        return (
            "all keys of this server belong to tenants, and the request says of none that it is "
            "theirs: send the tenant's bearer token, or have the gateway set filigrane_tenant."
        )
    return "name a key in filigrane_key; this server has no default."


def _scheme(entry: Entry, given: Mapping[str, object]) -> Scheme:
    tag = given.get("filigrane_scheme")
    if tag is None:
        return entry.schemes[0]
    try:
        wanted = from_tag(str(tag))
    except SchemeError as error:
        raise _no("malformed", f"filigrane_scheme: {_cut(str(error))}") from None
    named = [scheme for scheme in entry.schemes if scheme.name == str(tag).strip()]
    if len(named) == 1:
        return named[0]  # its name alone, where there is no other of that name
    if wanted not in entry.schemes:
        allowed = ", ".join(scheme.tag for scheme in entry.schemes)
        raise _no("scheme", f"key {entry.id} is used with {allowed}, not with {wanted.tag}.")
    return wanted


def _cut(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def _check_decoding(scheme: Scheme, decoding: Decoding, may_opt_out: bool) -> None:
    opt_out = " Or opt out with filigrane_mark: false." if may_opt_out else ""
    if decoding.beams:
        raise _no(
            "beams",
            "beam search chooses among whole texts, which undoes the mark of each token; "
            f"sample instead.{opt_out}",
        )
    try:
        refuse_unmarkable(
            scheme,
            Sampling(
                temperature=0.0 if decoding.temperature < GREEDY else decoding.temperature,
                top_k=max(decoding.top_k, 0),
                top_p=decoding.top_p,
            ),
        )
    except UnsupportedDecoding as error:
        raise _no("greedy", f"{error}{opt_out}") from None
    width = scheme.context_width
    if decoding.max_tokens is not None and decoding.max_tokens <= width:
        raise _no(
            "too_short",
            f"the first {width} tokens of a text carry no mark and max_tokens is "
            f"{decoding.max_tokens}: ask for more.{opt_out}",
        )
