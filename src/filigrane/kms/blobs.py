"""What all providers share: limits of what they take, and how a wrapped blob begins.

    blob    "fgw1" || u8(provider) || what the provider made

The first bytes say who can open the rest; they are bound to it, together with the context.
"""

from collections.abc import Sequence
from typing import Final

from filigrane.errors import KmsError
from filigrane.keys import _Secret

__all__ = [
    "MAX_BYTES",
    "MAX_CONTEXT",
    "body_of",
    "head_of",
    "require_context",
    "require_data",
    "require_message",
    "require_version",
]

MAX_BYTES: Final = 4_096
"""Of a message and of data to wrap: the least that any provider takes (AWS)."""
MAX_CONTEXT: Final = 1_024
MAX_VERSION: Final = 999_999
_MAGIC: Final = b"fgw1"
_CODES: Final = {"local": 1, "transit": 2, "aws": 3, "pkcs11": 4}


def require_message(message: bytes) -> None:
    """Raise KmsError unless a message can be MACed everywhere: 1 to 4,096 bytes."""
    if not _fits(message, MAX_BYTES):
        raise KmsError(f"a message has 1 to {MAX_BYTES} bytes; hash longer ones first.")


def require_data(data: _Secret[bytes]) -> None:
    """Raise KmsError unless data can be wrapped everywhere: 1 to 4,096 bytes."""
    if not _fits(data.reveal(), MAX_BYTES):
        raise KmsError(
            f"1 to {MAX_BYTES} bytes can be wrapped; encrypt more under a data key and wrap that."
        )


def require_context(context: bytes) -> None:
    """Raise KmsError unless this can be a context: 1 to 1,024 bytes."""
    if not _fits(context, MAX_CONTEXT):
        raise KmsError(f"a context has 1 to {MAX_CONTEXT} bytes.")


def require_version(version: int, known: Sequence[int]) -> None:
    """Raise KmsError, saying which there are, unless the root has this version."""
    if version not in known:
        raise KmsError(
            f"the root has no version {version}, only {', '.join(map(str, known))}; this is "
            "another root, or a version was removed."
        )


def head_of(provider: str) -> bytes:
    """The first bytes of a provider's blobs."""
    return _MAGIC + bytes([_CODES[provider]])


def body_of(provider: str, blob: bytes) -> bytes:
    """What follows the first bytes; KmsError if another provider wrapped it, or none."""
    if not _fits(blob, 1 << 16) or len(blob) < 6 or blob[:4] != _MAGIC:
        raise KmsError("this is nothing that a key management of filigrane wrapped.")
    names = {code: name for name, code in _CODES.items()}
    if blob[4] != _CODES[provider]:
        wrapper = names.get(blob[4], "a newer provider")
        raise KmsError(f"this was wrapped by {wrapper}; {provider} cannot unwrap it.")
    return blob[5:]


def _fits(data: object, most: int) -> bool:
    return isinstance(data, bytes) and 1 <= len(data) <= most
