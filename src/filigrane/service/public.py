"""The tier for everybody: three classes in words, and not much of an oracle.

Whoever may ask often, and learns a little from every answer, can climb towards a text that is no
longer detected, or is detected without having been marked. So there is no number in an answer, the
same text always gets the same one, short texts get none, identities and networks are limited, and
so is how many texts that are nearly alike an identity or network may ask about:

    shingles    8 characters of the cleaned text, case and spaces folded, hashed under a random key
    features    the smallest hash among every 31 in a row (winnowing): about one in 16 shingles,
                chosen by what is around them, so that text added elsewhere changes none
    alike       half of some 24 features in a row, about 400 characters, are of one group of texts

Features live in memory for an hour and are then forgotten together with their key. Nothing else of
a text is kept. Texts drift while somebody climbs: each counted text joins the group that it is most
like, and one that is like none founds a group of all its features, also of those that stood in
others: nobody can spread a text over many groups first, to be of none of them. Who asks first about
texts of a kind is always answered, or one could lock a text out for all others; beyond that all
askers together have a budget as well, many times as large.

This slows a climber down and is no wall: networks can be rented, memory is bounded and forgets what
is oldest first, and words put in between all others make any text unlike.
"""

import dataclasses
import hashlib
import ipaddress
import os
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

from filigrane.errors import BudgetSpent, FiligraneError, ModelError, NotReady
from filigrane.service.contents import Cleaned, cleaned
from filigrane.service.detecting import CAUTIONS, Detector, Finding, Query, Said, Verdict

__all__ = [
    "HEADLINES",
    "LIMITS",
    "TECHNIQUE",
    "NearDuplicates",
    "PublicAnswer",
    "PublicLimits",
    "PublicTier",
    "network_of",
]

HEADLINES: Final[dict[Said, tuple[str, str]]] = {
    "detected": (
        "A mark was found.",
        "The text carries the mark of one of this provider's keys: at least parts of it passed "
        "through a model of theirs. That does not say who wrote it, or what was changed since.",
    ),
    "uncounted": (
        "A mark was found that does not count.",
        "It agrees with a key that others may have had, or that never came into use. So it says "
        "nothing of where the text is from.",
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
"""`Finding.said` -> what is said, and what it means."""
TECHNIQUE: Final = "keyed statistical watermark"
LIMITS: Final = (
    "A mark can be removed by rewriting or translation, and be carried along by quotation.",
    "A false detection happens with a probability of at most the level that is stated, over the "
    "choice of the keys.",
    "This service does not recognise machine text in general, only its own marks.",
)
"""What everybody is told beside the answer."""

_SHINGLE: Final = 8
_SPREAD: Final = 31
_WINDOW: Final = 24
# Groups that one feature is of; the oldest are dropped, or texts could be made that take long.
_OF_ONE: Final = 32
_KEY_LIFETIME_S: Final = 3600.0
_WIDE: Final = 50
_ODD: Final = np.uint64(1)
_TOLD: Final = ("foreign_profile", "imported_key", "several_slots")
_NOUNS: Final = {
    "identity": "identity",
    "network": "network",
    "receipts": "identity or network that asks for receipts",
}
_UNREAD: Final = frozenset({"stale_keys", "tokenizer_missing"})
# Texts that are worked on at once, and how long others wait for a turn, seconds.
_AT_ONCE: Final = max(2, os.cpu_count() or 2)
_PATIENCE_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicLimits:
    """How much anybody may ask.

    min_tokens: shorter texts are "too_short"; alpha: the one level of this tier; per_identity,
    per_network: rates in the words of `limits` ("60/minute"); near_duplicates: texts that are
    nearly alike, per hour, of one identity, or of one network without identities, and fifty times
    as many of all together; 0 for no such limit; max_characters: of one text; receipts: rate of
    signed receipts, each of which is a line in the log for ever, of one identity or network.
    """

    min_tokens: int = 200
    alpha: float = 1e-6
    per_identity: str = "30/minute"
    per_network: str = "120/minute"
    near_duplicates: int = 20
    max_characters: int = 20_000
    receipts: str = "20/hour"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicAnswer:
    """What the public is told. notes: what the validity of a found mark depends on; finding: for
    receipts and counters; never shown.
    """

    verdict: Verdict
    headline: str
    explanation: str
    technique: str
    limits: tuple[str, ...]
    notes: tuple[str, ...]
    min_tokens: int
    finding: Finding

    @property
    def as_told(self) -> Finding:
        """The finding for a receipt, with no more than was told."""
        return dataclasses.replace(
            self.finding,
            technique=TECHNIQUE,
            cautions=() if self.verdict == "too_short" else self.finding.cautions,
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """founded: whether the text at hand founded it, or joined."""

    number: int
    founded: bool


@dataclass(frozen=True, slots=True)
class _Counted:
    """A text. features: those that it brought into its group."""

    group: _Group
    features: tuple[int, ...]
    answered: bool


class NearDuplicates:
    """Counts texts that are nearly alike, without keeping them. Thread-safe.

    budget: how many different texts that are alike somebody may have in the lifetime of a key;
    together: how many all have of one tenant, 50 times as many if None; most: features remembered,
    some hundred bytes each; clock: seconds, monotonic.
    """

    def __init__(
        self,
        budget: int,
        *,
        together: int | None = None,
        most: int = 250_000,
        lifetime_s: float = _KEY_LIFETIME_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._together = _WIDE * budget if together is None else together
        self._most = most
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._lock = threading.Lock()
        self._renew()

    def __repr__(self) -> str:
        return f"<NearDuplicates budget={self._budget}>"

    def spend(self, tenant: str, who: str, text: Cleaned) -> float:
        """Count a text; 0.0 if it may be answered, else the seconds until it might.

        Texts of different tenants are never alike. The very same text costs nothing again, and the
        first of its kind that somebody asks about is always answered.
        """
        with self._lock:
            if self._clock() - self._born >= self._lifetime_s:
                self._renew()
            born, key = self._born, self._key
        hashes = _features(" ".join(text.text.casefold().split()), key)
        own = self._named(f"{tenant}\0{who}", text.given.text, hashes, key)
        wide = self._named(tenant, text.given.text, hashes, key)
        with self._lock:
            if born != self._born:
                return 0.0
            known = self._texts.get(own[0])
            if known is None:
                # What is not answered joins as well, or somebody could walk away unseen.
                group, everybodys = self._group_of(own[1]), self._texts.get(wide[0])
                total = self._group_of(wide[1]) if everybodys is None else everybodys.group
                size = self._sizes.get(group.number, 0)
                free = everybodys is not None and everybodys.answered
                answered = size < self._budget and (
                    size == 0 or free or self._sizes.get(total.number, 0) < self._together
                )
                known = self._remember(own, group, answered)
                if not free:
                    self._forget(wide[0])
                    self._remember(wide, total, answered)
                while self._n_features > self._most and len(self._texts) > 2:
                    self._forget(next(iter(self._texts)))
        return 0.0 if known.answered else max(1.0, self._lifetime_s - (self._clock() - born))

    @staticmethod
    def _named(
        scope: str, text: str, hashes: npt.NDArray[np.uint64], key: bytes
    ) -> tuple[bytes, tuple[int, ...]]:
        """Digest and features of a text, which are others in each scope."""
        data = f"{scope}\0{text}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(data, key=key, digest_size=16).digest()
        other = hashlib.blake2b(scope.encode("utf-8"), key=key, digest_size=8).digest()
        mixed = hashes ^ np.uint64(int.from_bytes(other, "little"))
        return digest, tuple(dict.fromkeys(mixed.tolist()))

    def _remember(
        self, named: tuple[bytes, tuple[int, ...]], group: _Group, answered: bool
    ) -> _Counted:
        digest, features = named
        number = group.number
        new = []
        for feature in features:
            groups = self._groups.setdefault(feature, [])
            # Who joins brings only what nobody had: no feature is carried into another's group.
            if groups and not group.founded:
                continue
            groups.append(number)
            new.append(feature)
            if len(groups) > _OF_ONE:
                del groups[0]
            else:
                self._n_features += 1
        self._n_features += 1
        counted = self._texts[digest] = _Counted(group, tuple(new), answered)
        if answered:
            self._sizes[number] = self._sizes.get(number, 0) + 1
        return counted

    def _forget(self, digest: bytes) -> None:
        old = self._texts.pop(digest, None)
        if old is None:
            return
        number = old.group.number
        for feature in old.features:
            groups = self._groups.get(feature, [])
            if number in groups:  # or it was dropped before
                groups.remove(number)
                self._n_features -= 1
                if not groups:
                    del self._groups[feature]
        self._n_features -= 1
        if old.answered:
            self._sizes[number] -= 1
            if not self._sizes[number]:
                del self._sizes[number]

    def __len__(self) -> int:
        return self._n_features

    def _renew(self) -> None:
        self._born = self._clock()
        self._key = secrets.token_bytes(32)
        self._texts: OrderedDict[bytes, _Counted] = OrderedDict()
        self._groups: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}
        self._n_features = 0
        self._next = 0

    def _group_of(self, features: tuple[int, ...]) -> _Group:
        """The largest group that some part of a text is of, or a new one."""
        found = [self._groups.get(feature, ()) for feature in features]
        width = min(_WINDOW, len(found))
        counts: dict[int, int] = {}
        alike: set[int] = set()
        for place, groups in enumerate(found):
            for gone in found[place - width] if place >= width else ():
                counts[gone] -= 1
            for group in groups:
                counts[group] = counts.get(group, 0) + 1
                if 2 * counts[group] >= width:
                    alike.add(group)
        if alike:
            largest = max(alike, key=lambda group: (self._sizes.get(group, 0), -group))
            return _Group(largest, founded=False)
        self._next += 1
        return _Group(self._next, founded=True)


def _features(text: str, key: bytes) -> npt.NDArray[np.uint64]:
    """Hashes of the winnowed shingles of a text, in order."""
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
    rows = np.lib.stride_tricks.sliding_window_view(hashes, min(_SPREAD, n))
    chosen = np.unique(rows.argmin(axis=1) + np.arange(rows.shape[0]))
    found: npt.NDArray[np.uint64] = hashes[chosen]
    return found


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
        self._receipts = _rate(self.limits.receipts)
        self._places = threading.BoundedSemaphore(_AT_ONCE)

    def __repr__(self) -> str:
        return f"<PublicTier {self.limits}>"

    def answer(
        self,
        tenant: str,
        text: str,
        *,
        identity: str | None,
        address: str | None,
        receipt: bool = False,
    ) -> PublicAnswer:
        """The answer, the same for the same text.

        identity: who asks, as far as known (the name of a token), else None; address: where from,
        of which the network is limited as well; receipt: whether one will be issued. Raises
        BudgetSpent; NotReady if nothing was found and not all keys could be read, or too many ask
        at once; and what Detector.detect does.
        """
        network = network_of(address)
        self._spend_rate("identity", self._per_identity, tenant, identity or address)
        self._spend_rate("network", self._per_network, tenant, network)
        who = f"identity {identity}" if identity is not None else f"network {network}"
        if receipt:
            self._spend_rate("receipts", self._receipts, tenant, who)
        if len(text) > self.limits.max_characters:
            raise BudgetSpent(
                f"a text has at most {self.limits.max_characters} characters here; send a part.",
                reason="length",
                retry_after_s=0.0,
            )
        if not self._places.acquire(timeout=_PATIENCE_S):
            raise NotReady("too many texts are tested at the moment; try again in a minute.")
        try:
            return self._answer(tenant, text, who)
        finally:
            self._places.release()

    def _answer(self, tenant: str, text: str, who: str) -> PublicAnswer:
        clean = cleaned(text)
        if self.limits.near_duplicates:
            wait = self._alike.spend(tenant, who, clean)
            if wait:
                raise BudgetSpent(
                    "too many texts that are nearly the same were asked about in this hour. "
                    "Verified experts have a tier without this limit.",
                    reason="near_duplicates",
                    retry_after_s=wait,
                )
        query = Query(text=text, alpha=self.limits.alpha, min_tokens=self.limits.min_tokens)
        try:
            finding = self._detector.detect(tenant, query, clean=clean)
        except ModelError:
            raise _unread() from None
        if finding.verdict == "inconclusive" and _UNREAD & set(finding.cautions):
            raise _unread()
        headline, explanation = HEADLINES[finding.said]
        return PublicAnswer(
            verdict=finding.verdict,
            headline=headline,
            explanation=explanation,
            technique=TECHNIQUE,
            limits=LIMITS,
            notes=tuple(CAUTIONS[code] for code in _TOLD if code in finding.cautions),
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
            f"too many requests; the limit is {rate} for one {_NOUNS[reason]}. Wait a little.",
            reason=reason,
            retry_after_s=max(1.0, reset - time.time()),
        )


def _unread() -> NotReady:
    return NotReady(
        "not all keys of this service can be read at the moment, so that nothing can be said of "
        "this text. Its operator finds more in /readyz: a database that does not answer, or a "
        "tokenizer that the settings or a key do not name."
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
