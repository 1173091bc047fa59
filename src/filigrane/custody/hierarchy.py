"""Where the keys of a provider come from: one root, tenants, keys and their versions, users.

    root            32 bytes in a key management system, several versions r; never leaves it where
                    the system computes the MAC
    tenant secret   HMAC-SHA256(root r, "filigrane/v1/tenant" || lp(tenant))          memory only
    key version     Expand(tenant secret, "filigrane/v1/tenant-key" || lp(name) || lp(model)
                           || lp(tokenizer) || lp(mark) || u32be(version) || salt, 32)
    users           as of every Key (filigrane.keys)

with lp(x) = u16be(len(x)) || x and absent texts empty. The salt is 32 random bytes, kept in the
database; it is no secret, and without it nobody can make the key again: erasing it destroys the
version. The result is an ordinary Key, named "tenant.name@version".

    commitment      Expand(key, "filigrane/v1/commitment", 32), published before first use. It
                    binds the provider to the key (HMAC-SHA256 has no collisions that anyone can
                    find) and tells nothing about it (the key has 256 bits).

Imported keys may have few bits, so what is published of one is a hash of it and of a random opening
that is wrapped together with it: `imported_commitment`.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Final, Literal, Self, final

from filigrane.errors import KeyFormatError
from filigrane.foreign import ForeignKey
from filigrane.foreign import from_tag as profile_from_tag
from filigrane.keys import MAX_SLOTS, Key, _expand, _lp, _Sealed, _Secret
from filigrane.schemes import from_tag

__all__ = [
    "KeySpec",
    "TenantSecret",
    "check_name",
    "commitment",
    "derive",
    "imported_commitment",
    "key_id",
    "tenant_message",
]

Source = Literal["derived", "imported"]
MAX_VERSION: Final = 999_999
SALT_BYTES: Final = 32
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")
_KEY: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,27}")
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,127}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def check_name(kind: Literal["tenant", "key", "model"], name: str) -> None:
    """Raise KeyFormatError, with the rule, unless this can be the name of such a thing."""
    pattern, rule = {
        "tenant": (_TENANT, "1 to 24 of a-z 0-9 -, the first no dash"),
        "key": (_KEY, "1 to 28 of a-z 0-9 -, the first no dash"),
        "model": (_MODEL, "1 to 128 of A-Z a-z 0-9 . _ / : @ + -, the first a letter or digit"),
    }[kind]
    if not pattern.fullmatch(name):
        raise KeyFormatError(f"this cannot be the name of a {kind}; use {rule}.")


def key_id(tenant: str, name: str, version: int) -> str:
    """What a version of a key is called everywhere: 'acme.chat@3'."""
    return f"{tenant}.{name}@{version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySpec:
    """What a key is for; all its versions share it. Raises KeyFormatError or SchemeError.

    scheme: a scheme's tag, or profile: the tag of another tool's mark (filigrane.foreign), one of
    them; model: the model that marks with it; tokenizer_sha256: of that model's tokenizer, 64 hex
    digits, or None where texts come as ids; slots: 1 to 64, as of Key.generate; source: "derived"
    from the root, or "imported" from elsewhere.
    """

    tenant: str
    name: str
    model: str
    scheme: str | None = None
    profile: str | None = None
    tokenizer_sha256: str | None = None
    slots: int = 8
    source: Source = "derived"

    def __post_init__(self) -> None:
        check_name("tenant", self.tenant)
        check_name("key", self.name)
        check_name("model", self.model)
        if (self.scheme is None) == (self.profile is None):
            raise KeyFormatError(
                "a key marks with one thing: a scheme, or another tool's profile; name one of them."
            )
        # Written in full, so that a default that changes one day changes no key.
        if self.scheme is not None:
            object.__setattr__(self, "scheme", from_tag(self.scheme).tag)
        if self.profile is not None:
            object.__setattr__(self, "profile", profile_from_tag(self.profile).tag)
        if self.tokenizer_sha256 is not None and not _DIGEST.fullmatch(self.tokenizer_sha256):
            raise KeyFormatError("tokenizer_sha256 is 64 hex digits in lower case.")
        if isinstance(self.slots, bool) or not 1 <= self.slots <= MAX_SLOTS:
            raise KeyFormatError(f"slots are 1 to {MAX_SLOTS}.")
        if self.source not in ("derived", "imported"):
            raise KeyFormatError("a key's source is derived or imported.")

    @property
    def mark(self) -> str:
        """The tag of what it marks with, scheme or profile."""
        tag = self.scheme or self.profile
        assert tag is not None
        return tag


def tenant_message(tenant: str) -> bytes:
    """What a key management system is asked to MAC for a tenant's secret."""
    check_name("tenant", tenant)
    return b"filigrane/v1/tenant" + _lp(tenant.encode("ascii"))


@final
class TenantSecret(_Sealed):
    """A tenant's secret under one version of the root, in memory only; shows nothing."""

    __slots__ = ("__held",)

    __held: _Secret[bytes]

    @classmethod
    def of(cls, mac: _Secret[bytes]) -> Self:
        """The secret from the 32 bytes that a key management system answered."""
        if len(mac.reveal()) != 32:
            raise KeyFormatError("a tenant's secret has 32 bytes; the MAC must be HMAC-SHA256.")
        self = object.__new__(cls)
        object.__setattr__(self, "_TenantSecret__held", mac)
        return self

    def expand(self, info: bytes) -> _Secret[bytes]:
        """32 bytes of HKDF-Expand(secret, info)."""
        return _expand(self.__held, info, 32)

    def content_hash(self, text_sha256: bytes) -> str:
        """A keyed hash of a text's digest, 64 hex digits: what a log may say of a text.

        Nobody who reads the log can test a guess of the text without the tenant's secret.
        """
        key = self.expand(b"filigrane/v1/content")
        return hmac.new(key.reveal(), text_sha256, hashlib.sha256).hexdigest()

    def __repr__(self) -> str:
        return "<TenantSecret>"


def derive(secret: TenantSecret, spec: KeySpec, version: int, salt: bytes) -> Key:
    """The key of one version. salt: 32 bytes. Raises KeyFormatError outside these."""
    if not 1 <= version <= MAX_VERSION:
        raise KeyFormatError(f"a version is 1 to {MAX_VERSION}.")
    if len(salt) != SALT_BYTES:
        raise KeyFormatError(f"a salt has {SALT_BYTES} bytes; a destroyed version has none.")
    texts = (spec.name, spec.model, spec.tokenizer_sha256 or "", spec.mark)
    info = b"filigrane/v1/tenant-key" + b"".join(_lp(text.encode("utf-8")) for text in texts)
    info += version.to_bytes(4, "big") + salt
    return Key._of_secret(key_id(spec.tenant, spec.name, version), spec.slots, secret.expand(info))


def commitment(key: Key) -> str:
    """What is published of a derived key before first use, 64 hex digits."""
    return key._expand(b"filigrane/v1/commitment").reveal().hex()


def imported_commitment(key: Key | ForeignKey, opening: bytes) -> str:
    """What is published of an imported key: SHA-256 over 32 secret random bytes and the key."""
    if len(opening) != 32:
        raise KeyFormatError("an opening has 32 bytes.")
    # The name is no part of what marks, and may differ from where the key was before.
    tail = key.export_text().rpartition(":")[2] if isinstance(key, Key) else key.export_text()
    body = _Secret(tail.encode("ascii"))
    head = b"filigrane/v1/imported-commitment" + opening
    return hashlib.sha256(head + _lp(body.reveal())).hexdigest()
