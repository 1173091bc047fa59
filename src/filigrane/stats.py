"""Tail probabilities in natural logarithms of sums of independent scores, and corrections.

Every tail here is exact up to rounding: closed forms, series and integrals of positive terms, or
contour integrals whose discretisation error is bounded below the rounding error. Nothing is a
normal, moment-matched or saddle-point approximation, because those are wrong exactly where a
p-value matters. The two functions named `log_chernoff_*` are bounds, kept because published scores
are defined by them. Each tail is computed from its small side, so that log p keeps its relative
accuracy both at p = exp(-1e6) and at 1 - p = 1e-300.

Accuracy: relative error of log p below 1e-10, in practice below 1e-12. Results are at most 0,
are minus infinity only where the event is impossible, and are monotone in the statistic up to
that rounding.

This module needs numpy only and knows nothing of keys, tokens or schemes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import SupportsFloat, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "benjamini_hochberg",
    "bonferroni",
    "holm",
    "log1mexp",
    "log_chernoff_gamma",
    "log_chernoff_irwin_hall",
    "log_sf_binomial",
    "log_sf_gamma",
    "log_sf_irwin_hall",
    "log_sf_two_gammas",
    "log_sf_weighted_bits",
    "logsumexp",
    "monte_carlo_log_pvalue",
    "sidak",
]

_LN2 = math.log(2.0)
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)

# Nats below the leading contribution at which an aliased or truncated part is dropped.
_NEGLIGIBLE = 40.0
# The contour keeps at least this many standard deviations of tilt away from the pole at zero. At
# the mean this costs a factor exp(3**2 / 2) of cancellation (two digits) and saves two thirds of
# the nodes.
_MIN_TILT = 3.0

# Up to this many uniforms the alternating sum is evaluated in integers.
_RATIONAL_MAX_N = 40

# Sizes of the three ways to a sum of weighted bits, see log_sf_weighted_bits.
_MAX_WEIGHTS = 1000
_MAX_LATTICE = 1 << 20
_TABLE_WORK = 4_000_000
_FFT_NODES = 1 << 17

# log(n!) - (Stirling's leading terms) for n = 1..15; index 0 is never read.
_STIRLING_ERROR = (
    math.nan,
    0.08106146679532726,
    0.0413406959554093,
    0.02767792568499834,
    0.020790672103765093,
    0.016644691189821193,
    0.013876128823070748,
    0.01189670994589177,
    0.010411265261972096,
    0.009255462182712733,
    0.00833056343336287,
    0.007573675487951841,
    0.00694284010720953,
    0.006408994188004207,
    0.0059513701127588475,
    0.005554733551962801,
)

# Taylor coefficients of log(sinh(w)/w) in powers of w**2: 2**(2k) B_2k / (2k (2k)!). Successive
# terms shrink by pi**2, so 17 of them reach double precision for abs(w) <= 1.
_LOG_SINHC_SERIES = (
    0.16666666666666666,
    -0.005555555555555556,
    0.0003527336860670194,
    -2.6455026455026456e-05,
    2.1377799155576935e-06,
    -1.803670234005331e-07,
    1.5661391322766983e-08,
    -1.3884130493737299e-09,
    1.2504359176004997e-10,
    -1.1402575602296091e-11,
    1.0502923908637557e-12,
    -9.754877841593701e-14,
    9.123468230859098e-15,
    -8.5837197618956095e-16,
    8.117318009727789e-17,
    -7.710527514116273e-18,
    7.352844932712002e-19,
)

# Indices of the first block of terms that _product_series takes at once.
_STEPS = np.arange(512, dtype=np.float64)

# Multiples of the tilt at which Chernoff's bound is tried for the aliases on either side.
_TILTS_BELOW = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 0.9])
_TILTS_ABOVE = np.array([1.1, 1.25, 1.5, 2.0, 3.0, 5.0])


# --------------------------------------------------------------------------- argument checks


def _integer(name: str, value: SupportsIndex) -> int:
    """`value` as an int; ValueError when it is not of an integer type."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {type(value).__name__}") from None


def _count(name: str, value: SupportsIndex) -> int:
    """`value` as an int of at least 1."""
    number = _integer(name, value)
    if number < 1:
        raise ValueError(
            f"{name} must be at least 1, got {number}; with nothing scored there is no evidence, "
            "so report log p = 0 without calling this function"
        )
    return number


def _statistic(name: str, value: SupportsFloat) -> float:
    """`value` as a float that is not NaN."""
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"{name} is NaN; check the scores that were summed")
    return number


def _log_p(value: SupportsFloat) -> float:
    """`value` as a log p-value: a float of at most 0, possibly minus infinity."""
    number = _statistic("log_p", value)
    if number > 0.0:
        raise ValueError(f"log_p must be at most 0, got {number}; pass log p, not p or -log p")
    return number


def _log_ps(values: ArrayLike) -> NDArray[np.float64]:
    """`values` as a one-dimensional float64 array of log p-values."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"log_ps must be one-dimensional, got {array.ndim} dimensions")
    if np.isnan(array).any() or (array > 0.0).any():
        raise ValueError("log_ps must all be at most 0 and not NaN; pass log p, not p or -log p")
    return array


# --------------------------------------------------------------------------- small helpers


def _nonpositive(log_p: float) -> float:
    """Clip the last rounding error off a log probability, and turn -0.0 into 0.0."""
    return min(log_p, 0.0) + 0.0


def log1mexp(x: float) -> float:
    """Logarithm of 1 - exp(x) for x <= 0, accurate at both ends; minus infinity at x = 0.

    Raises ValueError for positive or NaN x. Source: Maechler 2012, "Accurately computing
    log(1 - exp(-|a|))", equation 7.
    """
    x = _statistic("x", x)
    if x > 0.0:
        raise ValueError(f"x must be at most 0, got {x}: 1 - exp(x) would be negative")
    if x == 0.0:
        return -math.inf
    if x > -_LN2:
        return math.log(-math.expm1(x))
    return _nonpositive(math.log1p(-math.exp(x)))


def logsumexp(values: ArrayLike) -> float:
    """Logarithm of sum(exp(values)) over all elements, without overflow; minus infinity when empty.

    Raises ValueError when a value is NaN. Formula: m + log(sum(exp(v - m))) with m = max(v).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return -math.inf
    top = float(array.max())
    if math.isnan(top):
        raise ValueError("values contain NaN; check the terms that are summed")
    if math.isinf(top):
        return top
    return top + math.log(float(np.exp(array - top).sum()))


def _stirling_error(n: int) -> float:
    """Error of Stirling's formula, log(n!) - log(sqrt(2 pi n) (n/e)**n), n >= 1 (Loader 2000)."""
    if n < len(_STIRLING_ERROR):
        return _STIRLING_ERROR[n]
    r = 1.0 / n
    r2 = r * r
    return r * (1 / 12 - r2 * (1 / 360 - r2 * (1 / 1260 - r2 * (1 / 1680 - r2 * (1 / 1188)))))


def _deviance(x: float, mean: float) -> float:
    """Compute x log(x/mean) + mean - x without cancellation at x near mean, for x, mean > 0.

    Source: Loader 2000, section 3 (`bd0`): with v = (x - mean)/(x + mean), the sum
    (x - mean) v + 2 x sum over j >= 1 of v**(2j+1)/(2j+1).
    """
    difference = x - mean
    if abs(difference) < 0.1 * (x + mean):
        v = difference / (x + mean)
        total = difference * v
        term = 2.0 * x * v
        v2 = v * v
        j = 3
        while True:
            term *= v2
            following = total + term / j
            if following == total:
                return total
            total = following
            j += 2
    # Two logarithms, because the quotient could overflow for a subnormal argument.
    ratio = x / mean
    log_ratio = math.log(ratio) if 1e-300 < ratio < 1e300 else math.log(x) - math.log(mean)
    return x * log_ratio - difference


def _log_poisson_pmf(k: int, mean: float) -> float:
    """Logarithm of exp(-mean) mean**k / k! for k >= 0, mean > 0 (Loader 2000)."""
    if k == 0:
        return -mean
    return -_stirling_error(k) - _deviance(k, mean) - _LOG_SQRT_2PI - 0.5 * math.log(k)


def _log_binomial_pmf(k: int, n: int, p: float, q: float) -> float:
    """Logarithm of C(n, k) p**k q**(n-k) for 0 < k < n, with q = 1 - p given (Loader 2000)."""
    rest = n - k
    return (
        _stirling_error(n)
        - _stirling_error(k)
        - _stirling_error(rest)
        - _deviance(k, n * p)
        - _deviance(rest, n * q)
        - _LOG_SQRT_2PI
        - 0.5 * (math.log(k) + math.log(rest) - math.log(n))
    )


def _product_series(a: float, da: float, b: float, db: float, scale: float) -> float:
    """Sum 1 + r_0 + r_0 r_1 + ..., r_i = scale (a - i da) / (b + i db) < 1, da and db 0 or 1.

    All terms are positive, so the sum is accurate however many there are. The series of both the
    Poisson and the binomial tail after their leading term have this form.
    """
    total = term = 1.0
    for _ in range(32):
        term *= scale * a / b
        total += term
        if term <= 1e-18 * total:
            return total
        a -= da
        b += db
    size = _STEPS.size
    steps = _STEPS
    while term > 1e-18 * total:
        # Past the end of a binomial the ratios are negative; they follow an exact zero.
        terms = np.maximum(a - steps, 0.0) if da else np.full(size, a)
        terms *= scale
        terms /= b + steps if db else b
        np.multiply.accumulate(terms, out=terms)
        total += term * float(terms.sum())
        term *= float(terms[-1])
        a -= size * da
        b += size * db
        size = min(2 * size, 1 << 16)
        steps = np.arange(size, dtype=np.float64)
    return total


# --------------------------------------------------------------------------- binomial


def _log_upper_binomial(k: int, n: int, p: float, q: float) -> float:
    """Logarithm of P(Bin(n, p) >= k) for n p < k <= n: leading term and series of ratios."""
    if k == n:
        # Whichever of p and q is the smaller carries the full precision.
        return n * (math.log(p) if p <= 0.5 else math.log1p(-q))
    return _log_binomial_pmf(k, n, p, q) + math.log(
        _product_series(float(n - k), 1.0, float(k + 1), 1.0, p / q)
    )


def log_sf_binomial(k: int, n: int, p: float) -> float:
    """Logarithm of P(Bin(n, p) >= k).

    k any integer, n >= 1 trials, p in [0, 1] the probability of a hit; natural logarithm. Exact:
    the term at k in Loader's saddle-point form (Loader 2000, "Fast and accurate computation of
    binomial probabilities") times 1 + sum over i of prod (n-k-j) p / ((k+1+j) (1-p)), j < i; below
    the mean the same for the complement, which is Bin(n, 1-p) >= n-k+1. Raises ValueError for
    non-integers, n < 1 or p outside [0, 1].
    """
    k = _integer("k", k)
    n = _count("n", n)
    p = float(p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be a probability in [0, 1], got {p}")
    if k <= 0:
        return 0.0
    if k > n or p == 0.0:
        return -math.inf
    if p == 1.0:
        return 0.0
    q = 1.0 - p
    if k > n * p:
        return _nonpositive(_log_upper_binomial(k, n, p, q))
    if k == 1:
        # The complement is q**n; log1p(-p) keeps what 1 - p rounded away.
        return log1mexp(_nonpositive(n * math.log1p(-p)))
    return log1mexp(_nonpositive(_log_upper_binomial(n - k + 1, n, q, p)))


# --------------------------------------------------------------------------- gamma


def log_sf_gamma(s: float, n: int) -> float:
    """Logarithm of P(Gamma(n, 1) >= s), the sum of n unit exponentials.

    s any float, n >= 1 an integer shape; natural logarithm. Exact: P(Gamma(n) >= s) =
    P(Poisson(s) <= n-1) (DLMF 8.4.10), summed from its largest term, which is taken in Loader's
    saddle-point form (Loader 2000); for s <= n the complement P(Poisson(s) >= n). Raises
    ValueError for NaN, a non-integer n or n < 1.
    """
    s = _statistic("s", s)
    n = _count("n", n)
    if s <= 0.0:
        return 0.0
    if n == 1:
        return -s
    if s == math.inf:
        return -math.inf
    return _log_gamma_part(s, n, upper=True)


def _log_gamma_part(s: float, n: int, *, upper: bool) -> float:
    """Logarithm of P(Gamma(n) >= s), or of P(Gamma(n) < s), for finite s > 0."""
    if s > n:
        series = _product_series(float(n - 1), 1.0, s, 0.0, 1.0) if n > 1 else 1.0
        tail = _nonpositive(_log_poisson_pmf(n - 1, s) + math.log(series))
        return tail if upper else log1mexp(tail)
    series = _product_series(s, 0.0, float(n + 1), 1.0, 1.0)
    tail = _nonpositive(_log_poisson_pmf(n, s) + math.log(series))
    return log1mexp(tail) if upper else tail


def log_chernoff_gamma(total: float, n: int) -> float:
    """Chernoff's bound on log P(Gamma(n, 1) >= total): n (1 + log a - a), a = total/n > 1, else 0.

    total any float, n >= 1; natural logarithm. A bound, never below `log_sf_gamma`; it is the
    "population" form in which strengths of exponential scores are published (a - 1 - log a per
    position, a the mean score). Raises ValueError for NaN, a non-integer n or n < 1.
    """
    total = _statistic("total", total)
    n = _count("n", n)
    if total <= n:
        return 0.0
    if total == math.inf:
        return -math.inf
    return _nonpositive(-_deviance(float(n), total))


# --------------------------------------------------------------------------- two gammas

# Gauss and Legendre's rule of this order integrates what falls by _WINDOW nats on either side of
# its peak, like a Gauss curve or like an exponential, with a relative error below exp(-60).
_NODES = 96
_WINDOW = 45.0


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes on (0, 1) and logarithms of their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return 0.5 * (nodes + 1.0), np.log(0.5 * weights)


class _GammaConvolution:
    """The integrand of P(small A + large B >= s), or < s, over the value a of A.

    f_A(a) P(B >= (s - small a)/large) is a polynomial times an exponential, positive on (0, end),
    end = s/small, and log-concave as a product of two log-concave functions.
    """

    def __init__(self, s: float, n: int, small: float, large: float, *, upper: bool) -> None:
        self.s, self.n, self.small, self.large, self.upper = s, n, small, large, upper
        self.end = s / small

    def _rest(self, a: float) -> float:
        # Positive, so that all logarithms exist; what is cut off weighs nothing.
        return max((self.s - self.small * a) / self.large, 1e-290)

    def log_height(self, a: float) -> float:
        """Logarithm of the integrand."""
        a = max(a, 1e-290)
        return _log_poisson_pmf(self.n - 1, a) + _log_gamma_part(
            self._rest(a), self.n, upper=self.upper
        )

    def slope(self, a: float) -> float:
        """Derivative of `log_height`; it decreases."""
        y = self._rest(a)
        log_hazard = _log_poisson_pmf(self.n - 1, y) - _log_gamma_part(y, self.n, upper=self.upper)
        hazard = math.exp(min(log_hazard, 700.0)) * self.small / self.large
        return (self.n - 1) / a - 1.0 + (hazard if self.upper else -hazard)

    def peak(self) -> float:
        """Where the integrand is largest, to a small part of its width."""
        low, high = 0.0, float(self.n)
        while high < self.end and self.slope(high) > 0.0:
            low, high = high, 2.0 * high
        high = min(high, self.end)
        for _ in range(60):
            middle = 0.5 * (low + high)
            if not low < middle < high or high - low < 1e-7 * high:
                break
            if self.slope(middle) > 0.0:
                low = middle
            else:
                high = middle
        return 0.5 * (low + high)

    def edge(self, inside: float, outside: float, level: float) -> float:
        """Between a point above `level` and one below: a point below it, but not far below."""
        while abs(outside - inside) > 0.02 * abs(outside - self._top):
            middle = 0.5 * (inside + outside)
            if not min(inside, outside) < middle < max(inside, outside):
                break
            if self.log_height(middle) >= level:
                inside = middle
            else:
                outside = middle
        return outside

    def log_integral(self) -> float:
        """Logarithm of the integral over (0, end)."""
        self._top = top = self.peak()
        level = self.log_height(top) - _WINDOW
        left = 0.0 if self.log_height(0.0) >= level else self.edge(top, 0.0, level)
        right, step = top, max(top - left, 1.0)
        while right < self.end and self.log_height(right) >= level:
            right, step = min(right + step, self.end), 2.0 * step
        if self.log_height(right) < level:
            right = self.edge(top, right, level)
        nodes, log_weights = _gauss_legendre()
        heights = [self.log_height(left + (right - left) * x) for x in nodes.tolist()]
        return logsumexp(np.array(heights) + log_weights) + math.log(right - left)


def log_sf_two_gammas(s: float, n: int, share: float) -> float:
    """Logarithm of P(share A + (1 - share) B >= s) for independent A, B ~ Gamma(n, 1).

    s any float, n >= 1 an integer, share in [0, 1]; natural logarithm. The law of a fused score of
    two keys; a Gamma fitted to its two moments is too small by up to a factor of 3 at 1e-9. Exact:
    share 0, 1/2 and 1 are Gamma laws, else P = P(w A >= s) + int f_A(a) P(v B >= s - w a) da with w
    the smaller weight, by Gauss and Legendre's rule over the part that counts; the integrand is
    positive, log-concave and entire. (The mixture of Gammas with negative binomial weights of
    Moschopoulos 1985, "The distribution of the sum of independent gamma random variables", is the
    same number; it takes some sqrt(n)/share terms and is what the vectors were computed by.) Below
    the mean the same for the complement. Raises ValueError for NaN, n < 1 or a share outside [0,
    1].
    """
    s = _statistic("s", s)
    n = _count("n", n)
    share = float(share)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    small, large = sorted((share, 1.0 - share))
    # A weight that cannot move the sum by a unit in the last place.
    if small < 1e-200:
        return log_sf_gamma(s, n)
    if small == large:
        return log_sf_gamma(2.0 * s, 2 * n)
    if s <= 0.0:
        return 0.0
    if s == math.inf:
        return -math.inf
    upper = s > n
    smaller = _GammaConvolution(s, n, small, large, upper=upper).log_integral()
    if not upper:
        return log1mexp(_nonpositive(smaller))
    alone = log_sf_gamma(s / small, n)  # A reaches s without B
    return _nonpositive(float(np.logaddexp(smaller, alone)))


# --------------------------------------------------------------------------- contour integrals


def _period(
    cumulant: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    tilt: float,
    at_tilt: float,
    y: float,
    y_max: float,
    margin: float,
) -> float:
    """Period L at which aliases of exp(tilt y) P(Y >= y) are below exp(-margin).

    The trapezoid rule with step 2 pi / L computes, exactly, the sum over m of
    exp(tilt m L) P(Y >= y + m L) (Poisson summation). Chernoff's bound at other tilts bounds each
    alias: for a tilt b below, log alias <= K(b) - K(tilt) + (tilt - b)(y - L), and likewise above.
    The support ends at y_max, which bounds the other side as well.
    """
    below = tilt * _TILTS_BELOW
    left = float(np.min(y + (margin + cumulant(below) - at_tilt) / (tilt - below)))
    above = tilt * _TILTS_ABOVE
    right = float(np.min((margin + cumulant(above) - at_tilt) / (above - tilt))) - y
    return max(left, min(right, y_max - y + 1.0))


# --------------------------------------------------------------------------- Irwin-Hall


def _log_ratio(numerator: int, denominator: int) -> float:
    """Logarithm of numerator / denominator, of two positive integers of any size."""
    shift = denominator.bit_length() - numerator.bit_length()
    if shift >= 0:
        return math.log((numerator << shift) / denominator) - shift * _LN2
    return math.log(numerator / (denominator << -shift)) - shift * _LN2


def _irwin_hall_rational(s: float, n: int) -> float:
    """Logarithm of the smaller tail at s, from the alternating sum in integers."""
    x, unit = s.as_integer_ratio()
    if 2 * x > n * unit:
        x = n * unit - x
    total = 0
    binomial = 1
    for j in range(x // unit + 1):
        total += (-binomial if j & 1 else binomial) * (x - j * unit) ** n
        binomial = binomial * (n - j) // (j + 1)
    return _log_ratio(total, unit**n * math.factorial(n))


def _irwin_hall_corner(x: float, n: int) -> float:
    """Logarithm of P(U_1 + ... + U_n <= x) near 0, where the alternating sum does not cancel."""
    lead = (
        n * (1.0 + math.log(x) - math.log(n))
        - _stirling_error(n)
        - _LOG_SQRT_2PI
        - 0.5 * math.log(n)
    )
    total = 1.0
    log_binomial = 0.0
    j = 1
    while j < x:
        log_binomial += math.log((n - j + 1) / j)
        term = math.exp(log_binomial + n * math.log1p(-j / x))
        total += -term if j & 1 else term
        if term < 1e-18:
            break
        j += 1
    return lead + math.log(total)


def _log_sinhc(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of sinh(x)/x for x >= 0."""
    small = np.minimum(x, 1.0)
    large = np.maximum(x, 1.0)
    square = small * small
    series = np.zeros_like(square)
    for coefficient in reversed(_LOG_SINHC_SERIES):
        series = (series + coefficient) * square
    direct = large + np.log1p(-np.exp(-2.0 * large)) - np.log(2.0 * large)
    return np.where(x <= 1.0, series, direct)


def _irwin_hall_saddle(y: float, n: int) -> float:
    """Tilt whose tilted mean is y, for 0 <= y < n/2, but at least three standard deviations."""
    target = 2.0 * y / n
    # Cohen's Pade form of the inverse Langevin function, then Newton on coth(x) - 1/x = target.
    x = target * (3.0 - target * target) / (1.0 - target * target)
    floor = 0.5 * _MIN_TILT / math.sqrt(n / 12.0)
    for _ in range(8):
        if x <= floor:
            return 2.0 * floor
        sinh = math.sinh(x)
        slope = 1.0 / (x * x) - 1.0 / (sinh * sinh)
        step = (target - (1.0 / math.tanh(x) - 1.0 / x)) / slope
        x += step
        # The tilted standard deviation in units of x is 1/sqrt(n slope).
        if step * step * n * slope < 1e-3:
            break
    return 2.0 * max(x, floor)


def _irwin_hall_contour(y: float, n: int) -> float:
    """Logarithm of P(sum of n centred uniforms >= y), 0 <= y < n/2, by a contour integral."""
    tilt = _irwin_hall_saddle(y, n)
    half = 0.5 * tilt
    sinh = math.sinh(half)
    deviation = math.sqrt(n * (1.0 / (tilt * tilt) - 0.25 / (sinh * sinh)))
    margin = _NEGLIGIBLE + math.log1p(3.0 * tilt * deviation)

    def cumulant(theta: NDArray[np.float64]) -> NDArray[np.float64]:
        return n * _log_sinhc(0.5 * theta)

    at_tilt = float(cumulant(np.array([tilt]))[0])
    step = 2.0 * math.pi / _period(cumulant, tilt, at_tilt, y, 0.5 * n, margin)

    # |M(tilt + it)/M(tilt)|**2 = (1 + sin(t/2)**2/sinh**2) / (1 + t**2/tilt**2) decreases up to
    # t = 2 pi (tan x >= x), and everywhere lies below the same with the sine put to 1.
    inverse_square = 1.0 / (sinh * sinh)
    end = tilt * math.sqrt((1.0 + inverse_square) * math.exp(2.0 * margin / n) - 1.0)
    if end <= 2.0 * math.pi:
        low = 0.0
        while end - low > 0.05 * end:
            middle = 0.5 * (low + end)
            decay = math.log1p(math.sin(0.5 * middle) ** 2 * inverse_square) - math.log1p(
                (middle / tilt) ** 2
            )
            if 0.5 * n * decay < -margin:
                end = middle
            else:
                low = middle

    t = step * np.arange(math.ceil(end / step) + 1)
    z = tilt + 1j * t
    if math.hypot(tilt, end) <= 2.0:
        # Near the mean of a long sum the two logarithms below would cancel to n units in the last
        # place; the series does not.
        square = 0.25 * z * z
        series = np.zeros_like(square)
        for coefficient in reversed(_LOG_SINHC_SERIES):
            series = (series + coefficient) * square
        exponent = n * series - at_tilt - 1j * (t * y)
    else:
        sine = np.sin(0.5 * t)
        decay_t = np.log1p(sine * sine * inverse_square) - np.log1p((t / tilt) ** 2)
        angle = np.arctan2(sine, math.tanh(half) * np.cos(0.5 * t)) - np.arctan2(t, tilt)
        exponent = 0.5 * n * decay_t + 1j * (n * angle - t * y)
    values = (np.exp(exponent) / z).real
    total = (2.0 * float(values.sum()) - float(values[0])) * step / (2.0 * math.pi)
    return at_tilt - tilt * y + math.log(total)


def log_sf_irwin_hall(s: float, n: int) -> float:
    """Logarithm of P(U_1 + ... + U_n >= s) for independent uniforms on (0, 1).

    s any float, n >= 1; natural logarithm. Exact, by three routes. With x the distance of s to
    its nearer end of [0, n], the tail is sum over j <= x of (-1)**j C(n, j) (x-j)**n / n! (Irwin
    1927, Hall 1927): evaluated in integers for n <= 40 (a float is a fraction), in floats where
    its terms fall off at once. Between, the inversion integral of the moment generating function
    sinhc(z/2)**n over the vertical line through the saddle point (Daniels 1987, "Tail probability
    approximations", equation 3.1, here not expanded but integrated), by the trapezoid rule, whose
    error is an alias bounded beforehand (Trefethen and Weideman 2014, "The exponentially
    convergent trapezoidal rule"). Below n/2 by symmetry and log(1 - q). Raises ValueError for
    NaN, a non-integer n or n < 1.
    """
    s = _statistic("s", s)
    n = _count("n", n)
    if s <= 0.0:
        return 0.0
    if s >= n:
        return -math.inf
    if n == 1:
        return math.log1p(-s)
    x = min(s, n - s)
    if x <= 1.0 or n * math.exp(-n / x) <= 0.25:
        smaller = _irwin_hall_corner(x, n)
    elif n <= _RATIONAL_MAX_N:
        smaller = _irwin_hall_rational(s, n)
    else:
        smaller = _irwin_hall_contour(abs(s - 0.5 * n), n)
    smaller = _nonpositive(smaller)
    return smaller if 2.0 * s >= n else log1mexp(smaller)


def log_chernoff_irwin_hall(total: float, n: int) -> float:
    """Chernoff's bound on log P(U_1 + ... + U_n >= total), uniforms on (0, 1).

    It is n min over t >= 0 of log((exp(t) - 1)/t) - t total/n, and 0 up to the mean; total any
    float, n >= 1; natural logarithm. A bound, never below `log_sf_irwin_hall`: the U score of Hu et
    al. 2023 (arXiv 2310.10669, appendix D) is defined by it. Raises ValueError for NaN, a
    non-integer n or n < 1.
    """
    total = _statistic("total", total)
    n = _count("n", n)
    gap = 2.0 * (n - total) / n
    if gap >= 1.0:
        return 0.0
    if gap <= 0.0:
        return -math.inf
    target = 1.0 - gap
    # With t = 2 x: the minimum is where coth(x) - 1/x = target. Every x gives a bound, and errors
    # of x enter squared.
    if gap < 0.04:
        x = 1.0 / gap
    else:
        x = target * (3.0 - target * target) / (1.0 - target * target)
        for _ in range(6 if x > 0.01 else 0):
            slope = 1.0 / (x * x) - 1.0 / math.sinh(x) ** 2
            x += (target - (1.0 / math.tanh(x) - 1.0 / x)) / slope
    if x > 25.0:
        return _nonpositive(n * (x * gap - math.log(2.0 * x)))
    return _nonpositive(n * (float(_log_sinhc(np.array([x]))[0]) - x * target))


# --------------------------------------------------------------------------- weighted bits


@dataclass(frozen=True, eq=False)
class _BitLattice:
    """What depends on the weights only; weights are divided by their common divisor."""

    divisor: int
    weights: NDArray[np.float64]  # distinct, ascending
    counts: NDArray[np.float64]  # how often each occurs
    bits: int  # number of weights
    total: int  # their sum
    log_pmf: NDArray[np.float64]  # of one position: log P(sum_l w_l b_l = x), x = 0..total

    def cumulant(self, tilts: NDArray[np.float64], n: int) -> NDArray[np.float64]:
        """Cumulants of the centred sum at each tilt: n sum_l log cosh(w_l tilt / 2)."""
        x = np.outer(np.abs(tilts), 0.5 * self.weights)
        sinh = np.sinh(np.minimum(x, 1.0))
        near = 0.5 * np.log1p(sinh * sinh)
        far = x + np.log1p(np.exp(-2.0 * x)) - _LN2
        return n * (np.where(x <= 1.0, near, far) @ self.counts)


@lru_cache(maxsize=32)
def _bit_lattice(weights: tuple[int, ...]) -> _BitLattice:
    divisor = math.gcd(*weights)
    reduced = sorted(w // divisor for w in weights)
    pmf = np.ones(1)
    for w in reduced:
        longer = np.zeros(pmf.size + w)
        longer[: pmf.size] += 0.5 * pmf
        longer[w:] += 0.5 * pmf
        pmf = longer
    with np.errstate(divide="ignore"):
        log_pmf = np.log(pmf)
    distinct, counts = np.unique(np.array(reduced), return_counts=True)
    return _BitLattice(
        divisor=divisor,
        weights=distinct.astype(np.float64),
        counts=counts.astype(np.float64),
        bits=len(weights),
        total=sum(reduced),
        log_pmf=log_pmf,
    )


@lru_cache(maxsize=8)
def _bit_table(weights: tuple[int, ...], n: int) -> NDArray[np.float64]:
    """Logarithms of P(sum >= t) for t = 0..n total, from counts by shifted additions."""
    lattice = _bit_lattice(weights)
    counts = np.zeros(n * lattice.total + 1)
    counts[0] = 1.0
    size = 1
    for w, repeated in zip(lattice.weights, lattice.counts, strict=True):
        for _ in range(n * int(repeated)):
            shifted = counts[:size].copy()
            size += int(w)
            counts[int(w) : size] += shifted
    upper = np.cumsum(counts[::-1])[::-1]
    # The counts are symmetric, so the same cumulative sum serves the complement.
    bits = n * lattice.bits * _LN2
    half = counts.size // 2
    table = np.empty_like(upper)
    table[half:] = np.log(upper[half:]) - bits
    table[0] = 0.0
    table[1:half] = np.log1p(-np.exp(np.log(upper[: counts.size - half : -1]) - bits))
    np.minimum(table, 0.0, out=table)
    table.setflags(write=False)
    return table


def _bits_saddle(lattice: _BitLattice, n: int, y: float) -> tuple[float, float]:
    """(tilt, tilted standard deviation) with tilted mean y of the centred sum, tilt >= floor."""
    w, counts = lattice.weights, lattice.counts
    half_w = 0.5 * w
    deviation = math.sqrt(n * float(counts @ (half_w * half_w)))
    floor = _MIN_TILT / deviation
    gap = n * 0.5 * lattice.total - y  # distance of the tilted mean from the top, positive
    low, high = floor, math.inf
    tilt = max(floor, y / deviation**2)
    for _ in range(100):
        p = 1.0 / (1.0 + np.exp(np.minimum(w * tilt, 700.0)))
        mean_gap = n * float(counts @ (w * p))
        variance = n * float(counts @ (w * w * p * (1.0 - p)))
        deviation = math.sqrt(variance)
        if mean_gap > gap:
            low = tilt
        else:
            high = tilt
        # Within a fraction of a standard deviation of the saddle nothing is lost by cancellation.
        if abs(mean_gap - gap) < 0.02 * deviation or high <= floor:
            break
        # Newton on log(gap), which is nearly linear in the tilt far out.
        following = tilt + math.log(mean_gap / gap) * mean_gap / variance
        if not low < following < high:
            following = 0.5 * (low + high) if high < math.inf else 2.0 * tilt
        tilt = following
    return tilt, deviation


def _fft_length(minimum: float) -> int:
    """An even length of at least `minimum` without large prime factors."""
    shift = max(0, math.ceil(math.log2(max(minimum, 16.0))) - 4)
    return next(m << shift for m in (8, 9, 10, 12, 15, 16) if m << shift >= minimum)


def _tilted_transform(lattice: _BitLattice, tilt: float, nodes: int) -> NDArray[np.complex128]:
    """Conjugate of the tilted characteristic function of one position at 2 pi j / nodes."""
    depth = lattice.total - np.arange(lattice.total + 1)
    normaliser = float(lattice.counts @ (np.log1p(np.exp(-tilt * lattice.weights)) - _LN2))
    pmf = np.exp(lattice.log_pmf - tilt * depth - normaliser)
    if pmf.size > nodes:
        pmf = np.pad(pmf, (0, -pmf.size % nodes)).reshape(-1, nodes).sum(axis=0)
    return np.fft.rfft(pmf, nodes)


def _bits_exponent(
    lattice: _BitLattice, n: int, tilt: float, doubled: int, j: NDArray[np.int64], nodes: int
) -> NDArray[np.complex128]:
    """Logarithm of the integrand at theta = 2 pi j/nodes, but for the pole, relative to theta = 0.

    It is n log(tilted, centred characteristic function) - i theta doubled/2, where doubled/2 is the
    centred statistic. Each factor is cos(a) + i tanh(w tilt/2) sin(a), a = w theta/2, whose modulus
    is put as log(1 - sin(a)**2 / cosh(w tilt/2)**2) / 2 + const.
    Every operation is relatively accurate near theta = 0, where n multiplies the error.
    """
    half_tilt = 0.5 * tilt * lattice.weights
    tanh = np.tanh(half_tilt)
    flat = 1.0 / np.cosh(np.minimum(half_tilt, 350.0)) ** 2
    a = np.outer(j, (math.pi / nodes) * lattice.weights)
    sine = np.sin(a)
    with np.errstate(divide="ignore"):
        size = 0.5 * (np.log1p(-flat * (sine * sine)) @ lattice.counts)
    angle = np.arctan2(tanh * sine, np.cos(a)) @ lattice.counts
    # The phase of the statistic is reduced in integers, so it is exact at every node.
    remainder = (j * (doubled % (2 * nodes))) % (2 * nodes)
    remainder = np.where(remainder > nodes, remainder - 2 * nodes, remainder)
    exponent = np.empty(j.size, dtype=np.complex128)
    exponent.real = n * size
    exponent.imag = n * angle - (math.pi / nodes) * remainder
    return exponent


def _cells_to_nodes(flagged: NDArray[np.bool_], cells: int, nodes: int) -> NDArray[np.int64]:
    """Indices j <= nodes/2 of the fine grid lying in flagged cells of the coarse grid."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flagged, [False])).astype(np.int8)))
    pieces: list[NDArray[np.int64]] = []
    for start, stop in edges.reshape(-1, 2):
        first = max(0, math.floor((start - 0.5) * nodes / cells))
        last = min(nodes // 2, math.ceil((stop - 0.5) * nodes / cells))
        if pieces and first <= pieces[-1][-1]:
            first = int(pieces[-1][-1]) + 1
        pieces.append(np.arange(first, last + 1, dtype=np.int64))
    return np.concatenate(pieces)


def _bits_contour(lattice: _BitLattice, n: int, total: int) -> float:
    """Logarithm of P(sum >= total), n W/2 < total <= n W - min(w), where W = sum of the weights."""
    doubled = 2 * total - n * lattice.total
    y = 0.5 * doubled
    tilt, deviation = _bits_saddle(lattice, n, y)
    margin = _NEGLIGIBLE + math.log1p(3.0 * tilt * deviation)

    def cumulant(theta: NDArray[np.float64]) -> NDArray[np.float64]:
        return lattice.cumulant(theta, n)

    at_tilt = float(cumulant(np.array([tilt]))[0])
    nodes = _fft_length(_period(cumulant, tilt, at_tilt, y, 0.5 * n * lattice.total, margin))
    single = deviation / math.sqrt(n)
    # A characteristic function of standard deviation `single` moves by less than 0.05 over half a
    # cell of this grid.
    cells = 1 << math.ceil(math.log2(math.pi * single / 0.05 + 16.0))
    chernoff = at_tilt - tilt * y

    if nodes <= max(_FFT_NODES, cells):
        transform = _tilted_transform(lattice, tilt, nodes)
        size = np.abs(transform)
        j = np.flatnonzero(size > math.exp(-margin / n)).astype(np.int64)
        if n > 50 and -chernoff < 1e-3 * n:
            # The n-th power of a transform carries n rounding errors; here log p would show them.
            exponent = _bits_exponent(lattice, n, tilt, doubled, j, nodes)
        else:
            phase = (2.0 * math.pi / nodes) * ((j * (total % nodes)) % nodes)
            exponent = n * np.log(transform[j]).conj() - 1j * phase
    else:
        coarse = np.abs(_tilted_transform(lattice, tilt, cells))
        reach = coarse + math.pi * single / cells
        j = _cells_to_nodes(reach > math.exp(-margin / n), cells, nodes)
        exponent = _bits_exponent(lattice, n, tilt, doubled, j, nodes)

    pole = -np.expm1(-(tilt + (2j * math.pi / nodes) * j))
    values = (np.exp(exponent) / pole).real
    # Nodes 0 and nodes/2 stand for themselves, all others for a conjugate pair.
    values[(j != 0) & (2 * j != nodes)] *= 2.0
    return chernoff + math.log(float(values.sum()) / nodes)


def log_sf_weighted_bits(total: int, n: int, weights: Sequence[int]) -> float:
    """Logarithm of P(sum_l w_l B_l >= total) with independent B_l ~ Bin(n, 1/2).

    total any integer, n >= 1, weights up to 1,000 positive integers whose sum over their common
    divisor is at most 2**20; natural logarithm. Exact, by three routes. Equal weights: the
    binomial. Small lattices (n up to about 5 for thirty weights): counts of all outcomes by
    shifted additions, cached per (weights, n). Otherwise the lattice inversion formula
    P = (1/N) sum_j exp(K(z_j) - z_j total) / (1 - exp(-z_j)) over z_j = c + 2 pi i j/N, with K the
    cumulant generating function and c its saddle point (Daniels 1987, section 6; Abate and Whitt
    1992, "Numerical inversion of probability generating functions"). N comes from a bound on the
    aliases; the nodes that matter are found with one Fourier transform of the tilted distribution
    of one position (Lipschitz bound between its points). Below the mean by symmetry and
    log(1 - q). Raises ValueError for non-integers, n < 1 or weights outside the stated range.
    """
    total = _integer("total", total)
    n = _count("n", n)
    key = tuple(_integer("every weight", w) for w in weights)
    if not 1 <= len(key) <= _MAX_WEIGHTS:
        raise ValueError(f"weights must hold 1 to {_MAX_WEIGHTS} integers, got {len(key)}")
    if min(key) < 1:
        raise ValueError(f"weights must be positive, got {min(key)}; leave out zero weights")
    if sum(key) // math.gcd(*key) > _MAX_LATTICE:
        raise ValueError(
            f"weights sum to more than {_MAX_LATTICE} steps of their common divisor; "
            "round them to a coarser lattice"
        )
    if total <= 0:
        return 0.0
    if len(set(key)) == 1:
        return log_sf_binomial(-(-total // key[0]), n * len(key), 0.5)
    lattice = _bit_lattice(key)
    total = -(-total // lattice.divisor)
    top = n * lattice.total
    if total > top:
        return -math.inf
    if n * lattice.bits <= 1000 and top * n * lattice.bits <= _TABLE_WORK:
        return float(_bit_table(key, n)[total])
    # Integer comparison: exact however long the text is.
    mirrored = 2 * total <= top
    upper = top - total + 1 if mirrored else total
    if top - upper < lattice.weights[0]:
        smaller = -n * lattice.bits * _LN2  # nothing but all ones reaches it
    else:
        smaller = _nonpositive(_bits_contour(lattice, n, upper))
    return log1mexp(smaller) if mirrored else smaller


# --------------------------------------------------------------------------- normal


def log_sf_normal(z: float) -> float:
    """Logarithm of P(N(0, 1) >= z), for any finite z or an infinity; natural logarithm.

    The complementary error function below z = 20; above, the continued fraction of Mills' ratio
    (DLMF 7.9.2 read for the normal law), which has converged to rounding there. Raises ValueError
    for NaN.
    """
    z = _statistic("z", z)
    if z < 0.0:
        return math.log1p(-0.5 * math.erfc(-z / math.sqrt(2.0)))
    if z < 20.0:
        return math.log(0.5 * math.erfc(z / math.sqrt(2.0)))
    if z == math.inf:
        return -math.inf
    tail = z
    for k in range(40, 0, -1):
        tail = z + k / tail
    return -0.5 * z * z - 0.5 * math.log(2.0 * math.pi) - math.log(tail)


def log_isf_normal(log_p: float) -> float:
    """The z whose upper tail has this log probability: the inverse of `log_sf_normal`.

    log_p <= 0, natural logarithm. Newton's method on the logarithm, which is concave and smooth.
    Raises ValueError for log_p > 0 or NaN.
    """
    log_p = _log_p(log_p)
    if log_p == 0.0:
        return -math.inf
    if log_p == -math.inf:
        return math.inf
    if log_p > -math.log(2.0):
        return -log_isf_normal(log1mexp(log_p))
    z = math.sqrt(max(0.0, -2.0 * (log_p + math.log(2.0))))
    for _ in range(60):
        tail = log_sf_normal(z)
        hazard = math.exp(-0.5 * z * z - 0.5 * math.log(2.0 * math.pi) - tail)
        step = (tail - log_p) / hazard
        z += step
        if abs(step) <= 1e-15 * max(1.0, z):
            break
    return z


# --------------------------------------------------------------------------- combining


def fisher(log_ps: ArrayLike) -> float:
    """One log p-value of several independent ones: P(Gamma(k, 1) >= -sum log p), exact.

    log_ps of shape (k,), natural logarithms. Source: Fisher 1932, "Statistical Methods for
    Research Workers", section 21.1. Raises ValueError for positive or NaN values, or none.
    """
    values = _log_ps(log_ps)
    return log_sf_gamma(-float(values.sum()), values.size)


def stouffer(log_ps: ArrayLike, weights: ArrayLike | None = None) -> float:
    """One log p-value of several independent ones: normal quantiles, weighted and added up.

    log_ps of shape (k,), natural logarithms; weights of shape (k,), positive, all equal if not
    given; choose them before looking (square roots of sample sizes are usual). Source: Stouffer et
    al. 1949, "The American Soldier", volume 1; Liptak 1958. Raises ValueError for positive or NaN
    values, none, or weights that do not fit.
    """
    values = _log_ps(log_ps)
    shares = np.ones(values.size) if weights is None else np.asarray(weights, dtype=np.float64)
    if shares.shape != values.shape or not (np.isfinite(shares) & (shares > 0.0)).all():
        raise ValueError(f"weights must be {values.size} positive numbers, got {weights!r}")
    if (values == 0.0).any():  # p = 1 somewhere: nothing else can outweigh it
        return 0.0
    z = np.array([log_isf_normal(float(value)) for value in values])
    return log_sf_normal(float(shares @ z) / math.sqrt(float(shares @ shares)))


# --------------------------------------------------------------------------- Kolmogorov-Smirnov


def log_sf_kolmogorov(d: float, n: int) -> float:
    """Logarithm of P(D_n >= d): n independent uniforms against the uniform law; natural logarithm.

    An approximation: Kolmogorov's limit at d (sqrt n + 0.12 + 0.11 / sqrt n) (Stephens 1970), whose
    relative error is below 3 % for n >= 20 and p above 0.01 (17 % at p = 1e-4, n = 20); meant for
    controls, not for claims. Raises ValueError for NaN or n < 1.
    """
    d = _statistic("d", d)
    n = _count("n", n)
    root = math.sqrt(n)
    return _log_kolmogorov(d * (root + 0.12 + 0.11 / root))


def log_uniformity(p_values: ArrayLike) -> float:
    """Logarithm of the Kolmogorov-Smirnov p-value of p-values against the uniform law.

    p_values of shape (n,), in [0, 1]; two-sided; the approximation of `log_sf_kolmogorov`. Raises
    ValueError for none, or values outside.
    """
    p = np.sort(np.asarray(p_values, dtype=np.float64).reshape(-1))
    n = p.shape[0]
    if n == 0 or not (p[0] >= 0.0 and p[-1] <= 1.0):
        raise ValueError("uniformity is tested of p-values between 0 and 1, at least one")
    steps = np.arange(n + 1) / n
    return log_sf_kolmogorov(float(max((steps[1:] - p).max(), (p - steps[:-1]).max())), n)


def _log_kolmogorov(x: float) -> float:
    """Logarithm of Kolmogorov's limit law, 2 sum (-1)^(k-1) exp(-2 k^2 x^2)."""
    if x <= 0.0:
        return 0.0
    if x < 1.0:  # the theta-function twin, which converges where the other does not
        terms = [math.exp(-((2 * k - 1) ** 2) * math.pi**2 / (8.0 * x * x)) for k in range(1, 8)]
        return math.log1p(-min(1.0, math.sqrt(2.0 * math.pi) / x * sum(terms)))
    rest = sum((-1) ** (k - 1) * math.exp(-2.0 * (k * k - 1) * x * x) for k in range(1, 8))
    return _nonpositive(math.log(2.0) - 2.0 * x * x + math.log(rest))


def kolmogorov_smirnov(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Largest distance of two empirical laws, and its log p-value: two-sided, exact.

    x of shape (n,), y of shape (m,), finite; returns D and the natural logarithm of P(D' >= D) when
    both are independent samples of one continuous law (with ties, the p-value is too large rather
    than too small). Lattice paths that leave the band are counted by first passage (Hodges 1958),
    in logarithms, in n * m steps. Raises ValueError for an empty sample or values that are not
    finite.
    """
    from filigrane.kernels.paths import log_leaving

    one = np.sort(np.asarray(x, dtype=np.float64).reshape(-1))
    two = np.sort(np.asarray(y, dtype=np.float64).reshape(-1))
    if not one.size or not two.size:
        raise ValueError("both samples must hold at least one value")
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise ValueError("samples must be finite; leave out pieces that could not be scored")
    n, m = one.size, two.size
    both = np.concatenate([one, two])
    # In units of 1 / (n m) everything is an integer, and comparisons are exact.
    below_one = np.searchsorted(one, both, side="right").astype(np.int64)
    below_two = np.searchsorted(two, both, side="right").astype(np.int64)
    distance = int(np.abs(below_one * m - below_two * n).max())
    return distance / (n * m), _nonpositive(float(log_leaving(n, m, distance)))


# --------------------------------------------------------------------------- multiple testing


def sidak(log_p: float, k: int) -> float:
    """Logarithm of 1 - (1-p)**k: the p-value of the smallest of k independent p-values.

    log_p <= 0, k >= 1; natural logarithms. Accurate for every p and k: with
    u = -k log(1-p), log(1 - exp(-u)), where a tiny u is kept as log u. Source: Sidak 1967,
    "Rectangular confidence regions for the means of multivariate normal distributions". Raises
    ValueError for log_p > 0 or NaN, and for k that is not a positive integer.
    """
    log_p = _log_p(log_p)
    k = _count("k", k)
    if k == 1 or log_p in (0.0, -math.inf):
        return _nonpositive(log_p)
    # -log(1-p) = p (1 + p/2 + ...), and p/2 is below rounding for the smallest p.
    log_u = math.log(k) + (log_p if log_p < -36.0 else math.log(-log1mexp(log_p)))
    if log_u > 7.0:
        return 0.0
    u = math.exp(log_u)
    if u < 1e-6:
        return log_u + math.log1p(-0.5 * u)
    return _nonpositive(log1mexp(-u))


def bonferroni(log_p: float, k: int) -> float:
    """min(0, log p + log k): a bound on the p-value of the smallest of any k p-values.

    log_p <= 0, k >= 1; natural logarithms. Source: Bonferroni 1936; valid under every dependence.
    Raises ValueError for log_p > 0 or NaN, and for k that is not a positive integer.
    """
    return _nonpositive(_log_p(log_p) + math.log(_count("k", k)))


def holm(log_ps: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted log p-values, in the order of the input: family-wise error control.

    log_ps of shape (k,), natural logarithms; returns float64 of shape (k,). With p sorted
    ascending, adjusted_i = max over j <= i of min(1, (k-j+1) p_j) (Holm 1979, "A simple
    sequentially rejective multiple test procedure"); valid under every dependence. Raises
    ValueError for positive or NaN values or another number of dimensions.
    """
    values = _log_ps(log_ps)
    k = values.size
    order = np.argsort(values, kind="stable")
    steps = np.minimum(values[order] + np.log(np.arange(k, 0, -1)), 0.0)
    adjusted = np.empty(k)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


def benjamini_hochberg(log_ps: ArrayLike) -> NDArray[np.float64]:
    """Benjamini and Hochberg's adjusted log p-values, in the order of the input.

    Controls the false discovery rate under independence or positive dependence. log_ps of shape
    (k,), natural logarithms; returns float64 of shape (k,). With p sorted ascending,
    adjusted_i = min over j >= i of min(1, k p_j / j) (Benjamini and Hochberg 1995, "Controlling
    the false discovery rate"). Raises ValueError for positive or NaN values or another number of
    dimensions.
    """
    values = _log_ps(log_ps)
    k = values.size
    order = np.argsort(values, kind="stable")
    steps = np.minimum(values[order] + np.log(k / np.arange(1, k + 1)), 0.0)
    adjusted = np.empty(k)
    adjusted[order] = np.minimum.accumulate(steps[::-1])[::-1]
    return adjusted


def monte_carlo_log_pvalue(count: int, n: int) -> float:
    """Logarithm of (count + 1) / (n + 1): the valid p-value of a simulation with n draws under H0.

    count of the n draws were at least as extreme as what was observed; natural logarithm. Source:
    Phipson and Smyth 2010, "Permutation p-values should never be zero". Raises ValueError unless
    0 <= count <= n and n >= 1.
    """
    count = _integer("count", count)
    n = _count("n", n)
    if not 0 <= count <= n:
        raise ValueError(f"count must lie in 0..{n} (the number of draws), got {count}")
    # log1p of the exact difference keeps the digits when nearly every draw is counted.
    if 2 * count >= n:
        return math.log1p(-(n - count) / (n + 1))
    return math.log((count + 1) / (n + 1))
