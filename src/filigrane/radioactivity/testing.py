"""The test itself: evidence, a key, a scheme -> a p-value, an effect and its controls.

Knows nothing of models, servers or files. H0: what the suspect predicts or writes at the scored
positions is independent of the keyed numbers there. "It was not trained on text marked with this
key" lies inside H0 if the rules of `rules` were kept; the probability is over the key.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import Evidence
from filigrane.detection import totals
from filigrane.errors import EvidenceError, FiligraneError
from filigrane.keys import MarkingKey
from filigrane.radioactivity.evidence import Tuples, Weighted
from filigrane.radioactivity.rules import Ledger, first_rows
from filigrane.radioactivity.weighted import ScoreLaw, tail
from filigrane.schemes.base import Scheme, require_scheme

HYPOTHESIS: Final = (
    "The suspect's predictions at the scored positions are independent of the key: it was not "
    "trained, directly or through another model, on text marked with this key."
)
"""What a small p-value speaks against, in one sentence."""

_LEVEL: Final = math.log(0.025)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoys:
    """The same test under keys that nobody ever used: a control that runs beside the true key.

    n: how many; rank: how many of them reach the true key's statistic; log_pvalue: (rank + 1) /
    (n + 1), valid without any law, with a floor; ks_log_pvalue: Kolmogorov-Smirnov, decoys'
    p-values against the uniform law (small: the test's law is wrong here); z_mean, z_sd: of the
    decoys' standardised sums, expected near 0 and 1; z: those sums, (n,) float64; seed: of the
    decoy keys.
    """

    n: int
    rank: int
    log_pvalue: float
    ks_log_pvalue: float
    z_mean: float
    z_sd: float
    z: tuple[float, ...]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RadioactivityResult:
    """What the test found; a value to print, keep and dispute. It has no truth value: compare
    `log_pvalue` with the alpha that was chosen before.

    statistic: 'argmax count', 'soft', 'differential', 'answer count' or 'answer count, filtered';
    log_pvalue: natural log; method: how that tail was computed; log_bound: a p-value that is never
    too small (Chernoff), equal to log_pvalue where that is exact; total: the statistic, summed over
    the key's slots; z: standardised; n_scored: pairs, or positions summed into windows; n_windows:
    distinct windows; n_slots; effect, effect_low, effect_high: mean score above what chance gives,
    in `effect_unit`, with a 95 % interval; effect_interval: how that was computed; concentration:
    largest share of one window in the variance; ledger: positions dropped by each rule; decoys:
    control; scheme: tag; key: name; hypothesis: H0 in one sentence.
    """

    statistic: str
    log_pvalue: float
    method: str
    log_bound: float
    total: float
    z: float
    n_scored: int
    n_windows: int
    n_documents: int
    n_slots: int
    effect: float
    effect_low: float
    effect_high: float
    effect_unit: str
    effect_interval: str
    concentration: float
    ledger: Ledger
    decoys: Decoys | None
    scheme: str
    key: str
    hypothesis: str = HYPOTHESIS

    @property
    def pvalue(self) -> float:
        """exp(log_pvalue); underflows to 0.0 below about 1e-308, log_pvalue does not."""
        return math.exp(self.log_pvalue)

    @property
    def log10_pvalue(self) -> float:
        """log_pvalue in decimal digits."""
        return self.log_pvalue / math.log(10)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a RadioactivityResult is not true or false; "
            "compare result.log_pvalue with math.log(alpha)."
        )


def test(
    evidence: Tuples | Weighted,
    key: MarkingKey,
    scheme: Scheme,
    *,
    decoys: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RadioactivityResult:
    """Was the suspect trained on text marked with this key?

    evidence: of `argmax`, `soft`, `differential` or `answers`, gathered without the key; decoys:
    control keys to run beside (0 for none), drawn from `seed`; progress(done, total) is called as
    they go. A key with several slots marks each text under one of them, and a model learns the
    mixture: the statistic is the sum over all slots, whose law is as exact as that of one. Raises
    EvidenceError if the windows have another width than the scheme's, SchemeError for a scheme
    whose scores are not independent, FiligraneError for what is no key.
    """
    require_scheme(scheme)
    law = ScoreLaw.of(scheme)
    if not isinstance(key, MarkingKey):
        raise FiligraneError(
            f"test takes one key: pass a Key or key.user(i), not {type(key).__name__}."
        )
    if evidence.width != scheme.context_width:
        raise EvidenceError(
            f"the evidence was gathered for windows of {evidence.width} tokens, but {scheme.name} "
            f"looks at {scheme.context_width}; gather it with width={scheme.context_width}."
        )
    if decoys < 0 or (0 < decoys < 20):
        raise EvidenceError(f"decoys must be 0 or at least 20, got {decoys}; 200 is usual.")
    judge = _Counted(evidence, law) if isinstance(evidence, Tuples) else _Summed(evidence, law)
    words = key.prf_keys(scheme.label)
    slots = int(words.shape[0])
    total = sum(judge.total(word) for word in words)
    log_pvalue, log_bound = judge.tail(total, slots)
    control = None
    if decoys:
        sums = np.empty(decoys)
        for number, strangers in enumerate(_strangers(decoys, slots, seed)):
            sums[number] = sum(judge.total(word) for word in strangers)
            if progress is not None:
                progress(number + 1, decoys)
        control = _control(sums, total, judge, slots, seed)
    excess, low, high, how = judge.effect(total, slots)
    return RadioactivityResult(
        statistic=evidence.name,
        log_pvalue=log_pvalue,
        method=judge.method + (f", summed over {slots} slots" if slots > 1 else ""),
        log_bound=log_bound,
        total=total,
        z=judge.z(total, slots),
        n_scored=judge.n_scored,
        n_windows=judge.n_windows,
        n_documents=evidence.n_documents,
        n_slots=slots,
        effect=excess,
        effect_low=low,
        effect_high=high,
        effect_unit=law.unit,
        effect_interval=how,
        concentration=judge.concentration,
        ledger=dict(evidence.ledger),
        decoys=control,
        scheme=scheme.tag,
        key=key.name,
    )


class _Counted:
    """Pairs, each with one score: the scheme's own exact tail."""

    method = "exact tail"

    def __init__(self, evidence: Tuples, law: ScoreLaw) -> None:
        self._law = law
        self._evidence = pairs(evidence)
        self.n_scored = len(evidence)
        self.n_windows = int(first_rows(evidence.rows[:, :-1]).shape[0])
        self.concentration = 1.0 / self.n_scored

    def total(self, words: npt.NDArray[np.uint32]) -> float:
        return totals(self._evidence, words[None], self._law.scheme)[0]

    def tail(self, total: float, slots: int) -> tuple[float, float]:
        exact = self._law.scheme.log_sf(total, self.n_scored * slots)
        return exact, exact

    def z(self, total: float, slots: int) -> float:
        n = self.n_scored * slots
        return (total - n * self._law.mean) / math.sqrt(n * self._law.variance)

    def middle(self, total: float, slots: int) -> float:
        """The p-value's middle, (P(>=) + P(>)) / 2, which is uniform for discrete sums too."""
        return spread_pvalue(total, self.n_scored * slots, self._law, 0.5)

    def effect(self, total: float, slots: int) -> tuple[float, float, float, str]:
        n = self.n_scored * slots
        mean = total / n
        if self._law.unit != "share of green tokens":
            half = 1.959964 * math.sqrt(self._law.variance / n)
            return (
                mean - self._law.mean,
                mean - self._law.mean - half,
                (mean - self._law.mean + half),
                "normal, variance under H0",
            )
        low, high = clopper_pearson(round(total), n)
        return (
            mean - self._law.mean,
            low - self._law.mean,
            high - self._law.mean,
            "Clopper-Pearson, exact",
        )


class _Summed:
    """Weights on many tokens per window: saddlepoint of the exact cumulants."""

    method = "saddlepoint of exact cumulants"

    def __init__(self, evidence: Weighted, law: ScoreLaw) -> None:
        self._law = law
        self._evidence = evidence
        self.n_scored = evidence.n_candidates
        self.n_windows = len(evidence)
        self.concentration = evidence.concentration
        self._spread: float = law.variance * float(evidence.weights @ evidence.weights)
        self._cubes = float((evidence.weights**3).sum())

    def total(self, words: npt.NDArray[np.uint32]) -> float:
        e = self._evidence
        return self._law.total(words, e.windows, e.starts, e.tokens, e.weights)

    def tail(self, total: float, slots: int) -> tuple[float, float]:
        found = tail(total, self._evidence.weights, self._law, slots)
        return found.log_pvalue, found.log_bound

    def z(self, total: float, slots: int) -> float:
        return total / math.sqrt(slots * self._spread)

    def middle(self, total: float, slots: int) -> float:
        """Edgeworth's first correction to the normal tail; a saddlepoint per decoy is slow."""
        z = self.z(total, slots)
        skew = self._law.skew * self._cubes / math.sqrt(slots * self._spread**3)
        density = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
        tail = math.exp(stats.log_sf_normal(z)) + density * skew * (z * z - 1.0) / 6.0
        return float(min(1.0, max(0.0, tail)))

    def effect(self, total: float, slots: int) -> tuple[float, float, float, str]:
        n = self.n_scored * slots
        half = 1.959964 * math.sqrt(slots * self._spread) / n
        return total / n, total / n - half, total / n + half, "normal, variance under H0"


def pairs(evidence: Tuples) -> Evidence:
    """Pairs as the compiled scan wants them: each row is a text of its own with one position."""
    n, length = evidence.rows.shape
    return Evidence(
        ids=np.ascontiguousarray(evidence.rows).reshape(-1),
        positions=np.arange(n, dtype=np.int64) * length + (length - 1),
        width=length - 1,
        n_repeated=0,
    )


def spread_pvalue(total: float, n: int, law: ScoreLaw, share: float) -> float:
    """P(sum of n scores > total) + share P(= total): with share uniform on (0, 1) it is uniform."""
    at = math.exp(law.scheme.log_sf(total, n))
    if law.continuous:
        return at
    above = math.exp(law.scheme.log_sf(total + 1.0, n))
    return above + share * (at - above)


def clopper_pearson(count: int, n: int, log_level: float = _LEVEL) -> tuple[float, float]:
    """Exact interval of a share, each side at exp(log_level): Clopper and Pearson (1934)."""

    def upper_tail(p: float) -> float:  # grows with p
        return stats.log_sf_binomial(count, n, p)

    def lower_tail(p: float) -> float:
        return stats.log_sf_binomial(n - count, n, 1.0 - p)

    low, high = 0.0, 1.0
    if count > 0:
        low = _bisect(lambda p: upper_tail(p) < log_level)
    if count < n:
        high = _bisect(lambda p: lower_tail(p) > log_level)
    return low, high


def _bisect(holds: Callable[[float], bool]) -> float:
    """The border between where holds is true, below, and where it is not."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if not 0.0 < middle < 1.0:
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return 0.5 * (low + high)


def _strangers(count: int, slots: int, seed: int) -> npt.NDArray[np.uint32]:
    """Keys that nobody uses, (count, slots, 8) uint32. Not secret: anybody may draw them again."""
    rng = np.random.default_rng([seed, 0x6465636F])
    return rng.integers(0, 2**32, size=(count, slots, 8), dtype=np.uint32)


def _control(
    sums: npt.NDArray[np.float64], total: float, judge: "_Counted | _Summed", slots: int, seed: int
) -> Decoys:
    n = sums.shape[0]
    rank = int((sums >= total).sum())
    levels = [judge.middle(float(value), slots) for value in sums]
    z = np.array([judge.z(float(value), slots) for value in sums])
    return Decoys(
        n=n,
        rank=rank,
        log_pvalue=stats.monte_carlo_log_pvalue(rank, n),
        ks_log_pvalue=stats.log_uniformity(levels),
        z_mean=float(z.mean()),
        z_sd=float(z.std(ddof=1)),
        z=tuple(map(float, z)),
        seed=seed,
    )
