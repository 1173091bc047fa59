"""The tier for everybody: three classes in words, and not much of an oracle.

Whoever may ask often, and learns a little from every answer, can climb towards a text that is no
longer detected, or is detected without having been marked. So there is no number in an answer, the
same text always gets the same one, short texts get none, identities and networks are limited, and
so is the number of texts that are nearly alike, whoever asks about them:

    shingles    8 characters of the cleaned text, case and spaces folded, hashed under a random key
    sketch      the smallest hash in each of 64 bins (one-permutation MinHash), 16 bands of 4
    alike       3 bands in common: likely from a Jaccard similarity of about 0.7 on

Key and sketches live in memory for an hour and are then forgotten together. Nothing else of a text
is kept. Texts drift while somebody climbs: each counted text joins the group that it is like.
"""

import dataclasses
import hashlib
import ipaddress
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import limits as rates
import numpy as np
import numpy.typing as npt
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from filigrane.errors import FiligraneError
from filigrane.service.contents import cleaned
from filigrane.service.detecting import Detector, Finding, Query, Verdict

__all__ = [
    "HEADLINES",
    "LIMITS",
    "TECHNIQUE",
    "BudgetSpent",
    "NearDuplicates",
    "PublicAnswer",
    "PublicLimits",
    "PublicTier",
    "network_of",
]

HEADLINES: Final[dict[Verdict, tuple[str, str]]] = {
    "detected": (
        "A mark was found.",
        "The text carries the mark of one of this provider's keys: at least parts of it passed "
        "through a model of theirs. That does not say who wrote it, or what was changed since.",
    ),
    "inconclusive": (
        "No mark was found.",
        "Nothing follows from that: the text may be human, of another model, edited, translated, "
        "or of a kind that cannot be marked.",
    ),
    "too_short": (
        "The text is too short to say.",
        "Short texts hold too little evidence either way. Send a longer part of the same text.",
    ),
}
"""Verdict -> what is said, and what it means."""
TECHNIQUE: Final = "keyed statistical watermark"
LIMITS: Final = (
    "A mark can be removed by rewriting or translation, and be carried along by quotation.",
    "A false detection happens with a probability of at most the level that is stated, over the "
    "choice of the keys.",
    "This service does not recognise machine text in general, only its own marks.",
)
"""What everybody is told beside the answer."""

_SHINGLE: Final = 8
_BINS: Final = 64
_BANDS: Final = 16
_COMMON: Final = 3
_KEY_LIFETIME_S: Final = 3600.0
_ODD: Final = np.uint64(1)


class BudgetSpent(FiligraneError):
    """Somebody asked too often. reason: "identity", "network" or "near_duplicates"; retry_after_s:
    when asking again makes sense.
    """

    def __init__(self, message: str, *, reason: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicLimits:
    """How much anybody may ask.

    min_tokens: shorter texts are "too_short"; alpha: the one level of this tier; per_identity,
    per_network: rates in the words of `limits` ("60/minute"); near_duplicates: texts that are
    nearly alike, per hour, whoever sends them; 0 for no such limit; max_characters: of one text.
    """

    min_tokens: int = 200
    alpha: float = 1e-6
    per_identity: str = "30/minute"
    per_network: str = "120/minute"
    near_duplicates: int = 20
    max_characters: int = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicAnswer:
    """What the public is told. finding: for receipts and counters; never shown."""

    verdict: Verdict
    headline: str
    explanation: str
    technique: str
    limits: tuple[str, ...]
    min_tokens: int
    finding: Finding

    @property
    def as_told(self) -> Finding:
        """The finding with the verdict that was told, for a receipt."""
        if self.verdict == self.finding.verdict:
            return self.finding
        return dataclasses.replace(self.finding, verdict=self.verdict, key_id=None)


@dataclass(frozen=True, slots=True)
class _Counted:
    group: int
    bands: tuple[bytes, ...]
    answered: bool


class NearDuplicates:
    """Counts texts that are nearly alike, without keeping them. Thread-safe.

    budget: how many different texts a group may have in the lifetime of a key; most: texts
    remembered; clock: seconds, monotonic.
    """

    def __init__(
        self,
        budget: int,
        *,
        most: int = 16_384,
        lifetime_s: float = _KEY_LIFETIME_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._most = most
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._lock = threading.Lock()
        self._renew()

    def __repr__(self) -> str:
        return f"<NearDuplicates budget={self._budget}>"

    def spend(self, scope: str, text: str) -> float:
        """Count a text; 0.0 if it may be answered, else the seconds until it might.

        scope: texts of different scopes are never alike. The very same text costs nothing again.
        """
        with self._lock:
            if self._clock() - self._born >= self._lifetime_s:
                self._renew()
            born, key = self._born, self._key
        digest = hashlib.blake2b(
            f"{scope}\0{text}".encode("utf-8", "surrogatepass"), key=key, digest_size=16
        ).digest()
        bands = self._bands(scope, text, key)
        with self._lock:
            if born != self._born:
                return 0.0
            known = self._texts.get(digest)
            group = self._group_of(bands) if known is None else known.group
            answered = (
                known.answered if known is not None else (self._sizes.get(group, 0) < self._budget)
            )
            if known is None:
                # What is not answered joins as well, or somebody could walk away unseen.
                self._remember(digest, _Counted(group, bands, answered))
        return 0.0 if answered else max(1.0, self._lifetime_s - (self._clock() - born))

    def _remember(self, digest: bytes, counted: _Counted) -> None:
        self._texts[digest] = counted
        if counted.answered:
            self._sizes[counted.group] = self._sizes.get(counted.group, 0) + 1
        for band in counted.bands:
            self._groups[band] = counted.group
        while len(self._texts) > self._most:
            _, old = self._texts.popitem(last=False)
            for band in old.bands:
                if self._groups.get(band) == old.group:
                    del self._groups[band]
            if old.answered:
                self._sizes[old.group] -= 1
                if not self._sizes[old.group]:
                    del self._sizes[old.group]

    def __len__(self) -> int:
        return len(self._texts)

    def _renew(self) -> None:
        self._born = self._clock()
        self._key = secrets.token_bytes(32)
        self._texts: OrderedDict[bytes, _Counted] = OrderedDict()
        self._groups: dict[bytes, int] = {}
        self._sizes: dict[int, int] = {}
        self._next = 0

    def _group_of(self, bands: tuple[bytes, ...]) -> int:
        """The group that a text is alike, the largest if there are several, or a new one."""
        hits: dict[int, int] = {}
        for band in bands:
            group = self._groups.get(band)
            if group is not None:
                hits[group] = hits.get(group, 0) + 1
        # Counted over groups, so that a text between two parts of a split group counts too.
        if sum(hits.values()) >= _COMMON:
            return max(hits, key=lambda group: (self._sizes.get(group, 0), group))
        self._next += 1
        return self._next

    @staticmethod
    def _bands(scope: str, text: str, key: bytes) -> tuple[bytes, ...]:
        folded = " ".join(cleaned(text).text.casefold().split())
        sketch = _sketch(folded, key)
        rows = sketch.reshape(_BANDS, _BINS // _BANDS)
        head = scope.encode("utf-8") + b"\0"
        return tuple(
            hashlib.blake2b(
                head + bytes([number]) + row.tobytes(), key=key, digest_size=12
            ).digest()
            for number, row in enumerate(rows)
        )


def _sketch(text: str, key: bytes) -> npt.NDArray[np.uint32]:
    """One-permutation MinHash, (64,) uint32, of a text's shingles."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    if codes.shape[0] < _SHINGLE:
        codes = np.pad(codes, (0, _SHINGLE - codes.shape[0]))
    multipliers = np.frombuffer(
        hashlib.blake2b(b"shingles", key=key, digest_size=8 * (_SHINGLE - 1)).digest()
        + hashlib.blake2b(b"mix", key=key, digest_size=8).digest(),
        "<u8",
    ).astype(np.uint64)
    n = codes.shape[0] - _SHINGLE + 1
    with np.errstate(over="ignore"):
        hashes = np.zeros(n, dtype=np.uint64)
        for place in range(_SHINGLE):
            hashes += codes[place : place + n] * (multipliers[place] | _ODD)
            hashes ^= hashes >> np.uint64(29)
            hashes *= multipliers[(place + 3) % _SHINGLE] | _ODD
        hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(0xD6E8FEB86659FD93)
        hashes ^= hashes >> np.uint64(32)
    bins = (hashes >> np.uint64(58)).astype(np.int64)
    smallest = np.full(_BINS, 0xFFFFFFFF, dtype=np.uint32)
    np.minimum.at(smallest, bins, hashes.astype(np.uint32))
    return smallest


class PublicTier:
    """Answers the public about the texts of a tenant. Methods may be called from several threads.

    What it remembers is of this process: with n of them, budgets are up to n times as large.
    """

    def __init__(
        self,
        detector: Detector,
        limits: PublicLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._detector = detector
        self.limits: Final = limits or PublicLimits()
        self._alike = NearDuplicates(self.limits.near_duplicates, clock=clock)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._per_identity = _rate(self.limits.per_identity)
        self._per_network = _rate(self.limits.per_network)

    def __repr__(self) -> str:
        return f"<PublicTier {self.limits}>"

    def answer(
        self, tenant: str, text: str, *, identity: str | None, address: str | None
    ) -> PublicAnswer:
        """The answer, the same for the same text.

        identity: who asks, as far as known (the name of a token), else None; address: where from,
        of which the network is limited as well. Raises BudgetSpent, and what Detector.detect does.
        """
        self._spend_rate("identity", self._per_identity, tenant, identity or address)
        self._spend_rate("network", self._per_network, tenant, network_of(address))
        if len(text) > self.limits.max_characters:
            raise BudgetSpent(
                f"a text has at most {self.limits.max_characters} characters here; send a part.",
                reason="length",
                retry_after_s=0.0,
            )
        if self.limits.near_duplicates:
            wait = self._alike.spend(tenant, text)
            if wait:
                raise BudgetSpent(
                    "too many texts that are nearly the same were asked about in this hour. "
                    "Verified experts have a tier without this limit.",
                    reason="near_duplicates",
                    retry_after_s=wait,
                )
        finding = self._detector.detect(tenant, Query(text=text, alpha=self.limits.alpha))
        verdict = finding.verdict
        if finding.n_tokens < self.limits.min_tokens:
            verdict = "too_short"
        headline, explanation = HEADLINES[verdict]
        return PublicAnswer(
            verdict=verdict,
            headline=headline,
            explanation=explanation,
            technique=TECHNIQUE,
            limits=LIMITS,
            min_tokens=self.limits.min_tokens,
            finding=finding,
        )

    def _spend_rate(
        self, reason: str, rate: rates.RateLimitItem, tenant: str, who: str | None
    ) -> None:
        if who is None or self._limiter.hit(rate, reason, tenant, who):
            return
        reset = self._limiter.get_window_stats(rate, reason, tenant, who).reset_time
        raise BudgetSpent(
            f"too many requests; the limit is {rate} for one {reason}. Wait a little.",
            reason=reason,
            retry_after_s=max(1.0, reset - time.time()),
        )


def network_of(address: str | None) -> str | None:
    """The network that an address is limited with: /24 of IPv4, /48 of IPv6; None for none."""
    if address is None:
        return None
    try:
        where = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    if isinstance(where, ipaddress.IPv6Address) and where.ipv4_mapped is not None:
        where = where.ipv4_mapped
    prefix = 24 if where.version == 4 else 48
    return str(ipaddress.ip_network(f"{where}/{prefix}", strict=False))


def _rate(words: str) -> rates.RateLimitItem:
    try:
        return rates.parse(words)
    except ValueError:
        raise FiligraneError(
            f"{words!r} is no rate; write a number and a time, such as 60/minute."
        ) from None
