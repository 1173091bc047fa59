"""Who is logged in: a cookie that holds the API token, sealed; nothing is stored.

The cookie is AES-256-GCM under a key that every process of the service derives from the root, so
any of them can open it and none has to remember it. The token inside is asked about again like
every other: whoever is revoked is out, logged in or not. Logging out takes the cookie away.
"""

import hmac
import json
import math
import re
import secrets
import threading
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from filigrane.errors import KmsUnavailable
from filigrane.keys import _Secret
from filigrane.kms.base import KeyManagement

__all__ = ["Session", "Sessions"]

_MESSAGE: Final = b"filigrane/v1/web/session"
_NONCE_BYTES: Final = 12
_LONGEST: Final = 16_384
_VERSION: Final = re.compile(r"[1-9][0-9]{0,5}", re.ASCII)
_VERSIONS_S: Final = 5.0
"""Forged cookies ask for the root's versions no more often than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One log-in. token: of the API; csrf: what its forms must hold; ends_at: Unix time."""

    token: _Secret[str]
    csrf: str = field(repr=False)
    ends_at: float


class Sessions:
    """Seals and opens sessions. Methods may be called from several threads.

    lifetime_s: how long a log-in lasts; clock: Unix time in seconds.
    """

    def __init__(
        self, kms: KeyManagement, lifetime_s: float, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._kms = kms
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._keys: dict[int, _Secret[bytes]] = {}
        self._versions: frozenset[int] | None = None
        self._asked_at = -math.inf
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "<Sessions>"

    def seal(self, token: _Secret[str]) -> _Secret[str]:
        """The value of a new session's cookie. Raises KmsUnavailable or KmsError."""
        version = self._kms.versions()[-1]
        key = self._key(version)
        body = {
            "token": token.reveal(),
            "csrf": secrets.token_urlsafe(24),
            "ends": self._clock() + self._lifetime_s,
        }
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = AESGCM(key.reveal()).encrypt(nonce, json.dumps(body).encode("utf-8"), _MESSAGE)
        packed = urlsafe_b64encode(nonce + sealed).decode("ascii").rstrip("=")
        return _Secret(f"{version}.{packed}")

    def open(self, cookie: str) -> Session | None:
        """The session of a cookie; None if it is none of ours, altered or over.

        Raises KmsUnavailable or KmsError if the key that would open it is not in memory.
        """
        number, _, packed = cookie.partition(".")
        if len(cookie) > _LONGEST or _VERSION.fullmatch(number) is None:
            return None
        try:
            data = urlsafe_b64decode(packed + "=" * (-len(packed) % 4))
        except ValueError:
            return None
        version = int(number)
        if len(data) <= _NONCE_BYTES or not self._exists(version):
            return None
        try:
            opened = AESGCM(self._key(version).reveal()).decrypt(
                data[:_NONCE_BYTES], data[_NONCE_BYTES:], _MESSAGE
            )
        except InvalidTag:
            return None
        body = json.loads(opened)
        if self._clock() >= body["ends"]:
            return None
        return Session(token=_Secret(body["token"]), csrf=body["csrf"], ends_at=body["ends"])

    def _exists(self, version: int) -> bool:
        with self._lock:
            if version in self._keys:
                return True
            if time.monotonic() - self._asked_at > _VERSIONS_S:
                self._asked_at, self._versions = time.monotonic(), None
                self._versions = frozenset(self._kms.versions())
            if self._versions is None:
                raise KmsUnavailable("the key management system did not answer; try again soon.")
            return version in self._versions

    def _key(self, version: int) -> _Secret[bytes]:
        with self._lock:
            if version not in self._keys:
                self._keys[version] = self._kms.mac(version, _MESSAGE)
            return self._keys[version]


def same_secret(given: str, expected: str) -> bool:
    """Whether two texts are the same, in constant time."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode("utf-8"))
