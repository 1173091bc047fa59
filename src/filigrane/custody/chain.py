"""Records of a tenant's audit log, and the hash chain that they hang in.

    canonical   RFC 8785 JSON of a record: sorted names, no white space, UTF-8; no floats anywhere
    genesis     SHA-256("filigrane/v1/audit/genesis" || lp(tenant))
    hash i      SHA-256("filigrane/v1/audit/record" || hash i-1 || canonical(record i)); before the
                first record stands genesis

Knows nothing of who signs a log (`filigrane.custody.checkpoints`).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final, Self

from filigrane.custody.forms import (
    MAX_INTEGER,
    matches,
    members,
    require_count,
    require_tenant,
    require_time,
)
from filigrane.errors import AuditError
from filigrane.keys import _lp

__all__ = ["MAX_RECORD_BYTES", "Fact", "Record", "canonical", "genesis", "link", "timestamp"]

Fact = str | int | bool | None | list[str]
"""What a record may say; integers within +-(2**53 - 1), so that every reader of JSON agrees."""

MAX_RECORD_BYTES: Final = 65_536
_GENESIS: Final = b"filigrane/v1/audit/genesis"
_RECORD: Final = b"filigrane/v1/audit/record"
_KIND: Final = re.compile(r"[a-z][a-z0-9-]{0,31}(\.[a-z0-9][a-z0-9-]{0,31}){0,3}")
_FACT: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_ACTOR: Final = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


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
        require_tenant(self.tenant)
        require_count("a record's index", self.index)
        require_time(self.at)
        if not matches(_ACTOR, self.actor):
            raise AuditError("a record's actor has 1 to 200 characters, none of them control.")
        if not matches(_KIND, self.kind):
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
        return cls(**members(value, "record", cls.__slots__))


def timestamp(moment: datetime) -> str:
    """A moment as records have it; raises ValueError for one without a time zone."""
    if moment.tzinfo is None:
        raise ValueError("this moment has no time zone; use datetime.now(UTC)")
    utc = moment.astimezone(UTC).replace(tzinfo=None)
    return utc.isoformat(timespec="milliseconds") + "Z"


def genesis(tenant: str) -> bytes:
    """What the first record of a tenant's log is linked to, 32 bytes."""
    require_tenant(tenant)
    return hashlib.sha256(_GENESIS + _lp(tenant.encode("ascii"))).digest()


def canonical(record: Record) -> bytes:
    """A record's one form in bytes."""
    return _canonical(record.to_json())


def link(previous: bytes, record: Record) -> bytes:
    """The hash of a record that follows the one with hash `previous` (or genesis), 32 bytes."""
    if len(previous) != 32:
        raise AuditError("a record is linked to a hash of 32 bytes.")
    return hashlib.sha256(_RECORD + previous + canonical(record)).digest()


def _canonical(value: dict[str, Any]) -> bytes:
    # With ASCII names, and no floats or great integers, this is RFC 8785.
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise AuditError("a record holds half of a surrogate pair, which is no text.") from None


def _fact_name(name: str) -> str:
    if not matches(_FACT, name):
        raise AuditError("a fact's name is 1 to 64 of a-z 0-9 _, the first a letter.")
    return name


def _fact(name: str, value: object) -> Fact:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and abs(value) <= MAX_INTEGER:
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    raise AuditError(
        f"fact {name} is a {type(value).__name__}; a fact is text, an integer within 2**53, true, "
        "false, nothing or a list of texts."
    )
