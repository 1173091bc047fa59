"""Who a text was written for: by two officers' agreement, for a purpose, and logged beforehand.

A trace reads the keys of up to millions of users at once, on all processors: requests for it wait
for their turn, a few of them and not for long, and more are turned away. All that decides who is
named is part of what was agreed on: the text by its content's name in the log, keys, users, alpha,
how many candidates are shown, and the tokenizer. An approval is used up when a trace begins, and
nothing begins that would not end in time. An answer that got lost on its way can be had again, by
the officer who asked and until the approval expires: nothing was kept of it, so it is computed
again, and logged again as a repeat.
"""

import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from filigrane import stats
from filigrane.contexts import TokenIds, as_token_ids
from filigrane.custody.states import State
from filigrane.errors import Busy, FiligraneError, StateError
from filigrane.keys import Key
from filigrane.schemes import from_tag
from filigrane.service.contents import content_hash
from filigrane.service.detecting import Detector, Query
from filigrane.service.receipts import Receipts
from filigrane.service.tokenizing import NoTokenizer
from filigrane.tracing import trace

if TYPE_CHECKING:
    from filigrane.store.access import Access
    from filigrane.store.log import Log
    from filigrane.store.records import Approval, Principal, VersionRecord

__all__ = ["MAX_READINGS", "MAX_TESTS", "MAX_USERS", "Named", "Traced", "Tracer"]

MAX_USERS: Final = 10_000_000
MAX_KEYS: Final = 64
MAX_TESTS: Final = 20_000_000
"""Of one trace: users, times the slots of all versions."""
MAX_READINGS: Final = 4_000_000_000
"""Of one trace: tests, times tokens; half a minute to a minute of two processors."""
_SUBJECT: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """One candidate. log_pvalue: natural log, corrected for every user, slot and key tried."""

    key_id: str
    user: int
    log_pvalue: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What a trace found. candidates: best first; named: those at or below alpha; n_tests: users,
    slots and keys; cautions: codes of `detecting.CAUTIONS`; purpose: why it was made.
    """

    candidates: tuple[Named, ...]
    named: tuple[Named, ...]
    alpha: float
    n_users: int
    n_keys: int
    n_tests: int
    n_tokens: int
    n_scored: int
    method: str
    cautions: tuple[str, ...]
    content_sha256: str
    approval: str
    purpose: str


class Tracer:
    """Traces texts for officers. Methods may be called from several threads.

    threads: processors that one trace uses; queue: how many may wait for their turn, and for at
    most wait_s seconds.
    """

    def __init__(
        self,
        detector: Detector,
        access: "Access",
        log: "Log",
        receipts: Receipts,
        *,
        threads: int | None = None,
        queue: int = 4,
        wait_s: float = 20.0,
    ) -> None:
        self._detector = detector
        self._access = access
        self._log = log
        self._receipts = receipts
        self._threads = threads
        self._wait_s = wait_s
        # One at a time: each uses all processors that it may.
        self._turn = threading.Lock()
        self._closed = False
        self._places = threading.BoundedSemaphore(queue + 1)

    def __repr__(self) -> str:
        return "<Tracer>"

    def close(self) -> None:
        """Wait for the running trace and start no other."""
        self._closed = True
        with self._turn:
            pass

    def request(
        self, who: "Principal", query: Query, users: range, purpose: str, *, top: int = 10
    ) -> "Approval":
        """Ask a second officer to agree to one trace: this text, these keys, these users, this
        alpha and number of candidates.

        query: its hints say which keys. Raises as `trace` does, and what
        `Access.request_approval` raises.
        """
        _check(users, top)
        records = self._records(who.tenant, query)
        _check_size(records, users, [self._ids(query, record) for record in records])
        subject = self._subject(who.tenant, query, records, users, top)
        return self._access.request_approval(who.tenant, "trace", subject, purpose, who)

    def trace(
        self, who: "Principal", query: Query, users: range, *, approval: str, top: int = 10
    ) -> Traced:
        """Find the users whose mark the text carries.

        users: indices, step 1, at most 10,000,000; approval: the id of one that a second officer
        gave, and which this uses up, in the log, before anything is computed; only the same officer
        can use it again, for the same until it expires; top: how many candidates to report. Whether
        anybody was named is in the log before this returns. A
        compromised key names nobody. Raises StateError for an approval that is not one for this, or
        for more than can be computed in time, Busy, NotFound, ModelError, TokenError, TooShort.
        """
        _check(users, top)
        records = self._records(who.tenant, query)
        keys = [self._key(record) for record in records]
        subject = self._subject(who.tenant, query, records, users, top)
        # Before the approval is spent: what cannot be read, or not in time, costs none.
        ids = [self._ids(query, record) for record in records]
        _check_size(records, users, ids)
        with self._in_turn():
            agreed = self._access.spend_approval(
                who.tenant, approval, kind="trace", subject=subject, actor=who.name, again=True
            )
            found = self._run(query, users, records, keys, ids, top, agreed)
        outcome = "named" if found.named else "nobody"
        facts = {"approval": agreed.id, "outcome": outcome}
        self._log.append(who.tenant, who.name, "trace.done", facts)
        return found

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            raise Busy("too many traces wait already; try again in a minute.")
        try:
            if not self._turn.acquire(timeout=self._wait_s):
                raise Busy("another trace takes its time; try again in a minute.")
            try:
                if self._closed:
                    raise Busy("the service is about to end; try again in a minute.")
                yield
            finally:
                self._turn.release()
        finally:
            self._places.release()

    def _run(
        self,
        query: Query,
        users: range,
        records: "Sequence[VersionRecord]",
        keys: Sequence[Key],
        ids: Sequence[TokenIds],
        top: int,
        agreed: "Approval",
    ) -> Traced:
        candidates: list[Named] = []
        n_tests = n_scored = n_tokens = 0
        for record, key, tokens in zip(records, keys, ids, strict=True):
            assert record.spec.scheme is not None
            result = trace(
                tokens,
                key.users(users),
                from_tag(record.spec.scheme),
                top=min(top, len(users)),
                workers=self._threads,
            )
            # Versions have independent keys: the best of them pays by Sidak once more. That the
            # candidates of one version share text and version matters to neither inequality.
            candidates += [
                Named(
                    key_id=record.id,
                    user=users[one.index],
                    log_pvalue=stats.sidak(one.log_pvalue, len(records)),
                )
                for one in result.candidates
            ]
            n_tests += result.n_tests
            n_scored, n_tokens = max(n_scored, result.n_scored), max(n_tokens, result.n_tokens)
        candidates.sort(key=lambda one: one.log_pvalue)
        limit = math.log(query.alpha)
        compromised = {record.id for record in records if record.state is State.COMPROMISED}
        low = [one for one in candidates if one.log_pvalue <= limit]
        named = tuple(one for one in low if one.key_id not in compromised)
        return Traced(
            candidates=tuple(candidates[:top]),
            named=named,
            alpha=query.alpha,
            n_users=len(users),
            n_keys=len(records),
            n_tests=n_tests,
            n_tokens=n_tokens,
            n_scored=n_scored,
            method=f"exact tail, Holm-Sidak over {len(users)} users and their slots, Sidak over "
            f"{len(records)} keys",
            cautions=("compromised_key",) if len(low) > len(named) else (),
            content_sha256=_content(query),
            approval=agreed.id,
            purpose=agreed.purpose,
        )

    def _records(self, tenant: str, query: Query) -> "list[VersionRecord]":
        """Versions of the hints that name users: ours, not those of other tools."""
        found = [
            record
            for record in self._detector.candidates(tenant, query)
            if record.spec.scheme is not None
        ]
        if not found:
            raise StateError(
                "none of these keys tells users apart: marks of other tools have one key for all."
            )
        if len(found) > MAX_KEYS:
            raise StateError(f"a trace reads at most {MAX_KEYS} versions; name a key or a model.")
        return found

    def _key(self, record: "VersionRecord") -> Key:
        key = self._detector.key_of(record.tenant, record.id)[1]
        if not isinstance(key, Key):
            raise StateError(f"{record.id} tells no users apart; it is another tool's key.")
        return key

    def _ids(self, query: Query, record: "VersionRecord") -> TokenIds:
        if query.text is None:
            assert query.tokens is not None
            return as_token_ids(query.tokens)
        tokenizers = self._detector.tokenizers
        which = query.tokenizer or record.spec.tokenizer_sha256 or tokenizers.only
        if which is None:
            raise NoTokenizer(f"{record.id} names no tokenizer; name one, or send token ids.")
        return tokenizers.encode(query.text, which).ids

    def _subject(
        self,
        tenant: str,
        query: Query,
        records: "Sequence[VersionRecord]",
        users: range,
        top: int,
    ) -> str:
        """What two officers agree on, in at most 200 characters."""
        content = self._receipts.content_name(tenant, _content(query))
        head = f"content {content} users {users.start}-{users.stop - 1}"
        head += f" alpha {query.alpha!r} top {top}"
        if query.text is not None and query.tokenizer is not None:
            head += f" tokenizer {self._detector.tokenizers.sha256(query.tokenizer)[:12]}"
        head += " of "
        names = " ".join(record.id for record in records)
        if len(head) + len(names) > _SUBJECT:
            digest = hashlib.sha256(names.encode("ascii")).hexdigest()
            names = f"{len(records)} keys {digest[:32]}"
        return head + names


def _content(query: Query) -> str:
    if query.text is not None:
        return content_hash(query.text)
    assert query.tokens is not None
    return content_hash(query.tokens)


def _check(users: range, top: int) -> None:
    if users.step != 1 or not 1 <= len(users) <= MAX_USERS or users.start < 0:
        raise FiligraneError(f"users are a range of 1 to {MAX_USERS} indices from 0 on.")
    if not 1 <= top <= 100:
        raise FiligraneError("top is 1 to 100.")


def _check_size(records: "Sequence[VersionRecord]", users: range, ids: Sequence[TokenIds]) -> None:
    """Refuse what would not end in time."""
    slots = [record.spec.slots for record in records]
    tests = len(users) * sum(slots)
    if tests > MAX_TESTS:
        raise StateError(
            f"{len(users)} users times {sum(slots)} slots of {len(records)} versions are more than "
            f"one trace can try; ask for at most {MAX_TESTS // sum(slots)} users at a time, or for "
            "one version."
        )
    readings = len(users) * sum(n * len(one) for n, one in zip(slots, ids, strict=True))
    if readings > MAX_READINGS:
        raise StateError(
            f"{tests} tests of a text this long take too long; ask for at most "
            f"{max(1, len(users) * MAX_READINGS // readings)} users at a time, or for a part of "
            "the text."
        )
