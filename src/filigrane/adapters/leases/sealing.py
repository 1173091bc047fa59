"""What a lease says, and the seal around it.

    Identity   an engine's X25519 key pair and its name; the private part stays on its host
    Lease      keys with states, for one engine, until a moment; in answer to one request
    seal       Lease -> compact JWE that only that engine opens
    unseal     back, or EndpointError that says whose lease it is, and why it does not count

Inside is JSON:

    {"v": 1, "tenant": "acme", "engine": "gpu-1", "nonce": "...", "issued_at": "...Z",
     "expires_at": "...Z", "keys": [{"id": "acme.chat@3", "state": "active", "mark": "gumbel:...",
     "kind": "scheme", "key": "filigrane-key-1:...", "acknowledged": true}]}

The nonce is the request's: a lease that was recorded and is played again answers nobody. Knows
nothing of HTTP and of folders.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, Self, cast, final

from filigrane.errors import EndpointError, KeyFormatError, MissingDependency
from filigrane.keys import _Sealed, _Secret
from filigrane.private_files import new_file, open_to_others, why_not

try:
    from joserfc import jwe
    from joserfc.errors import JoseError
    from joserfc.jwk import OKPKey
except ImportError as error:
    raise MissingDependency("leases need more packages: pip install 'filigrane[lease]'") from error

__all__ = [
    "NONCE",
    "Identity",
    "Lease",
    "LeasedKey",
    "check_public_key",
    "new_nonce",
    "seal",
    "unseal",
]

State = Literal["active", "staged"]
Kind = Literal["scheme", "profile"]

NONCE: Final = r"[A-Za-z0-9_-]{22,64}"
"""What a request's nonce looks like: base64url, of at least 16 bytes."""
ENGINE_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_KEY_ID: Final = re.compile(
    r"(?P<tenant>[a-z0-9][a-z0-9-]{0,23})\.[a-z0-9][a-z0-9-]{0,27}@[1-9][0-9]{0,5}"
)
LONGEST: Final = timedelta(days=31)
"""A lease that is good for longer is no lease."""

_ALGORITHMS: Final = ["ECDH-ES+A256KW", "A256GCM"]
_HEADER: Final = {"alg": _ALGORITHMS[0], "enc": _ALGORITHMS[1], "typ": "filigrane-lease"}
_MOST_BYTES: Final = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedKey:
    """One version of a key as an engine gets it.

    id: 'acme.chat@3'; state: "staged" marks nothing yet; kind, mark: a scheme's tag, or the tag of
    another tool's profile; key: its text; acknowledged: whether the service has seen this engine's
    proof that it has it.
    """

    id: str
    state: State
    kind: Kind
    mark: str
    key: _Secret[str]
    acknowledged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What an engine may mark with until `expires_at`; shows no key."""

    tenant: str
    engine: str
    nonce: str
    issued_at: datetime
    expires_at: datetime
    keys: tuple[LeasedKey, ...]

    @property
    def lifetime(self) -> timedelta:
        """For how long it is good; what an engine counts from its own clock."""
        return self.expires_at - self.issued_at


@final
class Identity(_Sealed):
    """An engine's name and X25519 key pair. Made by `generate`, kept in a file of mode 0600."""

    __slots__ = ("__held", "__name")

    __held: _Secret[OKPKey]
    __name: str

    @classmethod
    def __build(cls, name: str, key: _Secret[OKPKey]) -> Self:
        self = object.__new__(cls)
        object.__setattr__(self, "_Identity__name", name)
        object.__setattr__(self, "_Identity__held", key)
        return self

    @classmethod
    def generate(cls, name: str) -> Self:
        """A new identity for the engine of this name. Raises KeyFormatError for a bad name."""
        if not re.fullmatch(ENGINE_NAME, name):
            raise KeyFormatError(
                "an engine's name is 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit."
            )
        return cls.__build(name, _Secret(OKPKey.generate_key("X25519")))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file of `save`. Raises KeyFormatError if others may read it, or it is none."""
        shown = os.fspath(path)
        try:
            about = os.stat(path)
            content = json.loads(Path(path).read_text("ascii"))
            name, key = content["engine"], OKPKey.import_key(dict(content["key"]))
            whole = key.is_private and key.as_dict(private=False)["crv"] == "X25519"
        except FileNotFoundError:
            raise KeyFormatError(
                f"{shown} does not exist; `filigrane engine enrol` makes an identity."
            ) from None
        except OSError as error:
            raise KeyFormatError(f"{shown} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, JoseError):
            # No cause: it could quote the file.
            whole = False
        if not whole or not isinstance(name, str) or not re.fullmatch(ENGINE_NAME, name):
            raise KeyFormatError(f"{shown} is not the identity of an engine.")
        exposed = open_to_others(path, about)
        if exposed is not None:
            raise KeyFormatError(
                f"{shown}: {exposed}; and if somebody may have read it, enrol anew."
            )
        return cls.__build(name, _Secret(key))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a new file that only its owner can read. Raises KeyFormatError if it exists."""
        text = _Secret(
            json.dumps({"engine": self.__name, "key": self.__held.reveal().as_dict(private=True)})
        )
        try:
            with new_file(path) as out:
                out.write(text.reveal().encode("ascii") + b"\n")
        except OSError as error:
            raise KeyFormatError(f"{os.fspath(path)}: {why_not(error)}.") from None

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.__name

    @property
    def public_key(self) -> dict[str, str]:
        """The public part, a JWK: what the service is told when the engine is enrolled."""
        public = self.__held.reveal().as_dict(private=False)
        return {name: str(public[name]) for name in ("kty", "crv", "x")}

    @property
    def key_id(self) -> str:
        """The RFC 7638 thumbprint of the public part."""
        return str(self.__held.reveal().thumbprint())

    def decrypt(self, sealed: str) -> _Secret[bytes]:
        """What is inside of a JWE that was sealed to this identity; JoseError, ValueError."""
        found = jwe.decrypt_compact(sealed, self.__held.reveal(), algorithms=_ALGORITHMS)
        return _Secret(cast(bytes, found.plaintext))

    def __repr__(self) -> str:
        return f"<Identity {self.__name} {self.key_id}>"


def new_nonce() -> str:
    """A fresh nonce for one request."""
    return secrets.token_urlsafe(24)


def check_public_key(jwk: Mapping[str, object]) -> OKPKey:
    """The key to which leases are sealed. KeyFormatError unless it is a public X25519 JWK."""
    key = None
    with suppress(ValueError, KeyError, TypeError, AttributeError, JoseError):
        if set(jwk) <= {"kty", "crv", "x", "kid", "use", "alg"}:
            key = OKPKey.import_key(cast(Any, dict(jwk)))
    if key is None or key.is_private or jwk.get("crv") != "X25519":
        raise KeyFormatError(
            "this is not the public key of an engine: pass the line that `filigrane engine enrol` "
            'printed, {"kty": "OKP", "crv": "X25519", "x": "..."}, and nothing of its file.'
        )
    return key


def seal(lease: Lease, public_key: Mapping[str, object]) -> str:
    """A lease as compact JWE that only the holder of the private key opens; KeyFormatError."""
    recipient = check_public_key(public_key)
    content = {
        "v": 1,
        "tenant": lease.tenant,
        "engine": lease.engine,
        "nonce": lease.nonce,
        "issued_at": _stamp(lease.issued_at),
        "expires_at": _stamp(lease.expires_at),
        "keys": [
            {
                "id": key.id,
                "state": key.state,
                "kind": key.kind,
                "mark": key.mark,
                "key": key.key.reveal(),
                "acknowledged": key.acknowledged,
            }
            for key in lease.keys
        ],
    }
    inside = _Secret(json.dumps(content).encode())
    header = {**_HEADER, "kid": recipient.thumbprint()}
    return jwe.encrypt_compact(header, inside.reveal(), recipient, algorithms=_ALGORITHMS)


def unseal(sealed: str, identity: Identity, *, nonce: str) -> Lease:
    """Open a lease that answers the request with this nonce.

    Raises EndpointError, without anything of the lease, if it is sealed to another engine, damaged,
    made for another engine, or answers another request.
    """
    if len(sealed) > _MOST_BYTES:
        raise EndpointError("what the service sent is too large to be a lease.")
    try:
        addressee = jwe_header(sealed).get("kid")
        if addressee != identity.key_id:
            raise EndpointError(
                f"the lease is sealed to another identity than that of {identity.name} (its public "
                f"key is {identity.key_id}): the service knows this engine by another key. Enrol "
                "it with the line that `filigrane engine enrol` printed."
            )
        inside = identity.decrypt(sealed)
    except (JoseError, ValueError, TypeError, KeyError):
        raise EndpointError(
            "the lease cannot be opened: it is damaged, or was not sealed for this engine; "
            "nothing was changed."
        ) from None
    try:
        lease = _parse(json.loads(inside.reveal()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EndpointError(
            "the lease says something that this version of filigrane does not know; use the "
            "service's version here, too."
        ) from None
    if lease.nonce != nonce:
        raise EndpointError(
            "the lease answers another request than this one: somebody has put an old one back. "
            "It was refused; look at what stands between this engine and its service."
        )
    if lease.engine != identity.name:
        raise EndpointError(
            f"the lease is made out to engine {lease.engine!r}, this is {identity.name!r}: each "
            "engine has an identity of its own (`filigrane engine enrol`)."
        )
    return lease


def jwe_header(sealed: str) -> dict[str, Any]:
    """The public header of a compact JWE; ValueError or JoseError if it is none."""
    registry = jwe.JWERegistry(algorithms=_ALGORITHMS)
    return dict(jwe.extract_compact(sealed.encode("ascii"), registry).headers())


def _parse(content: Mapping[str, Any]) -> Lease:
    if content["v"] != 1:
        raise ValueError
    keys = tuple(
        LeasedKey(
            id=_text(key["id"]),
            state=_one_of(key["state"], ("active", "staged")),
            kind=_one_of(key["kind"], ("scheme", "profile")),
            mark=_text(key["mark"]),
            key=_Secret(_text(key["key"])),
            acknowledged=bool(key["acknowledged"]),
        )
        for key in content["keys"]
    )
    lease = Lease(
        tenant=_text(content["tenant"]),
        engine=_text(content["engine"]),
        nonce=_text(content["nonce"]),
        issued_at=_moment(content["issued_at"]),
        expires_at=_moment(content["expires_at"]),
        keys=keys,
    )
    if not timedelta(0) < lease.lifetime <= LONGEST or len({k.id for k in keys}) < len(keys):
        raise ValueError
    for key in keys:
        # Ids become names of files.
        parsed = _KEY_ID.fullmatch(key.id)
        if parsed is None or parsed["tenant"] != lease.tenant:
            raise ValueError
    return lease


def _text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 65_536:
        raise ValueError
    return value


def _one_of(value: object, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ValueError
    return value


def _moment(value: object) -> datetime:
    moment = datetime.fromisoformat(_text(value))
    if moment.tzinfo is None:
        raise ValueError
    return moment.astimezone(UTC)


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
