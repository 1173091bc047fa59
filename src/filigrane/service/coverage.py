"""What engines marked and what they did not, and why: counts in the audit log, nothing of texts.

The EU's Code of Practice wants a mark on what is written, and reasons where there is none; here
they are, in the same tamper-evident log as the keys. An engine says what it counted between two
moments; the same report sent twice counts once.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, final

from filigrane.custody.chain import Fact
from filigrane.errors import StateError
from filigrane.schemes import SCHEMES
from filigrane.serving.orders import REASONS, UNMARKED

if TYPE_CHECKING:
    from collections.abc import Callable

    from filigrane.store.log import Log

__all__ = ["KIND", "MOST_COUNTS", "Count", "Coverage", "EngineCoverage", "known_reason"]

KIND: Final = "engine.coverage"
OUTCOMES: Final = ("marked", "unmarked", "refused")
MOST_COUNTS: Final = 128
MOST_NUMBER: Final = 2**50
_OTHERS: Final = ("overloaded", "too_large", "model_not_found", "failed")
_KNOWN: Final = {
    "marked": frozenset(SCHEMES),
    "unmarked": frozenset(UNMARKED),
    "refused": frozenset(REASONS) | frozenset(_OTHERS),
}
_OTHER: Final = "other"
_AHEAD: Final = timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """So many requests had this outcome (of OUTCOMES) for this reason (a scheme, if marked)."""

    outcome: str
    reason: str
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCoverage:
    """What one engine has reported, in n_reports reports.

    requests: (outcome, reason) -> number; marked_tokens, unmarked_tokens: positions of marked texts
    that carry the mark, and others.
    """

    engine: str
    since: datetime
    until: datetime
    n_reports: int
    requests: Mapping[tuple[str, str], int]
    marked_tokens: int
    unmarked_tokens: int


def known_reason(outcome: str, reason: str) -> str:
    """The reason if it is one of filigrane's, else "other": nobody writes free text into a log."""
    return reason if reason in _KNOWN.get(outcome, frozenset()) else _OTHER


@final
class Coverage:
    """The ledger. Thread-safe, as the log is."""

    def __init__(self, log: "Log", *, clock: "Callable[[], datetime]") -> None:
        self._log, self._clock = log, clock

    def report(
        self,
        tenant: str,
        engine: str,
        counts: Iterable[Count],
        *,
        since: datetime,
        until: datetime,
        marked_tokens: int = 0,
        unmarked_tokens: int = 0,
    ) -> int:
        """Write what an engine counted between two moments into the log; the record's index.

        Raises StateError for times that make no sense, StoreError if it cannot be written.
        """
        if not since < until <= self._clock() + _AHEAD:
            raise StateError(
                "a report covers the time from `since` to `until`, in this order and not in the "
                "future; set the engine's clock."
            )
        requests: Counter[tuple[str, str]] = Counter()
        for count in counts:
            if count.requests:
                requests[count.outcome, known_reason(count.outcome, count.reason)] += count.requests
        facts: dict[str, Fact] = {
            "engine": engine,
            "since": _stamp(since),
            "until": _stamp(until),
            "marked_tokens": marked_tokens,
            "unmarked_tokens": unmarked_tokens,
            "requests": [f"{o} {r} {number}" for (o, r), number in sorted(requests.items())],
        }
        return self._log.append(tenant, f"engine:{engine}", KIND, facts)

    def engines(
        self, tenant: str, *, since: datetime | None = None, until: datetime | None = None
    ) -> tuple[EngineCoverage, ...]:
        """What each engine has reported, of reports that end within these times; by name.

        NotFound without the tenant. Reads the whole log.
        """
        seen: set[tuple[str, str, str]] = set()
        found: dict[str, _Sum] = {}
        for record in self._log.records(tenant):
            if record.kind != KIND:
                continue
            engine, first, last = (str(record.facts[n]) for n in ("engine", "since", "until"))
            begin, end = (datetime.fromisoformat(moment) for moment in (first, last))
            outside = (since is not None and end < since) or (until is not None and end > until)
            if outside or (engine, first, last) in seen:
                continue
            seen.add((engine, first, last))
            found.setdefault(engine, _Sum()).add(begin, end, record.facts)
        return tuple(found[engine].result(engine) for engine in sorted(found))


class _Sum:
    def __init__(self) -> None:
        self.times: list[datetime] = []
        self.requests: Counter[tuple[str, str]] = Counter()
        self.tokens = [0, 0]

    def add(self, begin: datetime, end: datetime, facts: Mapping[str, Fact]) -> None:
        self.times += [begin, end]
        for place, name in enumerate(("marked_tokens", "unmarked_tokens")):
            number = facts[name]
            self.tokens[place] += number if isinstance(number, int) else 0
        lines = facts["requests"]
        for line in lines if isinstance(lines, list | tuple) else ():
            outcome, reason, number = line.split(" ")
            self.requests[outcome, reason] += int(number)

    def result(self, engine: str) -> EngineCoverage:
        return EngineCoverage(
            engine=engine,
            since=min(self.times),
            until=max(self.times),
            n_reports=len(self.times) // 2,
            requests=dict(self.requests),
            marked_tokens=self.tokens[0],
            unmarked_tokens=self.tokens[1],
        )


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
