"""Checkpoints: what a tenant's log was at one moment, signed; and the keys that sign it.

    root        RFC 6962 tree whose leaves are the hashes of records (`filigrane.custody.merkle`)
    checkpoint  Ed25519 over a note of C2SP's tlog-checkpoint form, so that others' witnesses can
                sign it too: lines of origin "filigrane/<tenant>", size, base64 root, "head <hex>",
                "at <time>"

The signing keys are Ed25519 seeds that a key management system's MAC makes of a purpose, so that
they need no storage: kid "log-<r>" or "receipt-<r>", r the root's version. Knows nothing of what
the records say.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from filigrane.custody.chain import genesis
from filigrane.custody.forms import (
    base64url,
    matches,
    members,
    require_count,
    require_tenant,
    require_time,
    unbase64url,
)
from filigrane.custody.merkle import Tree
from filigrane.errors import AuditError, KeyFormatError
from filigrane.keys import _Sealed, _Secret

__all__ = [
    "SIGN_LOG",
    "SIGN_RECEIPT",
    "Checkpoint",
    "Signer",
    "checkpoint",
    "note",
    "public_key",
    "sign_checkpoint",
    "signer",
    "verify_checkpoint",
]

SIGN_LOG: Final = b"filigrane/v1/sign/log"
"""The message whose MAC under root version r is the seed of the key log-<r>."""
SIGN_RECEIPT: Final = b"filigrane/v1/sign/receipt"
"""The message whose MAC under root version r is the seed of the key receipt-<r>."""

_HASH: Final = re.compile(r"[0-9a-f]{64}")
_LOG_KID: Final = re.compile(r"log-[1-9][0-9]{0,8}")
_KID: Final = re.compile(r"(log|receipt)-[1-9][0-9]{0,8}")


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
        require_tenant(self.tenant)
        require_count("a checkpoint's size", self.size)
        require_time(self.at)
        for value in (self.head, self.root):
            if not matches(_HASH, value):
                raise AuditError("a checkpoint's head and root are 64 hex digits in lower case.")
        # A receipt's key must not be able to vouch for a log.
        if not matches(_LOG_KID, self.key_id):
            raise AuditError("a checkpoint is signed by a key named log-1, log-2, ...")
        if len(unbase64url(self.signature, "a checkpoint's signature")) != 64:
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
        return cls(**members(value, "checkpoint", cls.__slots__))


@final
class Signer(_Sealed):
    """An Ed25519 key with its name; made by `signer`, shows nothing."""

    __slots__ = ("__held", "__key_id", "__public")

    __held: _Secret[Ed25519PrivateKey]
    __key_id: str
    __public: bytes

    def __new__(cls) -> Self:
        """Refuse: a signer comes from a key management system's MAC."""
        raise TypeError("make a signer with filigrane.custody.checkpoints.signer(mac, key_id)")

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
            "x": base64url(self.__public),
            "kid": self.__key_id,
            "alg": "EdDSA",
            "use": "sig",
        }

    def __repr__(self) -> str:
        return f"<Signer {self.__key_id}>"


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
        signature=base64url(signer.sign(body)),
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
    raw = unbase64url(found[0].get("x"), f"the key {key_id}")
    if len(raw) != 32:
        raise AuditError(f"the key {key_id} has {len(raw)} bytes instead of 32.")
    return Ed25519PublicKey.from_public_bytes(raw)


def verify_checkpoint(checkpoint: Checkpoint, jwks: Mapping[str, Any]) -> None:
    """Raise AuditError unless a checkpoint was signed by its key, as the set of keys has it."""
    key = public_key(jwks, checkpoint.key_id)
    try:
        key.verify(unbase64url(checkpoint.signature, "a signature"), checkpoint.signed)
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
    signature = base64.b64encode(key_hash + unbase64url(checkpoint.signature, "a signature"))
    return f"{checkpoint.signed.decode('ascii')}\n— {name} {signature.decode('ascii')}\n"


def _body(tenant: str, size: int, head: str, root: str, at: str) -> bytes:
    encoded = base64.b64encode(bytes.fromhex(root)).decode("ascii")
    return f"filigrane/{tenant}\n{size}\n{encoded}\nhead {head}\nat {at}\n".encode("ascii")
