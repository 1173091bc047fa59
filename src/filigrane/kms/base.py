"""What filigrane asks of a key management system, and nothing more.

A provider holds versions of one root and computes with them. Where it can, the root never enters
this process. Nothing else in filigrane knows which provider it talks to.
"""

from typing import Protocol

from filigrane.keys import _Secret

__all__ = ["KeyManagement"]


class KeyManagement(Protocol):
    """A root with versions 1, 2, ...; the last is current, all of them stay usable.

    Every method raises KmsUnavailable if the system does not answer within its time limit, and
    KmsError if it refuses or answers nonsense; no message holds a secret, a token or an address
    with credentials. Methods may be called from several threads.
    """

    @property
    def provider(self) -> str:
        """local, transit, aws or pkcs11."""

    @property
    def protection(self) -> str:
        """In words, where the root lives and whether it can leave."""

    def versions(self) -> tuple[int, ...]:
        """The root's versions, ascending; asked of the system, not remembered."""

    def mac(self, version: int, message: bytes) -> _Secret[bytes]:
        """HMAC-SHA256 of a message (at most 4,096 bytes) under a version: 32 bytes."""

    def wrap(self, data: _Secret[bytes], context: bytes) -> bytes:
        """Encrypt at most 4,096 bytes under the current version, bound to a context."""

    def unwrap(self, blob: bytes, context: bytes) -> _Secret[bytes]:
        """What was wrapped, under whichever version; KmsError for another context."""

    def rotate(self) -> int:
        """Make a new version and return its number; the older ones stay usable."""

    def close(self) -> None:
        """Let go of connections and of secrets in memory."""
