"""What the store hands out: facts about keys, engines, people, approvals and jobs; no secrets.

Times are datetimes in UTC with milliseconds. All of it is safe to print.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from filigrane.custody.hierarchy import KeySpec
from filigrane.custody.states import State

__all__ = [
    "APPROVAL_ROLES",
    "Approval",
    "Chunk",
    "EngineRecord",
    "JobRecord",
    "JobState",
    "KeyRecord",
    "Principal",
    "Role",
    "TokenRecord",
    "VersionRecord",
    "parts_of",
]

_ID: Final = re.compile(r"([a-z0-9-]{1,24})\.([a-z0-9-]{1,28})@([1-9][0-9]{0,5})")


class Role(enum.StrEnum):
    """What somebody may do inside one tenant."""

    ENGINE = "engine"
    """Fetch the keys of its own models and report what it marked."""
    DETECTOR_PUBLIC = "detector-public"
    """Learn whether a text carries a mark, in three classes."""
    DETECTOR_EXPERT = "detector-expert"
    """See p-values, spans and receipts."""
    ATTRIBUTION_OFFICER = "attribution-officer"
    """Trace a text to a user, with a second officer's approval."""
    KEY_ADMIN = "key-admin"
    """Create, rotate, promote, retire keys and report them compromised."""
    CUSTODIAN = "custodian"
    """Destroy keys, two together, and restore archives."""
    AUDITOR = "auditor"
    """Read the log and its proofs."""
    TENANT_ADMIN = "tenant-admin"
    """Issue and revoke tokens, enrol and revoke engines."""


APPROVAL_ROLES: Final = {"destroy": Role.CUSTODIAN, "trace": Role.ATTRIBUTION_OFFICER}
"""Kind of approval -> the role that both who ask for it and who give it must have."""


def parts_of(version_id: str) -> tuple[str, str, int] | None:
    """Tenant, name and number of the id of a version, 'acme.chat@3'; None for another text."""
    parts = _ID.fullmatch(version_id)
    return None if parts is None else (parts[1], parts[2], int(parts[3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """One version of a key.

    id: 'acme.chat@3'; root_version: of the root that its tenant secret comes from (derived) or that
    was current when it was wrapped (imported); commitment: 64 hex digits; log_index: of the record
    that published it; compromised_since: what was found in texts after that moment proves nothing;
    acknowledged: engines that proved that they have it; waiting_for: enrolled engines of its model
    that have not (empty unless it is pre-active or active).
    """

    tenant: str
    name: str
    number: int
    id: str
    state: State
    spec: KeySpec
    root_version: int
    commitment: str
    log_index: int
    created_at: datetime
    promoted_at: datetime | None = None
    retired_at: datetime | None = None
    compromised_since: datetime | None = None
    destroyed_at: datetime | None = None
    acknowledged: tuple[str, ...] = ()
    waiting_for: tuple[str, ...] = ()

    def marks_on(self, engine: str) -> bool:
        """Whether this engine may mark with it: active, and the engine has proved that it can."""
        return self.state.marks and engine in self.acknowledged


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A key with its versions, ascending."""

    spec: KeySpec
    versions: tuple[VersionRecord, ...]

    @property
    def active(self) -> VersionRecord | None:
        """The version that marks, if one does."""
        return next((version for version in self.versions if version.state.marks), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """A server that marks. models: those it serves; public_key: JWK (OKP, X25519) of its identity,
    to which leases are sealed.
    """

    tenant: str
    name: str
    models: tuple[str, ...]
    public_key: Mapping[str, str]
    enrolled_at: datetime
    last_seen_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Whoever a request comes from. engine: whose token it is, if an engine's."""

    tenant: str
    name: str
    roles: frozenset[Role]
    engine: str | None = None
    token_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """A token as the database knows it: without its secret."""

    tenant: str
    id: str
    name: str
    roles: frozenset[Role]
    engine: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """What two people agree on before it happens, once.

    kind: one of APPROVAL_ROLES; subject: what it is for, such as the id of a version; purpose: why,
    in words; approved_by: the second person, when there is one; used_by: which of the two used it.
    """

    id: str
    tenant: str
    kind: str
    subject: str
    purpose: str
    requested_by: str
    requested_at: datetime
    expires_at: datetime
    approved_by: str | None = None
    approved_at: datetime | None = None
    used_at: datetime | None = None
    used_by: str | None = None


class JobState(enum.StrEnum):
    """What has become of a job: waiting (no item is done yet), running (some are), done (all are),
    or cancelled. The first two go on by themselves, the last two are for good.
    """

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more is going to be done."""
        return self in (JobState.DONE, JobState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A batch of work. options: JSON text of whoever made it, without secrets or texts;
    n_failed of n_done items were given up.
    """

    tenant: str
    id: str
    who: str
    state: JobState
    options: str
    n_items: int
    n_done: int
    n_failed: int
    created_at: datetime
    expires_at: datetime
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Chunk:
    """Items of one job that one worker has until its lease ends.

    items: (position, content) in memory only; lease: names this claim of them.
    """

    tenant: str
    job: str
    who: str
    options: str
    worker: str
    lease: str
    lease_until: datetime
    items: tuple[tuple[int, bytes], ...]

    def __repr__(self) -> str:
        return f"<Chunk of {len(self.items)} items of job {self.job} of {self.tenant}>"
