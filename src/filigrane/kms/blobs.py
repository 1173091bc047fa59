"""What all providers share: limits of what they take, how a wrapped blob begins, what they refuse.

    blob    "fgw1" || u8(provider) || what the provider made
    there   u32be(version) || the rest, if the provider does not say the version itself

The first bytes say who can open the rest; they are bound to it, together with the context.
"""

from collections.abc import Sequence
from typing import Final

from filigrane.errors import KmsError
from filigrane.keys import _Secret

__all__ = [
    "CLOSED",
    "MAX_BYTES",
    "MAX_CONTEXT",
    "NOT_OURS",
    "body_of",
    "head_of",
    "require_message",
    "require_version",
    "require_wrappable",
    "version_of",
    "versioned_head",
]

MAX_BYTES: Final = 4_096
"""Of a message and of data to wrap: the least that any provider takes (AWS)."""
MAX_CONTEXT: Final = 1_024
MAX_VERSION: Final = 999_999
CLOSED: Final = "this key management is closed; open it again."
NOT_OURS: Final = "this cannot be unwrapped: it belongs to another context or root, or was altered."
_MAGIC: Final = b"fgw1"
_CODES: Final = {"local": 1, "transit": 2, "aws": 3, "pkcs11": 4}


def require_message(message: bytes) -> None:
    """Raise KmsError unless a message can be MACed everywhere: 1 to 4,096 bytes."""
    if not _fits(message, MAX_BYTES):
        raise KmsError(f"a message has 1 to {MAX_BYTES} bytes; hash longer ones first.")


def require_wrappable(data: _Secret[bytes], context: bytes) -> None:
    """Raise KmsError unless data and context can be wrapped everywhere.

    1 to 4,096 bytes, and 1 to 1,024 of context.
    """
    if not _fits(data.reveal(), MAX_BYTES):
        raise KmsError(
            f"1 to {MAX_BYTES} bytes can be wrapped; encrypt more under a data key and wrap that."
        )
    _require_context(context)


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


def versioned_head(provider: str, version: int) -> bytes:
    """The first bytes of a provider's blobs and the root's version, which `version_of` reads."""
    return head_of(provider) + version.to_bytes(4, "big")


def body_of(provider: str, blob: bytes, context: bytes) -> bytes:
    """What follows the first bytes; KmsError if another provider wrapped it, or none.

    context: what it is to be unwrapped in; KmsError unless it can be one.
    """
    _require_context(context)
    if not _fits(blob, 1 << 16) or len(blob) < 6 or blob[:4] != _MAGIC:
        raise KmsError("this is nothing that a key management of filigrane wrapped.")
    names = {code: name for name, code in _CODES.items()}
    if blob[4] != _CODES[provider]:
        wrapper = names.get(blob[4], "a newer provider")
        raise KmsError(f"this was wrapped by {wrapper}; {provider} cannot unwrap it.")
    return blob[5:]


def version_of(provider: str, blob: bytes, context: bytes, *, least: int) -> tuple[int, bytes]:
    """The version in a blob of `versioned_head`, and the rest; raises as `body_of` does.

    least: bytes that the rest has at least; KmsError for fewer.
    """
    body = body_of(provider, blob, context)
    if len(body) < 4 + least:
        raise KmsError("what was wrapped is cut short; restore it from a backup.")
    return int.from_bytes(body[:4], "big"), body[4:]


def _require_context(context: bytes) -> None:
    if not _fits(context, MAX_CONTEXT):
        raise KmsError(f"a context has 1 to {MAX_CONTEXT} bytes.")


def _fits(data: object, most: int) -> bool:
    return isinstance(data, bytes) and 1 <= len(data) <= most
