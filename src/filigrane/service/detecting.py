"""Is there a mark of this tenant in a text? One answer over all keys that may be read, paid for.

Candidates are all readable versions of the tenant's keys that fit what the caller says of the text
(model, key, tokenizer). Which of them are tested depends on the text and on these hints, never on
what a test found. Each gives one p-value per reading:

    slots       of one key are independent streams, so the best of them pays by Sidak, exactly
    versions    that are derived have independent random keys: given the text their p-values are
                independent, and Holm-Sidak over all of them is valid, exact for the best
    imported    numbers were chosen by somebody and may depend on each other in any way
    readings    of a cleaned text beside the given one share the key: dependent as well

As soon as one of the last two is among the tests, all tests are corrected by Holm (Bonferroni for
the best), which holds under every dependence. What a compromised version finds counts only for a
text that is known to have existed before the compromise, and what a version finds that never came
into use does not count at all: versions can be made by the thousand until one fits a text. Nothing
here touches a database while the keys in memory are fresh; texts and ids are neither kept nor
logged. A text is read, as it is hashed, in Unicode's form NFC, with the tokenizer that the caller
names, else the key's, else the only one of the settings, if they have exactly one.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, Literal, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import Evidence, TokenIds, as_token_ids, collect
from filigrane.custody.states import State
from filigrane.detection import totals
from filigrane.errors import (
    FiligraneError,
    KmsError,
    ModelError,
    NotFound,
    StoreError,
    TokenError,
    TooShort,
    VocabularyMismatch,
)
from filigrane.foreign import ForeignKey, Profile, Written
from filigrane.foreign import from_tag as profile_from_tag
from filigrane.keys import Key, SecretWords
from filigrane.schemes import from_tag
from filigrane.schemes.base import Scheme
from filigrane.service.contents import Cleaned, cleaned, content_hash, ids_hash
from filigrane.service.tokenizing import NoTokenizer, Tokenizers

if TYPE_CHECKING:
    from filigrane.store.keys import KeyBook
    from filigrane.store.records import VersionRecord

__all__ = [
    "CAUTIONS",
    "MAX_ALPHA",
    "Detector",
    "Finding",
    "Heat",
    "KeyFinding",
    "MarkedSpan",
    "Query",
    "Said",
    "Verdict",
]

Verdict = Literal["detected", "inconclusive", "too_short"]
ReadingName = Literal["given", "cleaned"]
Said = Literal["detected", "uncounted", "inconclusive", "too_short"]

MAX_ALPHA: Final = 0.1
CAUTIONS: Final = {
    "cleaned_reading": "The mark shows in the text without its unusual characters, not in the text "
    "as it was given: somebody or something changed it after it was written.",
    "compromised_key": "A key that somebody else may have had since it was compromised agrees with "
    "the text. That counts only with a receipt of this service for this very text from before.",
    "foreign_profile": "The mark is of another tool, whose generator is no cryptography and whose "
    "key is short: it detects honest use and does not prove origin.",
    "imported_key": "The key was not made by this service. That it was not chosen to fit the text "
    "rests on the date of its commitment in the log.",
    "pre_active_key": "A key that never came into use agrees with the text. That does not count: "
    "such keys can be made until one fits.",
    "receipt_shown_before": "The receipt that was shown as evidence was shown before.",
    "repetitive": "More than half of the text repeats itself; what repeats counts once.",
    "several_keys": "More than one key agrees with the text: it may be a mixture of texts.",
    "several_slots": "More than one slot of the key agrees with the text. Honest texts carry one: "
    "this is a mixture of texts, or a forgery by somebody who learned from many of them.",
    "stale_keys": "The database does not answer: what was changed meanwhile was not considered.",
    "tokenizer_missing": "Some keys could not be tested: they name no tokenizer, or one that the "
    "service lacks. Name one that it has, or send token ids.",
    "unusual_characters": "The text holds characters that are invisible or only look like others; "
    "it was read with and without them, and both readings were paid for.",
    "vocabulary_mismatch": "Some keys could not be tested: the ids lie outside their vocabulary.",
}
"""Code of a caution -> what it means, for people."""

# With fewer nats than this per position nobody writes; shorter texts than that cannot decide.
_MOST_NATS: Final = 2.0
_OTHER_SLOTS: Final = 0.001
# Schemes whose tails cost microseconds, and how many scores, each some ten nanoseconds.
_CHEAP: Final = frozenset({"gumbel", "greenlist"})
_QUICK: Final = 20_000
_MAX_TENANTS: Final = 1024
# Keys that a message names.
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A text and what is known of it. Raises TokenError or FiligraneError if it makes no sense.

    text, or tokens: (n,) ids without a prompt, one of the two; model, key, tokenizer: hints that
    leave out keys, None if unknown (key: a key's name, or one version's id; tokenizer: name or
    fingerprint); alpha: in (0, 0.1]; receipt: one of this service for the same content, to show
    that it existed by then; evidence: whether spans and the evidence of each token are wanted;
    min_tokens: if any reading has fewer, nothing is tested and the verdict is "too_short".

    Hints must come from outside the text, not from an earlier answer about it.
    """

    text: str | None = None
    tokens: npt.ArrayLike | None = None
    model: str | None = None
    key: str | None = None
    tokenizer: str | None = None
    alpha: float = 1e-6
    receipt: str | None = None
    evidence: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if (self.text is None) == (self.tokens is None):
            raise TokenError("send one of the two: text, or token ids as tokens.")
        if not 0.0 < self.alpha <= MAX_ALPHA:
            raise FiligraneError(f"alpha must lie in (0, {MAX_ALPHA}]; 1e-6 is usual.")

    def __repr__(self) -> str:
        return f"<Query model={self.model} key={self.key} alpha={self.alpha:g}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFinding:
    """What one version of a key found.

    mark: tag; log_pvalue: natural log of its better reading, corrected for its own slots only;
    log_pvalue_holm: corrected for every test that was made; reading: which text that was; counts:
    whether it may count, see "compromised_key" and "pre_active_key"; commitment, log_index: what
    the log has of it.
    """

    key_id: str
    mark: str
    state: str
    log_pvalue: float
    log_pvalue_holm: float
    n_scored: int
    n_repeated: int
    slots: int
    reading: ReadingName
    counts: bool
    commitment: str
    log_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedSpan:
    """Tokens start to stop - 1 carry the mark, and so do characters start_char to stop_char - 1 of
    the text as it was sent (None for ids). log_pvalue: natural log, for the family of all windows,
    keys and readings.
    """

    start: int
    stop: int
    start_char: int | None
    stop_char: int | None
    log_pvalue: float
    n_scored: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heat:
    """evidence: (n,) float64 nats of each token under the best slot of the best key, NaN where it
    was not scored; offsets: (n, 2) int64 characters of the text as it was sent, None for ids;
    key_id: of the best key; reading: which text the tokens are of.
    """

    evidence: npt.NDArray[np.float64]
    offsets: npt.NDArray[np.int64] | None
    key_id: str
    reading: ReadingName


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer; it has no truth value: there are three verdicts, not two.

    verdict: "detected" (log_pvalue <= log alpha), "too_short" (so few positions that hardly any
    text of this length could be detected) or "inconclusive", never "not marked" or "human";
    log_pvalue: natural log, of the best version that counts, corrected for every test;
    key_id: that version's, if detected; technique: what was looked for, or found; n_tokens,
    n_scored, n_repeated: of the best version's reading; n_keys: versions tested; n_tests: slots and
    readings of all of them; n_readings: 1, or 2 if a cleaned text was read as well; per_key: best
    first; spans, heat: if evidence was asked for, of the best version that counts, if its scheme
    has them; cautions: codes of CAUTIONS; unusual: codes of `contents.Cleaned`; method: how
    p-values were computed and corrected; content_sha256, content_kind: `contents.content_hash` of
    text or ids; tried: ids of the versions tested, sorted; n_readable: versions of the tenant that
    can be read, before hints; hints: those that were used, as (name, value); revision: of the
    tenant's keys.
    """

    verdict: Verdict
    alpha: float
    log_pvalue: float
    key_id: str | None
    technique: str
    n_tokens: int
    n_scored: int
    n_repeated: int
    n_keys: int
    n_tests: int
    n_readings: int
    per_key: tuple[KeyFinding, ...]
    spans: tuple[MarkedSpan, ...]
    heat: Heat | None
    cautions: tuple[str, ...]
    unusual: tuple[str, ...]
    method: str
    content_sha256: str
    content_kind: Literal["text", "ids"]
    tried: tuple[str, ...]
    n_readable: int
    hints: tuple[tuple[str, str], ...]
    revision: int

    @property
    def said(self) -> Said:
        """What words are chosen by: the verdict, or "uncounted" where the only marks that were
        found do not count, which is inconclusive and not the same as none.
        """
        found = {"compromised_key", "pre_active_key"} & set(self.cautions)
        return "uncounted" if found and self.verdict == "inconclusive" else self.verdict

    @property
    def log10_pvalue(self) -> float:
        """log_pvalue in decimal digits."""
        return self.log_pvalue / math.log(10)

    def __bool__(self) -> NoReturn:
        raise TypeError("a Finding is not true or false; it has one of three verdicts.")


class Dated(Protocol):
    """What tells since when a content is known; `filigrane.service.receipts.Receipts` is one."""

    def existed_at(self, token: str, tenant: str, content_sha256: str) -> datetime:
        """When a receipt was issued for this content; ReceiptError if it is not one."""

    def shown_before(self, token: str) -> bool:
        """Whether this receipt was shown as evidence before."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way to see the content as ids; sha256 of its tokenizer, if any."""

    name: ReadingName
    ids: TokenIds
    offsets: npt.NDArray[np.int64] | None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One candidate's test of one reading."""

    candidate: "_Candidate"
    reading: _Reading
    log_pvalue: float
    n_scored: int
    n_repeated: int
    totals: tuple[float, ...]


class _Candidate:
    """One version, ready to read: its key's words are derived once, and stay in memory only."""

    __slots__ = ("key", "mark", "record", "slots", "tag", "words")

    def __init__(self, record: "VersionRecord", key: Key | ForeignKey) -> None:
        spec = record.spec
        self.record = record
        self.key = key
        self.mark: Scheme | Profile
        self.words: npt.NDArray[np.uint32] | None = None
        if spec.scheme is not None:
            if not isinstance(key, Key):
                raise KmsError(f"{record.id}: the key book holds another kind of key than it says.")
            self.mark = from_tag(spec.scheme)
            self.words = key.prf_keys(self.mark.label).view(SecretWords)
            self.slots = key.slots
        else:
            assert spec.profile is not None
            self.mark = profile_from_tag(spec.profile)
            self.key = ForeignKey.derive(key, self.mark) if isinstance(key, Key) else key
            self.slots = 1
        self.tag = self.mark.tag

    @property
    def independent(self) -> bool:
        """Whether its key is random apart from all others."""
        return self.record.spec.source == "derived"

    def __repr__(self) -> str:
        return f"<_Candidate {self.record.id}>"

    def test(self, reading: _Reading, shared: "_Shared") -> _Outcome:
        """The p-value of one reading, corrected for the slots.

        Raises TooShort or VocabularyMismatch.
        """
        if isinstance(self.mark, Profile):
            assert isinstance(self.key, ForeignKey)
            result = self.mark.read(Written(tokens=reading.ids), self.key)
            if result.n_scored == 0:
                raise TooShort("this profile scores no position of the text; pass a longer one.")
            repeated = result.n_tokens - result.n_scored
            return _Outcome(self, reading, result.log_pvalue, result.n_scored, repeated, ())
        evidence = shared.evidence(reading, self.mark.context_width)
        assert self.words is not None
        sums = totals(evidence, self.words, self.mark)
        # All slots score the same positions, so the largest sum has the smallest p-value.
        raw = self.mark.log_sf(max(sums), evidence.n_scored)
        adjusted = stats.sidak(raw, len(sums))
        return _Outcome(
            self, reading, adjusted, evidence.n_scored, evidence.n_repeated, tuple(sums)
        )

    def slots_beside(self, outcome: _Outcome) -> bool:
        """Whether a second slot agrees with the text as well (SECURITY.md, the one-slot rule)."""
        if isinstance(self.mark, Profile) or len(outcome.totals) < 2:
            return False
        second = sorted(outcome.totals)[-2]
        return self.mark.log_sf(second, outcome.n_scored) <= math.log(_OTHER_SLOTS / self.slots)


class _Shared:
    """Scored positions, counted once for all keys that look at as many tokens."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Evidence] = {}

    def evidence(self, reading: _Reading, width: int) -> Evidence:
        # By identity: the readings of one query live as long as this does.
        place = (id(reading), width)
        if place not in self._found:
            self._found[place] = collect(reading.ids, width)
        return self._found[place]


@dataclass(slots=True)
class _Snapshot:
    """A tenant's candidates in memory. made, checked: seconds of a monotonic clock."""

    revision: int
    candidates: tuple[_Candidate, ...]
    made: float
    checked: float
    stale: bool = False


class Detector:
    """Tests texts for the marks of a tenant. Methods may be called from several threads.

    revalidate_s: how long keys in memory are used without asking whether they changed; lifetime_s:
    how long they may be kept at all; outage_s: how long they are used while the database does not
    answer; receipts: what knows since when a content exists; without it a compromised key never
    counts; clock: seconds, monotonic.
    """

    def __init__(
        self,
        keybook: "KeyBook",
        tokenizers: Tokenizers,
        *,
        receipts: Dated | None = None,
        revalidate_s: float = 1.0,
        lifetime_s: float = 600.0,
        outage_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keybook = keybook
        self._tokenizers = tokenizers
        self._receipts = receipts
        self._revalidate_s = revalidate_s
        self._lifetime_s = lifetime_s
        self._outage_s = outage_s
        self._clock = clock
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}
        self._snapshots: OrderedDict[str, _Snapshot] = OrderedDict()

    @property
    def tokenizers(self) -> Tokenizers:
        """The tokenizers that texts are read with."""
        return self._tokenizers

    def __repr__(self) -> str:
        return f"<Detector of {len(self._snapshots)} tenants>"

    def detect(self, tenant: str, query: Query, *, clean: Cleaned | None = None) -> Finding:
        """Look for the tenant's marks. Same keys, same query: same answer.

        clean: `contents.cleaned` of the query's text, if the caller has it already. Raises NotFound
        if no key fits the hints; NoTokenizer, which names the keys, if none can be tested for want
        of one;
        TokenError for what is no text or no ids; VocabularyMismatch if the ids fit no key;
        ReceiptError for a receipt that is none of this content; KmsError or StoreError if keys are
        neither in memory nor to be had, which never reads as "not detected".
        """
        snapshot = self._snapshot(tenant)
        candidates = fitting(snapshot.candidates, query, self._tokenizers)
        cautions: set[str] = {"stale_keys"} if snapshot.stale else set()
        ids: TokenIds | None = None
        if query.text is not None:
            clean = clean or cleaned(query.text)
            sha256 = content_hash(clean.given.text)
        else:
            assert query.tokens is not None
            clean, ids = None, as_token_ids(query.tokens)
            sha256 = ids_hash(ids)
        since = None
        if query.receipt is not None and self._receipts is not None:
            since = self._receipts.existed_at(query.receipt, tenant, sha256)
            if self._receipts.shown_before(query.receipt):
                cautions.add("receipt_shown_before")
        read = self._read(candidates, query, ids, clean, cautions)
        lengths = [reading.ids.shape[0] for _, readings in read for reading in readings]
        # Before any test: what is too short is told nothing, not even by which caution.
        short = min(lengths) < query.min_tokens
        tests = ([], 0) if short else _tests(read, cautions)
        return self._judge(
            query=query,
            snapshot=snapshot,
            outcomes=tests[0],
            short=tests[1],
            n_tokens=min(lengths) if short else lengths[0],
            clean=clean,
            sha256=sha256,
            since=since,
            cautions=cautions,
        )

    def is_quick(self, tenant: str, query: Query) -> bool:
        """Whether `detect` takes well below a millisecond and asks neither database nor KMS."""
        snapshot = self._snapshots.get(tenant)
        if snapshot is None or self._clock() - snapshot.checked >= self._revalidate_s:
            return False
        if query.text is not None or query.receipt is not None or query.evidence:
            return False
        left = fitting(snapshot.candidates, query, self._tokenizers)
        slots = sum(candidate.slots for candidate in left)
        cheap = all(
            isinstance(candidate.mark, Scheme) and candidate.mark.name in _CHEAP
            for candidate in left
        )
        return cheap and slots * np.size(np.asarray(query.tokens)) <= _QUICK

    def candidates(self, tenant: str, query: Query) -> tuple["VersionRecord", ...]:
        """The versions that a query's hints leave. Raises NotFound if none."""
        found = fitting(self._snapshot(tenant).candidates, query, self._tokenizers)
        return tuple(candidate.record for candidate in found)

    def key_of(self, tenant: str, version_id: str) -> tuple["VersionRecord", Key | ForeignKey]:
        """A version and its key, from memory. Raises NotFound, KmsError or StoreError."""
        for candidate in self._snapshot(tenant).candidates:
            if candidate.record.id == version_id:
                return candidate.record, candidate.key
        raise NotFound("there is no such version of a key that can be read.")

    def forget(self, tenant: str | None = None) -> None:
        """Let go of the keys in memory, of one tenant or of all."""
        with self._lock:
            if tenant is None:
                self._snapshots.clear()
            else:
                self._snapshots.pop(tenant, None)

    # ------------------------------------------------------------------ keys in memory

    def _snapshot(self, tenant: str) -> _Snapshot:
        now = self._clock()
        snapshot = self._snapshots.get(tenant)
        if snapshot is not None and now - snapshot.checked < self._revalidate_s:
            return snapshot
        with self._lock:
            if len(self._busy) > 4 * _MAX_TENANTS:
                self._busy.clear()
            busy = self._busy.setdefault(tenant, threading.Lock())
        usable = snapshot is not None and now - snapshot.made < self._lifetime_s
        # While somebody asks, the others go on with what they have.
        if not busy.acquire(blocking=not usable):
            assert snapshot is not None
            return snapshot
        try:
            snapshot = self._snapshots.get(tenant)
            if snapshot is not None and self._clock() - snapshot.checked < self._revalidate_s:
                return snapshot
            return self._renewed(tenant, snapshot)
        finally:
            busy.release()

    def _renewed(self, tenant: str, old: _Snapshot | None) -> _Snapshot:
        now = self._clock()
        alive = old is not None and now - old.made < self._lifetime_s
        try:
            revision = self._keybook.revision(tenant)
            if old is not None and alive and revision == old.revision:
                old.checked, old.stale = now, False
                return old
            records = [
                version
                for key in self._keybook.keys(tenant)
                for version in key.versions
                if version.state.reads
            ]
        except StoreError:
            # An outage must not read as "no mark", nor forget a compromise for long.
            if old is None or not alive or now - old.checked > self._outage_s:
                raise
            old.stale = True
            return old
        known = {c.record.id: c for c in old.candidates} if old is not None and alive else {}
        made = old.made if old is not None and alive else now
        candidates: list[_Candidate] = []
        for record in records:
            before = known.get(record.id)
            key = before.key if before is not None else self._keybook.key_of(record)
            candidates.append(_Candidate(record, key))
        candidates.sort(key=lambda candidate: candidate.record.id)
        snapshot = _Snapshot(revision, tuple(candidates), made, now)
        with self._lock:
            self._snapshots[tenant] = snapshot
            self._snapshots.move_to_end(tenant)
            while len(self._snapshots) > _MAX_TENANTS:
                self._snapshots.popitem(last=False)
        return snapshot

    # ------------------------------------------------------------------ tests and judgement

    def _read(
        self,
        candidates: Sequence[_Candidate],
        query: Query,
        ids: TokenIds | None,
        clean: Cleaned | None,
        cautions: set[str],
    ) -> list[tuple[_Candidate, list[_Reading]]]:
        """Candidates that can be tested, each with its readings. Raises NoTokenizer if none can."""
        if clean is None:
            assert ids is not None
            only = [_Reading("given", ids, None)]
            return [(candidate, only) for candidate in candidates]
        made: dict[str, list[_Reading]] = {}
        read: list[tuple[_Candidate, list[_Reading]]] = []
        for candidate in candidates:
            named = query.tokenizer or candidate.record.spec.tokenizer_sha256
            # By the settings alone: were it by what fits the text, it would have to be paid for.
            which = named or self._tokenizers.only
            if which is None:
                continue
            if which not in made:
                try:
                    made[which] = self._readings(clean, which)
                except ModelError:
                    made[which] = []
            if made[which]:
                read.append((candidate, made[which]))
        if not read:
            raise _unreadable([candidate.record for candidate in candidates], self._tokenizers)
        if len(read) < len(candidates):
            cautions.add("tokenizer_missing")
        return read

    def _readings(self, clean: Cleaned, which: str) -> list[_Reading]:
        given = self._tokenizers.encode(clean.given.text, which)
        readings = [_Reading("given", given.ids, clean.given.origins[given.offsets])]
        if clean.text != clean.given.text:
            second = self._tokenizers.encode(clean.text, which)
            # A tokenizer may clean by itself; what is the same is not read, nor paid for, twice.
            if not np.array_equal(second.ids, given.ids):
                offsets = clean.origins[second.offsets]
                readings.append(_Reading("cleaned", second.ids, offsets))
        return readings

    def _judge(
        self,
        *,
        query: Query,
        snapshot: _Snapshot,
        outcomes: list[_Outcome],
        short: int,
        n_tokens: int,
        clean: Cleaned | None,
        sha256: str,
        since: datetime | None,
        cautions: set[str],
    ) -> Finding:
        independent = all(outcome.candidate.independent for outcome in outcomes) and all(
            outcome.reading.name == "given" for outcome in outcomes
        )
        logs = [outcome.log_pvalue for outcome in outcomes]
        adjusted = holm_sidak(logs) if independent else [float(p) for p in stats.holm(logs)]
        per_key = _per_key(outcomes, adjusted, since)
        n_tests = sum(outcome.candidate.slots for outcome in outcomes)
        n_readings = 1 + any(outcome.reading.name == "cleaned" for outcome in outcomes)
        limit = math.log(query.alpha)
        counting = [i for i, one in enumerate(per_key) if one.finding.counts]
        log_pvalue = per_key[counting[0]].finding.log_pvalue_holm if counting else 0.0
        best = per_key[counting[0]] if counting else (per_key[0] if per_key else None)
        found = [one for one in per_key if one.finding.log_pvalue_holm <= limit]
        hits = [one for one in found if one.finding.counts]
        verdict: Verdict = "inconclusive"
        if hits:
            verdict = "detected"
        elif not found and _too_short(per_key, n_tests, query.alpha):
            verdict = "too_short"
        if n_readings == 2:
            cautions.add("unusual_characters")
        cautions |= _cautions(found, hits)
        if best is not None and best.finding.n_repeated > best.finding.n_scored:
            cautions.add("repetitive")
        spans: tuple[MarkedSpan, ...] = ()
        heat: Heat | None = None
        if query.evidence and best is not None and best.finding.counts:
            spans, heat = _evidence(best.outcome, query.alpha, len(outcomes))
        reading = best.outcome.reading if best is not None else None
        names = sorted({one.outcome.candidate.mark.name for one in (hits[:1] or per_key)})
        return Finding(
            verdict=verdict,
            alpha=query.alpha,
            log_pvalue=log_pvalue,
            key_id=hits[0].finding.key_id if hits else None,
            technique="keyed statistical watermark" + (f" ({', '.join(names)})" if names else ""),
            n_tokens=n_tokens if reading is None else int(reading.ids.shape[0]),
            n_scored=0 if best is None else best.finding.n_scored,
            n_repeated=0 if best is None else best.finding.n_repeated,
            n_keys=len(per_key),
            n_tests=n_tests,
            n_readings=n_readings,
            per_key=tuple(one.finding for one in per_key),
            spans=spans,
            heat=heat,
            cautions=tuple(sorted(cautions)),
            unusual=() if clean is None else clean.unusual,
            method=_method(independent, len(per_key), n_tests, n_readings, short),
            content_sha256=sha256,
            content_kind="text" if clean is not None else "ids",
            tried=tuple(sorted(one.finding.key_id for one in per_key)),
            n_readable=len(snapshot.candidates),
            hints=_hints(query),
            revision=snapshot.revision,
        )


@dataclass(frozen=True, slots=True)
class _Judged:
    finding: KeyFinding
    outcome: _Outcome


def _tests(
    read: Sequence[tuple[_Candidate, list[_Reading]]], cautions: set[str]
) -> tuple[list[_Outcome], int]:
    """Every test, and how many candidates found all readings too short."""
    shared = _Shared()
    outcomes: list[_Outcome] = []
    short = mismatched = 0
    for candidate, readings in read:
        tested = False
        for reading in readings:
            try:
                outcomes.append(candidate.test(reading, shared))
                tested = True
            except TooShort:
                continue
            except VocabularyMismatch:
                mismatched += 1
                tested = True
                break
        short += not tested
    if mismatched:
        if not outcomes and not short:
            raise VocabularyMismatch(
                "the ids lie outside the vocabulary of every key that fits; were they made by "
                "another tokenizer?"
            )
        cautions.add("vocabulary_mismatch")
    return outcomes, short


def _unreadable(records: Sequence["VersionRecord"], tokenizers: Tokenizers) -> NoTokenizer:
    """Why none of these can be tested, and what to do."""
    unnamed = [one.id for one in records if one.spec.tokenizer_sha256 is None]
    unknown = [one.id for one in records if one.spec.tokenizer_sha256 is not None]
    said = []
    if unnamed:
        say = "does not say its tokenizer" if len(unnamed) == 1 else "do not say their tokenizer"
        said.append(f"{_listed(unnamed)} {say}")
    if unknown:
        say = "names one" if len(unknown) == 1 else "name one"
        said.append(f"{_listed(unknown)} {say} that cannot be read here")
    return NoTokenizer(
        f"{'; '.join(said)}: set [tokenizers] in the service's settings, create keys with "
        "--tokenizer, name a tokenizer in the request "
        f"({', '.join(tokenizers.names())}), or send token ids."
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _hints(query: Query) -> tuple[tuple[str, str], ...]:
    given = {"key": query.key, "model": query.model, "tokenizer": query.tokenizer}
    return tuple((name, value) for name, value in given.items() if value is not None)


def fitting(
    candidates: Sequence[_Candidate], query: Query, tokenizers: Tokenizers
) -> list[_Candidate]:
    """The candidates that the hints leave. Raises NotFound if none, ModelError for a tokenizer that
    the service does not have.
    """
    wanted = query.tokenizer
    if wanted is not None:
        try:
            wanted = tokenizers.sha256(wanted)
        except ModelError:
            # Of ids the fingerprint says enough; a text must be encoded.
            if query.text is not None or len(wanted) != 64:
                raise
    left = []
    for candidate in candidates:
        spec = candidate.record.spec
        if query.model is not None and spec.model != query.model:
            continue
        if query.key is not None and query.key not in (spec.name, candidate.record.id):
            continue
        if wanted is not None and spec.tokenizer_sha256 not in (None, wanted):
            continue
        left.append(candidate)
    if not left:
        raise NotFound(
            "no key that can be read fits this request; leave out the hints (model, key, "
            "tokenizer), or make a key."
        )
    return left


def holm_sidak(log_ps: Sequence[float]) -> list[float]:
    """Holm-Sidak's adjusted log p-values, in the order given: for independent p-values.

    With p ascending, adjusted_i = max over j <= i of 1 - (1 - p_j)**(k - j + 1).
    """
    order = sorted(range(len(log_ps)), key=lambda i: log_ps[i])
    adjusted = [0.0] * len(log_ps)
    floor = -math.inf
    for rank, index in enumerate(order):
        floor = max(floor, stats.sidak(min(0.0, log_ps[index]), len(log_ps) - rank))
        adjusted[index] = floor
    return adjusted


def _per_key(
    outcomes: Sequence[_Outcome],
    adjusted: Sequence[float],
    since: datetime | None,
) -> list[_Judged]:
    """The better reading of each version, best first."""
    best: dict[str, tuple[float, _Outcome]] = {}
    for outcome, log_p in zip(outcomes, adjusted, strict=True):
        name = outcome.candidate.record.id
        if name not in best or (log_p, outcome.log_pvalue) < (
            best[name][0],
            best[name][1].log_pvalue,
        ):
            best[name] = (log_p, outcome)
    judged = [
        _Judged(
            KeyFinding(
                key_id=name,
                mark=outcome.candidate.tag,
                state=str(outcome.candidate.record.state),
                log_pvalue=outcome.log_pvalue,
                log_pvalue_holm=log_p,
                n_scored=outcome.n_scored,
                n_repeated=outcome.n_repeated,
                slots=outcome.candidate.slots,
                reading=outcome.reading.name,
                counts=_counts(outcome.candidate.record, since),
                commitment=outcome.candidate.record.commitment,
                log_index=outcome.candidate.record.log_index,
            ),
            outcome,
        )
        for name, (log_p, outcome) in best.items()
    ]
    judged.sort(key=lambda one: (one.finding.log_pvalue_holm, one.finding.log_pvalue))
    return judged


def _counts(record: "VersionRecord", since: datetime | None) -> bool:
    """Whether what this version finds may count."""
    if record.promoted_at is None:
        return False
    if record.state is not State.COMPROMISED:
        return True
    return (
        since is not None
        and record.compromised_since is not None
        and since < record.compromised_since
    )


def _too_short(judged: Sequence[_Judged], n_tests: int, alpha: float) -> bool:
    scored = max((one.finding.n_scored for one in judged), default=0)
    return scored * _MOST_NATS < math.log(max(1, n_tests)) - math.log(alpha)


def _cautions(found: Sequence[_Judged], hits: Sequence[_Judged]) -> set[str]:
    cautions = {
        "pre_active_key" if one.outcome.candidate.record.promoted_at is None else "compromised_key"
        for one in found
        if not one.finding.counts
    }
    if len(found) > 1:
        cautions.add("several_keys")
    if not hits:
        return cautions
    best = hits[0]
    record = best.outcome.candidate.record
    if best.finding.reading == "cleaned":
        cautions.add("cleaned_reading")
    if record.spec.source == "imported":
        cautions.add("imported_key")
    if isinstance(best.outcome.candidate.mark, Profile):
        cautions.add("foreign_profile")
    if best.outcome.candidate.slots_beside(best.outcome):
        cautions.add("several_slots")
    return cautions


def _method(independent: bool, n_keys: int, n_tests: int, n_readings: int, short: int) -> str:
    if n_keys == 0:
        return "nothing was tested: no key scores a position of this text"
    how = "Holm-Sidak" if independent else "Holm (Bonferroni)"
    text = f"exact tail, Sidak over each key's slots, {how} over {n_keys} keys"
    if n_readings > 1:
        text += f" x {n_readings} readings"
    text += f", {n_tests} tests in all"
    return text + (f"; {short} keys score no position" if short else "")


def _evidence(
    outcome: _Outcome, alpha: float, n_tests: int
) -> tuple[tuple[MarkedSpan, ...], Heat | None]:
    """Where the mark is, for schemes of ours, paid for by Bonferroni over keys and readings."""
    candidate, reading = outcome.candidate, outcome.reading
    if isinstance(candidate.mark, Profile) or not isinstance(candidate.key, Key):
        return (), None
    from filigrane.localisation import localise

    result = localise(reading.ids, candidate.key, candidate.mark, alpha=alpha / n_tests)
    offsets = reading.offsets

    def characters(start: int, stop: int) -> tuple[int | None, int | None]:
        if offsets is None or stop <= start:
            return None, None
        return int(offsets[start, 0]), int(offsets[stop - 1, 1])

    spans = tuple(
        MarkedSpan(
            start=span.start,
            stop=span.stop,
            start_char=characters(span.start, span.stop)[0],
            stop_char=characters(span.start, span.stop)[1],
            log_pvalue=min(0.0, span.log_pvalue + math.log(n_tests)),
            n_scored=span.n_scored,
        )
        for span in result.spans
    )
    heat = Heat(
        evidence=result.evidence,
        offsets=offsets,
        key_id=candidate.record.id,
        reading=reading.name,
    )
    return spans, heat
