"""The keys of a server, who may use them, and its policy: a folder that requests only refer to.

    keyring.toml
        policy = "default"              # or "opt-in", "enforce"
        schemes = ["gumbel"]            # what may be used; the first is what requests get
        default = "acme-2026"           # key of requests that name none; without it they name one
        expired = "refuse"              # what becomes of requests whose key has expired

        [keys.acme-2026]
        tenant = "acme"                 # who may use it; without it everybody
        state = "active"                # "staged": marks not yet; "retired": marks no more
        expires = 2027-01-01T00:00:00Z  # marks no longer than this; without it always
        file = "acme-2026.key"          # this is the default; as `filigrane keygen` writes it
        schemes = ["greenlist:delta=3"] # instead of the server's

        [tenants.acme]
        default = "acme-2026"           # instead of the server's
        tokens_sha256 = ["..."]         # of the bearer tokens by which a server knows the tenant

    acme-2026.key                       # only its owner may read it

Policy `default` marks what does not opt out, `opt-in` marks what asks for it, `enforce` marks
everything and refuses what cannot be marked or wants not to be. Secrets stay in the key files:
nothing of them is shown, and requests name keys by id.

A key whose id ends in a version, [keys."acme.chat@3"], may also be named without it, in requests
and as a default: "acme.chat" is then its active version. When a key has expired, `expired` says
what becomes of requests that would have got its mark: "refuse" them, or serve them "unmarked"
unless they ask for the mark.

A Keyring never changes. `serving.live` has the one that a folder holds now.
"""

import hashlib
import hmac
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, cast

from filigrane.errors import KeyFormatError, KeyringError, SchemeError
from filigrane.keys import Key
from filigrane.schemes import Scheme, from_tag

Policy = Literal["default", "opt-in", "enforce"]
POLICIES: Final = ("default", "opt-in", "enforce")
State = Literal["active", "staged", "retired"]
STATES: Final = ("active", "staged", "retired")
Expired = Literal["refuse", "unmarked"]
EXPIRED: Final = ("refuse", "unmarked")
FILE: Final = "keyring.toml"
ENVIRONMENT: Final = "FILIGRANE_KEYRING"
"""The variable by which an engine's processes find the folder."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_VERSIONED: Final = re.compile(r"(?P<name>.+)@(?P<version>[1-9][0-9]{0,5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key of a keyring: its id, the key, who may use it (None: everybody) and with what.

    state: "staged" is known to the server and marks nothing yet; expires: the moment from which it
    marks no more, aware of its zone, None if there is none.
    """

    id: str
    key: Key
    tenant: str | None
    state: State
    schemes: tuple[Scheme, ...]
    expires: datetime | None = None

    @property
    def active(self) -> bool:
        """Whether it is the state of the key to mark; its time may be over all the same."""
        return self.state == "active"

    def expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires

    @property
    def name(self) -> str:
        """Its id without the version: 'acme.chat' of 'acme.chat@3'."""
        versioned = _VERSIONED.fullmatch(self.id)
        return versioned["name"] if versioned else self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One customer of a server: the key that is used without asking, and the tokens' digests."""

    name: str
    default: str | None
    tokens_sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyring:
    """A server's keys, tenants and policy. Made by `Keyring.load`; shows no secret."""

    policy: Policy
    default: str | None
    entries: Mapping[str, Entry]
    tenants: Mapping[str, Tenant]
    expired: Expired = "refuse"

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, file: str = FILE) -> "Keyring":
        """Read a folder. Raises KeyringError, naming what is wrong and where; no secret in it."""
        path = Path(folder) / file
        try:
            # An editor's UTF-8 mark at the front of the file would be a syntax error.
            content = tomllib.loads(path.read_text("utf-8-sig"))
        except FileNotFoundError:
            raise KeyringError(
                f"{path} does not exist: name a folder that holds {FILE} and the key files "
                "(docs/serving.md shows one)."
            ) from None
        except NotADirectoryError:
            raise KeyringError(f"{folder} is a file: name the folder that holds {FILE}.") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise KeyringError(f"{path} cannot be read: {error}.") from None
        return _build(path, content)

    @classmethod
    def from_environment(cls) -> "Keyring | None":
        """The keyring of the folder that FILIGRANE_KEYRING names; None if it names none."""
        folder = os.environ.get(ENVIRONMENT)
        return cls.load(folder) if folder else None

    def entry(self, name: str) -> Entry | None:
        """The key of this id or, of a name without a version, the version that marks.

        Where no version is active it is the newest, whose state says why there is no mark.
        """
        found = self.entries.get(name)
        if found is not None:
            return found
        versions = [entry for entry in self.entries.values() if entry.name == name]
        return max(versions, key=lambda entry: (entry.active, _version(entry.id)), default=None)

    def tenant_of(self, token: str) -> str | None:
        """The tenant whose bearer token this is, or None."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = None
        for tenant in self.tenants.values():
            for known in tenant.tokens_sha256:
                if hmac.compare_digest(digest, known):
                    found = tenant.name
        return found

    @property
    def knows_tokens(self) -> bool:
        """Whether tenants have to show bearer tokens."""
        return any(tenant.tokens_sha256 for tenant in self.tenants.values())

    @property
    def digest(self) -> str:
        """What tells one keyring from another, 16 hex digits; says nothing of secrets.

        When keys expire does not enter it: a lease that is renewed changes nothing.
        """
        facts: list[object] = [self.policy, self.default, sorted(map(repr, self.tenants.values()))]
        facts.append(self.expired)
        for entry in sorted(self.entries.values(), key=lambda entry: entry.id):
            tags = [scheme.tag for scheme in entry.schemes]
            facts.append([entry.id, entry.key.fingerprint, entry.tenant, entry.state, tags])
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that some key may be used with, each once."""
        return tuple(
            {scheme.tag: scheme for e in self.entries.values() for scheme in e.schemes}.values()
        )


def _build(path: Path, content: dict[str, Any]) -> Keyring:
    known = {"policy", "schemes", "default", "expired", "keys", "tenants"}
    _only(path, "the file", content, known)
    policy = _one_of(path, "policy", content.get("policy", "default"), POLICIES)
    expired = _one_of(path, "expired", content.get("expired", "refuse"), EXPIRED)
    if (policy, expired) == ("enforce", "unmarked"):
        raise KeyringError(
            f'{path}: policy "enforce" marks everything, which expired = "unmarked" does not; '
            "change one of them."
        )
    shared = _schemes(path, "schemes", content.get("schemes", ["gumbel"]))
    tables = {name: _table(path, name, content.get(name, {})) for name in ("keys", "tenants")}
    tenants = {name: _tenant(path, name, table) for name, table in tables["tenants"].items()}
    entries = {id: _entry(path, id, table, shared) for id, table in tables["keys"].items()}
    # `[keys]` and nothing in it is said on purpose: a server whose leases hold no key.
    if not entries and "keys" not in content:
        raise KeyringError(f"{path} lists no key: add a table [keys.NAME].")
    for entry in entries.values():
        if entry.tenant is not None and tenants and entry.tenant not in tenants:
            raise KeyringError(
                f"{path}: key {entry.id} belongs to tenant {entry.tenant!r}, of whom there is no "
                f"table [tenants.{entry.tenant}]."
            )
    by_fingerprint: dict[str, str] = {}
    for entry in entries.values():
        other = by_fingerprint.setdefault(entry.key.fingerprint, entry.id)
        if other != entry.id:
            # Two names for one secret: a text of one would be found with the other's.
            raise KeyringError(f"{path}: keys {other} and {entry.id} are the same key.")
    keyring = Keyring(
        policy=cast(Policy, policy),
        default=_optional_text(path, "default", content.get("default")),
        entries=entries,
        tenants=tenants,
        expired=cast(Expired, expired),
    )
    _check_defaults(path, keyring)
    return keyring


def _check_defaults(path: Path, keyring: Keyring) -> None:
    wanted = [(None, keyring.default)] + [(t.name, t.default) for t in keyring.tenants.values()]
    digests: dict[str, str] = {}
    for tenant, id in wanted:
        if id is None:
            continue
        entry = keyring.entry(id)
        # A name without a version stands for whichever is active, and there may be none for a time.
        usable = entry is not None and (entry.active or id not in keyring.entries)
        if entry is None or not usable or entry.tenant not in (None, tenant):
            whose = "the server" if tenant is None else f"tenant {tenant}"
            raise KeyringError(
                f"{path}: the default of {whose}, {id!r}, is not an active key that it may use."
            )
    for known in keyring.tenants.values():
        for digest in known.tokens_sha256:
            if digests.setdefault(digest, known.name) != known.name:
                raise KeyringError(
                    f"{path}: tenants {digests[digest]} and {known.name} share a token."
                )


def _entry(path: Path, id: str, table: dict[str, Any], shared: tuple[Scheme, ...]) -> Entry:
    where = f"[keys.{id}]"
    _only(path, where, table, {"tenant", "state", "expires", "file", "schemes"})
    state = _one_of(path, f"{where} state", table.get("state", "active"), STATES)
    expires = table.get("expires")
    if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo is not None):
        raise KeyringError(
            f"{path}: {where} expires is a moment with its zone, such as 2027-01-01T00:00:00Z."
        )
    file = _optional_text(path, f"{where} file", table.get("file")) or f"{id}.key"
    try:
        key = Key.load(path.parent / file)
    except KeyFormatError as error:
        raise KeyringError(f"{where} of {path}: {error}") from None
    schemes = shared
    if "schemes" in table:
        schemes = _schemes(path, f"{where} schemes", table["schemes"])
    return Entry(
        id=id,
        key=key,
        tenant=_optional_text(path, f"{where} tenant", table.get("tenant")),
        state=cast(State, state),
        schemes=schemes,
        expires=None if expires is None else expires.astimezone(UTC),
    )


def _version(id: str) -> int:
    versioned = _VERSIONED.fullmatch(id)
    return int(versioned["version"]) if versioned else 0


def _tenant(path: Path, name: str, table: dict[str, Any]) -> Tenant:
    where = f"[tenants.{name}]"
    _only(path, where, table, {"default", "tokens_sha256"})
    digests = table.get("tokens_sha256", [])
    if not isinstance(digests, list) or not all(
        isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests
    ):
        raise KeyringError(
            f"{path}: {where} tokens_sha256 is a list of SHA-256 digests, 64 hex digits each "
            "(`filigrane engine token` makes a token and its digest)."
        )
    default = _optional_text(path, f"{where} default", table.get("default"))
    return Tenant(name=name, default=default, tokens_sha256=tuple(digests))


def _schemes(path: Path, where: str, value: object) -> tuple[Scheme, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise KeyringError(f'{path}: {where} is a list of schemes, such as ["gumbel"].')
    try:
        return tuple(from_tag(tag) for tag in value)
    except SchemeError as error:
        raise KeyringError(f"{path}: {where}: {error}") from None


def _table(path: Path, name: str, value: object) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise KeyringError(f"{path}: write {name} as tables, [{name}.NAME].")
    for id in value:
        if not _NAME.fullmatch(id):
            raise KeyringError(
                f"{path}: [{name}.{id!r}] is not a name: use 1 to 64 of A-Z a-z 0-9 . _ @ -, "
                "the first a letter or digit."
            )
    return value


def _one_of(path: Path, where: str, value: object, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise KeyringError(f"{path}: {where} is {value!r}; use one of {', '.join(known)}.")
    return value


def _optional_text(path: Path, where: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise KeyringError(f"{path}: {where} is a text, not {value!r}.")


def _only(path: Path, where: str, table: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        hint = ""
        if set(unknown) & {"policy", "default", "schemes"}:
            hint = " (What belongs to the whole file stands above its first table.)"
        # A misspelt `state` would leave a retired key in use.
        raise KeyringError(
            f"{path}: {where} has {', '.join(unknown)}; known are {', '.join(sorted(known))}.{hint}"
        )
