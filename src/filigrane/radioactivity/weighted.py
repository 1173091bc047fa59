"""The law of a weighted sum of keyed scores: mean zero, exact cumulants, saddlepoint tail.

Knows nothing of suspects. Under H0 weights do not depend on the key, every (window, token) has a
keyed number of its own, and the scores of different pairs are independent:

    T = sum of weight * (score - mean),    K(theta) = sum of kappa(theta * weight)

with kappa the cumulant function of one centred score: Bernoulli(gamma) for green lists, Exp(1) for
Gumbel, a sum of weighted fair bits for tournaments.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from filigrane import prf, stats
from filigrane.errors import SchemeError
from filigrane.schemes.base import Scheme
from filigrane.schemes.greenlist import GreenList
from filigrane.schemes.gumbel import Gumbel
from filigrane.schemes.tournament import Tournament

_NO_LAYERS = np.zeros(0)


@dataclass(frozen=True, slots=True)
class ScoreLaw:
    """The law of one score under H0.

    mean, variance, skew: its first cumulants; gamma: of a green list, else 0.5; layers: weights of
    a tournament's rounds, else empty; unit: what an effect is measured in.
    """

    scheme: Scheme
    mean: float
    variance: float
    skew: float
    gamma: float
    layers: npt.NDArray[np.float64] = field(repr=False)
    unit: str

    @classmethod
    def of(cls, scheme: Scheme) -> "ScoreLaw":
        """Raises SchemeError for schemes whose scores at one window share a coin."""
        if isinstance(scheme, GreenList):
            gamma = scheme.threshold / 2**32
            spread = gamma * (1.0 - gamma)
            unit = "share of green tokens"
            skew = spread * (1.0 - 2.0 * gamma)
            return cls(scheme, gamma, spread, skew, gamma, _NO_LAYERS, unit)
        if isinstance(scheme, Gumbel):
            return cls(scheme, 1.0, 1.0, 2.0, 0.5, _NO_LAYERS, "mean score")
        if isinstance(scheme, Tournament):
            layers = np.asarray(scheme.weights, dtype=np.float64)
            mean, spread = 0.5 * layers.sum(), 0.25 * float(layers @ layers)
            return cls(scheme, float(mean), spread, 0.0, 0.5, layers, "mean score")
        raise SchemeError(
            f"radioactivity is tested for greenlist, gumbel and tournament, not {scheme.name}: "
            "its scores after one window are not independent."
        )

    @property
    def continuous(self) -> bool:
        """Whether a sum of scores has no atoms; else it is an integer."""
        return isinstance(self.scheme, Gumbel)

    @property
    def limit(self) -> float:
        """Largest theta * weight at which the cumulant function is finite."""
        return 1.0 if isinstance(self.scheme, Gumbel) else math.inf

    def ends(self, weights: npt.NDArray[np.float64]) -> tuple[float, float]:
        """The smallest and the largest possible sum."""
        up, down = float(weights[weights > 0.0].sum()), float(weights[weights < 0.0].sum())
        if isinstance(self.scheme, Gumbel):
            return (-math.inf if down else -up), (math.inf if up else -down)
        if isinstance(self.scheme, GreenList):
            rest = 1.0 - self.gamma
            return rest * down - self.gamma * up, rest * up - self.gamma * down
        best = 0.5 * float(self.layers.sum()) * (up - down)
        return -best, best

    def log_best(self, weights: npt.NDArray[np.float64], slack: float) -> float:
        """Log probability that all scores are at their best that could not cost less than slack."""
        if isinstance(self.scheme, GreenList):
            up, down = (weights > slack).sum(), (weights < -slack).sum()
            return float(up * math.log(self.gamma) + down * math.log1p(-self.gamma))
        sizes = np.abs(weights)
        return -math.log(2.0) * sum(int((sizes * layer > slack).sum()) for layer in self.layers)

    def grain(self, weights: npt.NDArray[np.float64]) -> float:
        """How coarse the sum is: the step of a lattice if all weights are equal.

        Green scores are 0 or 1, so sums of near-equal weights have atoms. What blurs those of a
        weight are all smaller ones, if their standard deviation is half of it (a lattice blurred
        that much has ripples of 1.4 %); the grain is the largest weight that is not blurred. The
        scores of a tournament are integers up to thousands, Gumbel's are continuous.
        """
        if not isinstance(self.scheme, GreenList):
            return 0.0
        sizes = np.sort(np.abs(weights))
        below = np.concatenate([[0.0], np.cumsum(sizes**2)[:-1]])
        sharp = np.sqrt(self.variance * below) < 0.5 * sizes
        return float(sizes[sharp].max())

    def cumulants(
        self, theta: float, weights: npt.NDArray[np.float64]
    ) -> tuple[float, float, float]:
        """K, K' and K'' at theta: weights (m,) float64."""
        from filigrane.kernels.weighted import cumulants

        kind = self.scheme.statistic.kind
        k0, k1, k2 = cumulants(float(theta), weights, kind, self.gamma, self.layers)
        return float(k0), float(k1), float(k2)

    def total(
        self,
        words: npt.NDArray[np.uint32],
        windows: npt.NDArray[np.uint32],
        starts: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.uint32],
        weights: npt.NDArray[np.float64],
    ) -> float:
        """T under one key: words (8,), the rest as in `evidence.Weighted`."""
        from filigrane.kernels.prf import blocks
        from filigrane.kernels.weighted import total

        kind, threshold, table = self.scheme.statistic
        keys = np.broadcast_to(words, (windows.shape[0], 8))
        parts = (blocks(keys, windows), starts, tokens, weights)
        return float(total(*parts, kind, np.uint32(threshold), table, self.mean))


@dataclass(frozen=True, slots=True)
class Tail:
    """How far out a sum is: log p by saddlepoint, and the log of a bound, never too small."""

    log_pvalue: float
    log_bound: float


def tail(total: float, weights: npt.NDArray[np.float64], law: ScoreLaw, copies: int = 1) -> Tail:
    """P(sum over `copies` independent keys >= total), in logarithms.

    The saddlepoint formula of Lugannani and Rice (1980) in the form of Barndorff-Nielsen (1986),
    r* = r + log(u / r) / r, which keeps its relative error small however far out; and Chernoff's
    bound at the same point. Sums of green scores have atoms, which the formula would halve: a
    number drawn from (0, grain) is added, P(T >= t) <= P(T + U >= t), with equality on a lattice
    of that step. weights: (m,), zeros do not matter.
    """
    weights = np.ascontiguousarray(weights[weights != 0.0])
    spread = copies * law.variance * float(weights @ weights)
    worst, best = (copies * value for value in law.ends(weights))
    slack = 1e-12 * (abs(best) if math.isfinite(best) else 0.0)
    if total >= best - slack:
        odds = copies * law.log_best(weights, slack)
        return Tail(odds, odds)
    if total <= worst + slack:
        return Tail(0.0, 0.0)
    grain = law.grain(weights)

    def cumulants(theta: float) -> tuple[float, float, float]:
        one, more = law.cumulants(theta, weights), uniform_cumulants(theta, grain)
        k0, k1, k2 = (copies * a + b for a, b in zip(one, more, strict=True))
        return k0, k1, k2

    theta = _saddle(total, weights, law, cumulants)
    log_bound = 0.0
    if theta > 0.0:
        log_bound = min(0.0, copies * law.cumulants(theta, weights)[0] - theta * total)
    spread += grain * grain / 12.0
    k0, _, k2 = cumulants(theta)
    depth = max(0.0, theta * total - k0)
    r = math.copysign(math.sqrt(2.0 * depth), theta)
    if abs(r) < 1e-3:
        # u / r is 0 / 0 at the mean; its limit is a sixth of the standardised third cumulant.
        skew = copies * law.skew * float((weights**3).sum()) / spread**1.5
        star = r + skew / 6.0
    else:
        star = r + math.log(theta * math.sqrt(k2) / r) / r
    # Where the approximation lies above the bound, the bound is the better one.
    return Tail(min(stats.log_sf_normal(star), log_bound), log_bound)


def uniform_cumulants(theta: float, width: float) -> tuple[float, float, float]:
    """K, K' and K'' at theta of a number drawn from (0, width)."""
    t = theta * width
    if abs(t) < 1e-3:  # the series of log((e^t - 1) / t)
        return t / 2 + t * t / 24, width * (0.5 + t / 12), width * width * (1 / 12 - t * t / 240)
    rest = -math.expm1(-abs(t))
    k0 = max(t, 0.0) + math.log(rest / abs(t))
    slope = (1.0 / rest if t > 0.0 else 1.0 - 1.0 / rest) - 1.0 / t
    curve = 1.0 / (t * t) - math.exp(-abs(t)) / (rest * rest)
    return k0, width * slope, width * width * curve


def _saddle(
    target: float,
    weights: npt.NDArray[np.float64],
    law: ScoreLaw,
    cumulants: Callable[[float], tuple[float, float, float]],
) -> float:
    """The theta with K'(theta) = target: Newton's method, kept inside a bracket."""
    top = float(weights.max(initial=0.0))
    bottom = float(weights.min(initial=0.0))
    low = law.limit / bottom if bottom < 0.0 else -math.inf
    high = law.limit / top if top > 0.0 else math.inf
    theta = 0.0
    for _ in range(200):
        _, slope, curve = cumulants(theta)
        if slope < target:
            low = theta
        else:
            high = theta
        if abs(slope - target) <= 1e-13 * max(abs(target), abs(slope), 1e-300):
            break
        step = theta + (target - slope) / curve if curve > 0.0 else math.inf
        if not low < step < high:
            # The middle of what is left, or twice as far where that has no end.
            if math.isinf(high):
                step = 2.0 * low if low > 0.0 else 1.0 / max(top, -bottom)
            elif math.isinf(low):
                step = 2.0 * high if high < 0.0 else -1.0 / max(top, -bottom)
            else:
                step = 0.5 * (low + high)
        if abs(step - theta) <= 1e-15 * abs(theta):
            break
        theta = step
    return theta


def reference_total(
    words: npt.NDArray[np.uint32],
    windows: npt.NDArray[np.uint32],
    starts: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.uint32],
    weights: npt.NDArray[np.float64],
    law: ScoreLaw,
) -> float:
    """`ScoreLaw.total` in plain numpy: the readable twin."""
    owners = np.repeat(np.arange(windows.shape[0]), np.diff(starts))
    blocks = prf.block(words, windows)[owners]
    return float(weights @ (law.scheme.score(blocks, tokens) - law.mean))


def reference_cumulant(theta: float, weights: npt.NDArray[np.float64], law: ScoreLaw) -> float:
    """`ScoreLaw.cumulants`, the first of them, in plain numpy: the readable twin."""
    t = theta * weights
    if isinstance(law.scheme, GreenList):
        return float((np.log1p(law.gamma * np.expm1(t)) - law.gamma * t).sum())
    if isinstance(law.scheme, Gumbel):
        return float(-(np.log1p(-t) + t).sum())
    return float(np.log(np.cosh(0.5 * t[:, None] * law.layers)).sum())
