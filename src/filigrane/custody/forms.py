"""Forms that what a log holds is held to: members, names, times, counts, base64url.

Knows nothing of what they are parts of. Raises AuditError for every other form.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from filigrane.custody.hierarchy import check_name
from filigrane.errors import AuditError, KeyFormatError

__all__ = [
    "MAX_INTEGER",
    "base64url",
    "matches",
    "members",
    "require_count",
    "require_tenant",
    "require_time",
    "unbase64url",
]

MAX_INTEGER: Final = 2**53 - 1
"""All readers of JSON agree on integers up to here."""
_AT: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")


def members(value: object, what: str, names: Iterable[str]) -> dict[str, Any]:
    """The members of a JSON object, which are exactly these; what: for the message."""
    expected = set(names)
    if not isinstance(value, Mapping) or set(value) != expected:
        raise AuditError(f"a {what} is an object with {', '.join(sorted(expected))}.")
    return dict(value)


def require_tenant(tenant: object) -> None:
    """Raise AuditError unless this is a tenant's name."""
    try:
        if not isinstance(tenant, str):
            raise KeyFormatError("a name is text.")
        check_name("tenant", tenant)
    except KeyFormatError as error:
        raise AuditError(str(error)) from None


def require_count(what: str, value: object) -> None:
    """Raise AuditError, saying what it would be, unless this is 0, 1, ... 2**53 - 1."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
        raise AuditError(f"{what} is an integer from 0 on.")


def require_time(at: object) -> None:
    """Raise AuditError unless this is RFC 3339 in UTC, with milliseconds and Z."""
    valid = isinstance(at, str) and bool(_AT.fullmatch(at))
    if valid:
        try:
            datetime.fromisoformat(str(at))
        except ValueError:
            valid = False
    if not valid:
        raise AuditError("a time is UTC with milliseconds, as 2026-11-02T09:30:00.000Z.")


def matches(pattern: re.Pattern[str], value: object) -> bool:
    """Whether a value is text, and all of it fits the pattern."""
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def base64url(data: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def unbase64url(text: object, what: str) -> bytes:
    """The bytes of base64url without padding, in its one form; what: for the message."""
    if not isinstance(text, str) or not re.fullmatch(r"[A-Za-z0-9_-]*", text):
        raise AuditError(f"{what} is base64url without padding.")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise AuditError(f"{what} is base64url without padding.") from None
    if base64url(data) != text:
        raise AuditError(f"{what} is base64url without padding.")
    return data
