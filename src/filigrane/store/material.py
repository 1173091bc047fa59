"""How the keys of versions come to be in memory, and what of them may lie in a database.

A derived key is made of a tenant secret and a salt; an imported one is encrypted under a random
data key that the key management system wraps. This module knows neither tables nor states.

    sealed      12 random bytes || AES-256-GCM(data key, JSON {"form", "key", "opening"}), the
                version's context as associated data
    context     "filigrane/v1/imported-key" || lp(version id)
"""

import base64
import collections
import json
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Final, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from filigrane.custody.hierarchy import (
    SALT_BYTES,
    KeySpec,
    TenantSecret,
    commitment,
    derive,
    imported_commitment,
    key_id,
    tenant_message,
)
from filigrane.errors import KeyFormatError, StoreDamaged
from filigrane.foreign import ForeignKey, KeyForm
from filigrane.foreign import from_tag as profile_from_tag
from filigrane.keys import Key, _lp, _Secret
from filigrane.kms.base import KeyManagement

__all__ = ["Imported", "Material", "new_salt", "open_sealed", "seal"]

_NONCE_BYTES: Final = 12
_DATA_KEY_BYTES: Final = 32
_SECRETS: Final = 1024
_OWN_FORM: Final = "filigrane"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """An imported key as it may be stored, and what is published of it."""

    wrapped_key: bytes
    sealed: bytes
    commitment: str


@final
class Material:
    """Keys from a key management system. Tenant secrets stay in memory for their lifetime."""

    def __init__(self, kms: KeyManagement, secret_lifetime_s: float) -> None:
        self.kms = kms
        self._lifetime_s = secret_lifetime_s
        self._held: collections.OrderedDict[tuple[str, int], tuple[float, TenantSecret]] = (
            collections.OrderedDict()
        )
        self._turn = threading.Lock()

    def root_version(self) -> int:
        """The current version of the root. Raises KmsUnavailable or KmsError."""
        return max(self.kms.versions())

    def secret(self, tenant: str, root_version: int) -> TenantSecret:
        """A tenant's secret under a version of the root. Raises KmsUnavailable or KmsError.

        When the system does not answer, what is in memory serves to the end of its lifetime, which
        is not extended by use.
        """
        name = (tenant, root_version)
        with self._turn:
            known = self._held.get(name)
            if known is not None and time.monotonic() < known[0]:
                self._held.move_to_end(name)
                return known[1]
            self._held.pop(name, None)
        made = TenantSecret.of(self.kms.mac(root_version, tenant_message(tenant)))
        with self._turn:
            self._held[name] = (time.monotonic() + self._lifetime_s, made)
            while len(self._held) > _SECRETS:
                self._held.popitem(last=False)
        return made

    def forget(self) -> None:
        """Let go of all tenant secrets."""
        with self._turn:
            self._held.clear()

    def derived(self, spec: KeySpec, number: int, root_version: int, salt: bytes) -> Key:
        """The key of a derived version, before a profile takes its numbers from it."""
        return derive(self.secret(spec.tenant, root_version), spec, number, salt)

    def import_sealed(self, spec: KeySpec, number: int, key: Key | ForeignKey) -> Imported:
        """Encrypt an imported key for storage. Raises KeyFormatError if it does not fit the spec,
        KmsUnavailable or KmsError.
        """
        require_fitting(spec, key)
        opening = _Secret(secrets.token_bytes(32))
        version_id = key_id(spec.tenant, spec.name, number)
        if isinstance(key, Key):
            key = _renamed(key, version_id)
        form = _OWN_FORM if isinstance(key, Key) else key.form.value
        payload = _Secret(
            json.dumps(
                {"form": form, "key": key.export_text(), "opening": opening.reveal().hex()}
            ).encode("ascii")
        )
        context = _context(version_id)
        data_key = _Secret(secrets.token_bytes(_DATA_KEY_BYTES))
        return Imported(
            wrapped_key=self.kms.wrap(data_key, context),
            sealed=seal(data_key, payload, context),
            commitment=imported_commitment(key, opening.reveal()),
        )

    def imported(
        self, spec: KeySpec, number: int, wrapped_key: bytes, sealed: bytes
    ) -> tuple[Key | ForeignKey, str]:
        """The key that was sealed, named as its version, and its commitment."""
        version_id = key_id(spec.tenant, spec.name, number)
        context = _context(version_id)
        held = open_sealed(self.kms.unwrap(wrapped_key, context), sealed, context)
        payload = _Secret(json.loads(held.reveal()))
        form = payload.reveal()["form"]
        opening = bytes.fromhex(payload.reveal()["opening"])
        if form != _OWN_FORM:
            numbers = ForeignKey.from_text(payload.reveal()["key"], KeyForm(form), version_id)
            return numbers, imported_commitment(numbers, opening)
        key = Key.from_text(payload.reveal()["key"])
        return key, imported_commitment(key, opening)

    def key(self, spec: KeySpec, key: Key) -> Key | ForeignKey:
        """What marks: the derived key itself, or the numbers that a profile has of it."""
        if spec.profile is None:
            return key
        return ForeignKey.derive(key, profile_from_tag(spec.profile))


def commitment_of(key: Key) -> str:
    """What is published of a derived version."""
    return commitment(key)


def new_salt() -> bytes:
    """A salt of 32 random bytes."""
    return secrets.token_bytes(SALT_BYTES)


def seal(data_key: _Secret[bytes], data: _Secret[bytes], context: bytes) -> bytes:
    """AES-256-GCM under a data key, a random nonce in front."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(data_key.reveal()).encrypt(nonce, data.reveal(), context)


def open_sealed(data_key: _Secret[bytes], sealed: bytes, context: bytes) -> _Secret[bytes]:
    """What `seal` encrypted; StoreDamaged if it was altered or belongs elsewhere."""
    nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        return _Secret(AESGCM(data_key.reveal()).decrypt(nonce, rest, context))
    except (InvalidTag, ValueError):
        raise StoreDamaged(
            "what lies encrypted in the database was altered or moved; restore it from a backup."
        ) from None


def require_fitting(spec: KeySpec, key: Key | ForeignKey) -> None:
    """Raise KeyFormatError unless a key is of the kind that a spec marks with."""
    if spec.profile is not None:
        if not isinstance(key, ForeignKey):
            raise KeyFormatError(
                f"{spec.profile} marks with another tool's key, not with a filigrane key; read it "
                "with ForeignKey.load."
            )
        profile_from_tag(spec.profile).require_key(key)
    elif not isinstance(key, Key):
        raise KeyFormatError(f"{spec.scheme} marks with a filigrane key; read it with Key.load.")
    elif key.slots != spec.slots:
        raise KeyFormatError(f"this key has {key.slots} slots; say so in its description too.")


def _renamed(key: Key, name: str) -> Key:
    # The name is no part of what marks; the text form binds it all the same, so it is made anew.
    body = _Secret(key.export_text().rpartition(":")[2].upper())
    padding = "=" * (-len(body.reveal()) % 8)
    secret = _Secret(base64.b32decode(body.reveal() + padding)[:32])
    return Key._of_secret(name, key.slots, secret)


def _context(version_id: str) -> bytes:
    return b"filigrane/v1/imported-key" + _lp(version_id.encode("ascii"))
