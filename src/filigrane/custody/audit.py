"""The audit log of a tenant: records in a hash chain, checkpoints, and offline verification.

    canonical   RFC 8785 JSON of a record: sorted names, no white space, UTF-8; no floats anywhere
    genesis     SHA-256("filigrane/v1/audit/genesis" || lp(tenant))
    hash i      SHA-256("filigrane/v1/audit/record" || hash i-1 || canonical(record i)); before the
                first record stands genesis
    root        RFC 6962 tree whose leaves are the hashes (`filigrane.custody.merkle`)
    checkpoint  Ed25519 over a note of C2SP's tlog-checkpoint form, so that others' witnesses can
                sign it too: lines of origin "filigrane/<tenant>", size, base64 root, "head <hex>",
                "at <time>"

The signing keys are Ed25519 seeds that a key management system's MAC makes of a purpose, so that
they need no storage: kid "log-<r>" or "receipt-<r>", r the root's version.

A chain shows that a record was changed, dropped or moved. What it cannot show is that the end was
cut or the whole written anew: for that somebody outside has to keep a checkpoint, which
`verify_log` takes as `trusted`.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, BinaryIO, Final, Never, Self, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from filigrane.custody.hierarchy import check_name
from filigrane.custody.merkle import Tree
from filigrane.errors import AuditError, KeyFormatError
from filigrane.keys import _lp, _Sealed, _Secret

__all__ = [
    "MAX_RECORD_BYTES",
    "SIGN_LOG",
    "SIGN_RECEIPT",
    "Checkpoint",
    "Fact",
    "LogReport",
    "Record",
    "Signer",
    "canonical",
    "checkpoint",
    "genesis",
    "link",
    "note",
    "public_key",
    "read_lines",
    "sign_checkpoint",
    "signer",
    "timestamp",
    "verify_checkpoint",
    "verify_log",
]

Fact = str | int | bool | None | list[str]
"""What a record may say; integers within +-(2**53 - 1), so that every reader of JSON agrees."""

SIGN_LOG: Final = b"filigrane/v1/sign/log"
"""The message whose MAC under root version r is the seed of the key log-<r>."""
SIGN_RECEIPT: Final = b"filigrane/v1/sign/receipt"
"""The message whose MAC under root version r is the seed of the key receipt-<r>."""

MAX_RECORD_BYTES: Final = 65_536
_GENESIS: Final = b"filigrane/v1/audit/genesis"
_RECORD: Final = b"filigrane/v1/audit/record"
_MAX_INTEGER: Final = 2**53 - 1
_AT: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")
_KIND: Final = re.compile(r"[a-z][a-z0-9-]{0,31}(\.[a-z0-9][a-z0-9-]{0,31}){0,3}")
_FACT: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_ACTOR: Final = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_LOG_KID: Final = re.compile(r"log-[1-9][0-9]{0,8}")
_KID: Final = re.compile(r"(log|receipt)-[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One entry of a tenant's log. Raises AuditError for what a log cannot hold.

    index: 0, 1, ... within the tenant; at: UTC, RFC 3339 with milliseconds and Z (`timestamp`);
    actor: who did it, 1 to 200 characters; kind: what, as 'key.create'; facts: names of a-z 0-9 _
    and values of type Fact. Never put a text, a score, a secret or a token into a fact.
    """

    tenant: str
    index: int
    at: str
    actor: str
    kind: str
    facts: Mapping[str, Fact]

    def __post_init__(self) -> None:
        _require_tenant(self.tenant)
        _require_count("a record's index", self.index)
        _require_time(self.at)
        if not _matches(_ACTOR, self.actor):
            raise AuditError("a record's actor has 1 to 200 characters, none of them control.")
        if not _matches(_KIND, self.kind):
            raise AuditError("a record's kind is words of a-z 0-9 - joined by dots: key.create.")
        if not isinstance(self.facts, Mapping):
            raise AuditError("a record's facts are a mapping of names to values.")
        facts = {_fact_name(name): _fact(name, value) for name, value in self.facts.items()}
        object.__setattr__(self, "facts", MappingProxyType(facts))
        if len(canonical(self)) > MAX_RECORD_BYTES:
            raise AuditError(f"a record has at most {MAX_RECORD_BYTES} bytes; say less in facts.")

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {
            "tenant": self.tenant,
            "index": self.index,
            "at": self.at,
            "actor": self.actor,
            "kind": self.kind,
            "facts": dict(self.facts),
        }

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The record of a JSON object; AuditError for missing, other or ill-typed members."""
        return cls(**_members(value, "record", cls.__slots__))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a log was at one moment, signed. Raises AuditError for what cannot be one.

    size: records; head: hash of the last one (genesis of an empty log), 64 hex digits; root: of
    the tree, likewise; at: as of Record; key_id: 'log-<r>'; signature: base64url, no padding.
    """

    tenant: str
    size: int
    head: str
    root: str
    at: str
    key_id: str
    signature: str

    def __post_init__(self) -> None:
        _require_tenant(self.tenant)
        _require_count("a checkpoint's size", self.size)
        _require_time(self.at)
        for value in (self.head, self.root):
            if not _matches(_HASH, value):
                raise AuditError("a checkpoint's head and root are 64 hex digits in lower case.")
        # A receipt's key must not be able to vouch for a log.
        if not _matches(_LOG_KID, self.key_id):
            raise AuditError("a checkpoint is signed by a key named log-1, log-2, ...")
        if len(_unbase64(self.signature, "a checkpoint's signature")) != 64:
            raise AuditError("a checkpoint's signature has 64 bytes.")

    @property
    def signed(self) -> bytes:
        """The bytes that the signature covers: a C2SP checkpoint."""
        return _body(self.tenant, self.size, self.head, self.root, self.at)

    def to_json(self) -> dict[str, Any]:
        """The checkpoint as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The checkpoint of a JSON object; AuditError for missing, other or ill-typed members."""
        return cls(**_members(value, "checkpoint", cls.__slots__))


@final
class Signer(_Sealed):
    """An Ed25519 key with its name; made by `signer`, shows nothing."""

    __slots__ = ("__held", "__key_id", "__public")

    __held: _Secret[Ed25519PrivateKey]
    __key_id: str
    __public: bytes

    def __new__(cls) -> Self:
        """Refuse: a signer comes from a key management system's MAC."""
        raise TypeError("make a signer with filigrane.custody.audit.signer(mac, key_id)")

    @classmethod
    def _of(cls, mac: _Secret[bytes], key_id: str) -> Self:
        if not _KID.fullmatch(key_id):
            raise KeyFormatError("a signing key is named log-<r> or receipt-<r>.")
        if len(mac.reveal()) != 32:
            raise KeyFormatError("a signing key's seed has 32 bytes; the MAC must be HMAC-SHA256.")
        held = _Secret(Ed25519PrivateKey.from_private_bytes(mac.reveal()))
        self = object.__new__(cls)
        object.__setattr__(self, "_Signer__held", held)
        object.__setattr__(self, "_Signer__key_id", key_id)
        public = held.reveal().public_key().public_bytes_raw()
        object.__setattr__(self, "_Signer__public", public)
        return self

    @property
    def key_id(self) -> str:
        """The key's name, 'log-3'."""
        return self.__key_id

    def sign(self, data: bytes) -> bytes:
        """The signature, 64 bytes."""
        return self.__held.reveal().sign(data)

    def public_jwk(self) -> dict[str, str]:
        """The public key as RFC 8037 writes it, with kid, alg and use."""
        return {
            "kty": "OKP",
            "crv": "Ed25519",
            "x": _base64(self.__public),
            "kid": self.__key_id,
            "alg": "EdDSA",
            "use": "sig",
        }

    def __repr__(self) -> str:
        return f"<Signer {self.__key_id}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogReport:
    """What `verify_log` found in order.

    n_covered: records that some checkpoint fixes; what follows them is in the chain only.
    n_backwards: records with an earlier time than the one before: the clock was set back.
    """

    tenant: str
    n_records: int
    n_checkpoints: int
    n_covered: int
    n_backwards: int
    head: str
    root: str
    first_at: str | None
    last_at: str | None


def timestamp(moment: datetime) -> str:
    """A moment as records have it; raises ValueError for one without a time zone."""
    if moment.tzinfo is None:
        raise ValueError("this moment has no time zone; use datetime.now(UTC)")
    utc = moment.astimezone(UTC).replace(tzinfo=None)
    return utc.isoformat(timespec="milliseconds") + "Z"


def genesis(tenant: str) -> bytes:
    """What the first record of a tenant's log is linked to, 32 bytes."""
    _require_tenant(tenant)
    return hashlib.sha256(_GENESIS + _lp(tenant.encode("ascii"))).digest()


def canonical(record: Record) -> bytes:
    """A record's one form in bytes."""
    return _canonical(record.to_json())


def link(previous: bytes, record: Record) -> bytes:
    """The hash of a record that follows the one with hash `previous` (or genesis), 32 bytes."""
    if len(previous) != 32:
        raise AuditError("a record is linked to a hash of 32 bytes.")
    return hashlib.sha256(_RECORD + previous + canonical(record)).digest()


def signer(mac: _Secret[bytes], key_id: str) -> Signer:
    """The signing key whose seed is a MAC of SIGN_LOG or SIGN_RECEIPT; KeyFormatError otherwise."""
    return Signer._of(mac, key_id)


def checkpoint(tenant: str, hashes: Sequence[bytes], at: str, signer: Signer) -> Checkpoint:
    """The signed checkpoint of a log whose records have these hashes (link), oldest first."""
    head = hashes[-1] if hashes else genesis(tenant)
    return sign_checkpoint(
        tenant, size=len(hashes), head=head, root=Tree(hashes).root(), at=at, signer=signer
    )


def sign_checkpoint(
    tenant: str, *, size: int, head: bytes, root: bytes, at: str, signer: Signer
) -> Checkpoint:
    """The checkpoint of a log whose head and root the caller knows (from a `merkle.Tree`)."""
    body = _body(tenant, size, head.hex(), root.hex(), at)
    return Checkpoint(
        tenant=tenant,
        size=size,
        head=head.hex(),
        root=root.hex(),
        at=at,
        key_id=signer.key_id,
        signature=_base64(signer.sign(body)),
    )


def public_key(jwks: Mapping[str, Any], key_id: str) -> Ed25519PublicKey:
    """The key of this name in a JWK set (RFC 7517); AuditError if it has none, or not Ed25519."""
    keys = jwks.get("keys")
    if not isinstance(keys, list):
        raise AuditError('this is no set of keys; it is an object with a list "keys" (RFC 7517).')
    found = [key for key in keys if isinstance(key, Mapping) and key.get("kid") == key_id]
    if len(found) != 1:
        raise AuditError(
            f"the set of keys has {len(found)} keys named {key_id} instead of one; fetch it again "
            "from the service's /.well-known/jwks.json."
        )
    if found[0].get("kty") != "OKP" or found[0].get("crv") != "Ed25519":
        raise AuditError(f"the key {key_id} is not an Ed25519 key.")
    raw = _unbase64(found[0].get("x"), f"the key {key_id}")
    if len(raw) != 32:
        raise AuditError(f"the key {key_id} has {len(raw)} bytes instead of 32.")
    return Ed25519PublicKey.from_public_bytes(raw)


def verify_checkpoint(checkpoint: Checkpoint, jwks: Mapping[str, Any]) -> None:
    """Raise AuditError unless a checkpoint was signed by its key, as the set of keys has it."""
    key = public_key(jwks, checkpoint.key_id)
    try:
        key.verify(_unbase64(checkpoint.signature, "a signature"), checkpoint.signed)
    except InvalidSignature:
        raise AuditError(
            f"the checkpoint over {checkpoint.size} records of {checkpoint.tenant} is not signed "
            f"by {checkpoint.key_id}: it was altered, or the set of keys is another service's."
        ) from None


def note(checkpoint: Checkpoint, jwks: Mapping[str, Any]) -> str:
    """The checkpoint as a C2SP signed note, for witnesses; verified first (AuditError)."""
    verify_checkpoint(checkpoint, jwks)
    name = f"filigrane/{checkpoint.tenant}"
    raw = public_key(jwks, checkpoint.key_id).public_bytes_raw()
    key_hash = hashlib.sha256(name.encode("ascii") + b"\n\x01" + raw).digest()[:4]
    signature = base64.b64encode(key_hash + _unbase64(checkpoint.signature, "a signature"))
    return f"{checkpoint.signed.decode('ascii')}\n— {name} {signature.decode('ascii')}\n"


def read_lines(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The objects of an export, one a line; AuditError naming a line that is none.

    A name that occurs twice in an object, and numbers with a fraction, are refused: two readers
    could understand two things.
    """
    number = 0
    while line := stream.readline(2 * MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > 2 * MAX_RECORD_BYTES:
            raise AuditError(f"line {number} of the log is too long to be a record.")
        try:
            value = json.loads(
                line,
                object_pairs_hook=_unique,
                parse_float=_no_number,
                parse_constant=_no_number,
            )
        except (ValueError, RecursionError) as error:
            said = f": {error}" if isinstance(error, AuditError) else ""
            raise AuditError(f"line {number} of the log is not a JSON object{said}.") from None
        if not isinstance(value, dict):
            raise AuditError(f"line {number} of the log is not a JSON object.")
        yield value


def verify_log(
    lines: Iterable[Mapping[str, Any]],
    jwks: Mapping[str, Any],
    trusted: Checkpoint | None = None,
) -> LogReport:
    """Check a tenant's whole log, as exported; raises AuditError that names the first bad record.

    lines: objects {"record": ..., "hash": hex} in order, {"checkpoint": ...} anywhere after its
    last record, and {"jwks": ...}, which is skipped: keys inside the file would prove nothing.
    jwks: the service's public keys, from elsewhere. trusted: a checkpoint that was kept before; the
    log must extend it. Without one nobody can tell that the end of a log was cut together with its
    last checkpoints, or that all of it was written anew with the service's key.
    """
    tree, hashes = Tree(), list[bytes]()
    tenant: str | None = None
    first_at: str | None = None
    last_at: str | None = None
    n_checkpoints = n_covered = n_backwards = 0
    head = b""

    def fits(point: Checkpoint) -> None:
        verify_checkpoint(point, jwks)
        if tenant is not None and point.tenant != tenant:
            raise AuditError(f"a checkpoint of {point.tenant} stands in the log of {tenant}.")
        if point.size > len(hashes):
            raise AuditError(
                f"record {len(hashes)} is missing: a checkpoint of {point.at} covers {point.size} "
                "records, the log was cut."
            )
        there = hashes[point.size - 1] if point.size else genesis(point.tenant)
        if there.hex() != point.head or tree.root(point.size).hex() != point.root:
            raise AuditError(
                f"the first {point.size} records are not those that the checkpoint of {point.at} "
                "covers: the log was forked or written anew."
            )

    for line in lines:
        if "jwks" in line:
            continue
        if "checkpoint" in line:
            _members(line, "checkpoint line", ("checkpoint",))
            point = Checkpoint.from_json(line["checkpoint"])
            tenant = tenant or point.tenant
            fits(point)
            n_checkpoints += 1
            n_covered = max(n_covered, point.size)
            continue
        index = len(hashes)
        try:
            _members(line, "line", ("record", "hash"))
            record = Record.from_json(line["record"])
        except AuditError as error:
            raise AuditError(f"record {index} is damaged: {error}") from None
        tenant = tenant or record.tenant
        if record.tenant != tenant:
            raise AuditError(f"record {index} is of {record.tenant}, in the log of {tenant}.")
        if record.index != index:
            raise AuditError(
                f"record {index} is missing or out of place: the line says {record.index}."
            )
        head = link(head or genesis(tenant), record)
        if line["hash"] != head.hex():
            raise AuditError(
                f"record {index} is not what was logged, or follows another record: its hash "
                "does not fit."
            )
        if last_at is not None and record.at < last_at:
            n_backwards += 1
        first_at, last_at = first_at or record.at, record.at
        hashes.append(head)
        tree.append(head)
    if trusted is not None:
        tenant = tenant or trusted.tenant
        fits(trusted)
        n_covered = max(n_covered, trusted.size)
    if tenant is None:
        raise AuditError("this log holds neither a record nor a checkpoint.")
    return LogReport(
        tenant=tenant,
        n_records=len(hashes),
        n_checkpoints=n_checkpoints,
        n_covered=n_covered,
        n_backwards=n_backwards,
        head=(head or genesis(tenant)).hex(),
        root=tree.root().hex(),
        first_at=first_at,
        last_at=last_at,
    )


def _canonical(value: dict[str, Any]) -> bytes:
    # With ASCII names, and no floats or great integers, this is RFC 8785.
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise AuditError("a record holds half of a surrogate pair, which is no text.") from None


def _body(tenant: str, size: int, head: str, root: str, at: str) -> bytes:
    encoded = base64.b64encode(bytes.fromhex(root)).decode("ascii")
    return f"filigrane/{tenant}\n{size}\n{encoded}\nhead {head}\nat {at}\n".encode("ascii")


def _members(value: object, what: str, names: Iterable[str]) -> dict[str, Any]:
    """A JSON object with exactly these members."""
    expected = set(names)
    if not isinstance(value, Mapping) or set(value) != expected:
        raise AuditError(f"a {what} is an object with {', '.join(sorted(expected))}.")
    return dict(value)


def _require_tenant(tenant: object) -> None:
    try:
        if not isinstance(tenant, str):
            raise KeyFormatError("a name is text.")
        check_name("tenant", tenant)
    except KeyFormatError as error:
        raise AuditError(str(error)) from None


def _require_count(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_INTEGER:
        raise AuditError(f"{what} is an integer from 0 on.")


def _require_time(at: object) -> None:
    valid = isinstance(at, str) and bool(_AT.fullmatch(at))
    if valid:
        try:
            datetime.fromisoformat(str(at))
        except ValueError:
            valid = False
    if not valid:
        raise AuditError("a time is UTC with milliseconds, as 2026-11-02T09:30:00.000Z.")


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _fact_name(name: str) -> str:
    if not _matches(_FACT, name):
        raise AuditError("a fact's name is 1 to 64 of a-z 0-9 _, the first a letter.")
    return name


def _fact(name: str, value: object) -> Fact:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and abs(value) <= _MAX_INTEGER:
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    raise AuditError(
        f"fact {name} is a {type(value).__name__}; a fact is text, an integer within 2**53, true, "
        "false, nothing or a list of texts."
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise AuditError("a name occurs twice")
    return made


def _no_number(text: str) -> Never:
    raise AuditError("a log holds whole numbers only")


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _unbase64(text: object, what: str) -> bytes:
    """The bytes of base64url without padding, in its one form."""
    if not isinstance(text, str) or not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        raise AuditError(f"{what} is base64url without padding.")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise AuditError(f"{what} is base64url without padding.") from None
    if _base64(data) != text:
        raise AuditError(f"{what} is base64url without padding.")
    return data
