"""Write vectors/v1/stats.json: reference tail probabilities at 60 digits, with mpmath.

A development script: `python vectors/generate_stats.py` (about a minute). It shares no code with
filigrane.stats and prefers other routes to the same number: exact integers wherever they fit, sums
of all terms, and for the longest sums a contour integral at 60 digits on another contour, with the
step halved until 35 digits stand. Where two routes reach the same case, they are compared.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from mpmath import mp, mpc, mpf

mp.dps = 60

OUTPUT = Path(__file__).parent / "v1" / "stats.json"
TOURNAMENT = tuple(290 - 9 * layer for layer in range(30))
PROVENANCE = (
    "Computed by vectors/generate_stats.py with mpmath at 60 digits and Python integers; no code "
    "shared with filigrane.stats. Binomial and gamma: all terms that count of the smaller tail, "
    "then log1p. Two gammas: the negative binomial mixture (Moschopoulos 1985), all terms. "
    "Irwin-Hall up to n = 1000, weighted bits up to n = 16 and near the top: "
    "exact integers. Longer sums: inversion integral, trapezoid rule, step halved until 35 digits "
    "agree, compared with the exact route where both apply. Floats are exact binary fractions, "
    "written with repr; results are rounded to 30 digits."
)


class SecondaryPeak(ValueError):
    """The integrand has a second peak, which the main-peak integral would miss."""


def text(value: mpf) -> str:
    """30 significant digits."""
    return mp.nstr(value, 30, strip_zeros=False, min_fixed=-5, max_fixed=30)


def log1mexp(x: mpf) -> mpf:
    """log(1 - exp(x))."""
    return mp.log(-mp.expm1(x)) if x > -1 else mp.log1p(-mp.exp(x))


def from_smaller(smaller_is_upper: bool, smaller: mpf) -> mpf:
    """log of the upper tail from whichever tail was summed."""
    return mp.log(smaller) if smaller_is_upper else mp.log1p(-smaller)


# --------------------------------------------------------------------------- references


def binomial(k: int, n: int, p: float) -> mpf:
    """log P(Bin(n, p) >= k), 0 < k <= n, 0 < p < 1."""
    hit = mpf(p)
    miss = 1 - hit
    upper = k > n * hit
    if not upper:
        k, hit, miss = n - k + 1, miss, hit
    log_term = (
        mp.loggamma(n + 1)
        - mp.loggamma(k + 1)
        - mp.loggamma(n - k + 1)
        + k * mp.log(hit)
        + (n - k) * mp.log(miss)
    )
    term = total = mpf(1)
    odds = hit / miss
    while k < n:
        term *= odds * (n - k) / (k + 1)
        total += term
        k += 1
        if term < total * mpf(10) ** -45:
            break
    log_tail = log_term + mp.log(total)
    return log_tail if upper else mp.log1p(-mp.exp(log_tail))


def gamma(s: float, n: int) -> mpf:
    """log P(Gamma(n, 1) >= s), s > 0, by the Poisson sum."""
    mean = mpf(s)
    upper = mean > n
    k = n - 1 if upper else n
    log_term = -mean + k * mp.log(mean) - mp.loggamma(k + 1)
    term = total = mpf(1)
    while True:
        if upper:
            term *= k / mean
            k -= 1
        else:
            k += 1
            term *= mean / k
        total += term
        if term < total * mpf(10) ** -45:
            break
    log_tail = log_term + mp.log(total)
    return log_tail if upper else mp.log1p(-mp.exp(log_tail))


def two_gammas(s: float, n: int, share: float) -> mpf:
    """log P(share A + (1 - share) B >= s), A, B ~ Gamma(n), s > 0, by Moschopoulos's mixture.

    With scales small <= large the sum is small Gamma(2n + K), K negative binomial with n successes
    of probability small/large: a series of positive terms, from either tail of the Gammas.
    """
    small, large = sorted((mpf(share), 1 - mpf(share)))
    x, hit = mpf(s) / small, small / large
    miss = 1 - hit
    upper = s > n
    tiny = mpf(10) ** -45
    last = 0 if upper else int(n * miss / hit + 60 * mp.sqrt(n * miss) / hit + 200)

    # At the first k: the Poisson term 2n + k, the tail beside it, and the weight of k.
    k = last
    poisson = mp.exp(-x + (2 * n + k) * mp.log(x) - mp.loggamma(2 * n + k + 1))
    term = poisson * (2 * n + k) / x if upper else poisson
    tail, j = term, 2 * n + k - 1 if upper else 2 * n + k
    while term > tail * tiny:
        term, j = (term * j / x, j - 1) if upper else (term * x / (j + 1), j + 1)
        tail += term
    weight = mp.exp(
        mp.loggamma(n + k)
        - mp.loggamma(n)
        - mp.loggamma(k + 1)
        + n * mp.log(hit)
        + k * mp.log(miss)
    )
    total = peak = mpf(0)
    while True:
        term = weight * tail
        total += term
        peak = max(peak, term)
        if term < peak * tiny:
            break
        if upper:
            tail += poisson
            poisson *= x / (2 * n + k + 1)
            weight *= miss * (n + k) / (k + 1)
            k += 1
        elif k == 0:
            break
        else:
            poisson *= (2 * n + k) / x
            tail += poisson
            weight *= k / (miss * (n + k - 1))
            k -= 1
    return mp.log(total) if upper else mp.log1p(-total)


def irwin_hall_exact(s: float, n: int) -> mpf:
    """log P(U_1 + ... + U_n >= s), 0 < s < n, by the alternating sum in integers."""
    x = Fraction(s)
    upper = 2 * x >= n
    if upper:
        x = n - x
    top, unit = x.numerator, x.denominator
    total = sum(
        (-1) ** j * math.comb(n, j) * (top - j * unit) ** n for j in range(math.floor(x) + 1)
    )
    return from_smaller(upper, mpf(total) / (mpf(unit) ** n * mp.factorial(n)))


def invert(
    log_ratio: Callable[[mpc], mpc],
    log_at: mpf,
    pole: Callable[[mpc], mpc],
    tilt: mpf,
    y: mpf,
    step: mpf,
) -> mpf:
    """log of (1/2 pi) int exp(K(z) - z y) / pole(z) dt over z = tilt + it, main peak only."""

    def sum_of(step: mpf, offset: mpf) -> mpf:
        total = mpf(0)
        j = 0
        while True:
            t = (j + offset) * step
            z = mpc(tilt, t)
            value = mp.exp(log_ratio(z) - mpc(0, t * y)) / pole(z)
            total += value.real if t == 0 else 2 * value.real
            if j > 4 and abs(value) < mpf(10) ** -45:
                return total * step
            j += 1

    value = sum_of(step, mpf(0))
    while True:
        middle = sum_of(step, mpf(1) / 2)
        finer = (value + middle) / 2
        agree = abs(finer - value) < abs(finer) * mpf(10) ** -35
        value, step = finer, step / 2
        if agree:
            return log_at - tilt * y + mp.log(value / (2 * mp.pi))


def irwin_hall_contour(s: float, n: int) -> mpf:
    """log P(U_1 + ... + U_n >= s) by inversion; for n in the thousands and beyond."""
    y = abs(mpf(s) - mpf(n) / 2)

    def log_sinhc(z: mpc) -> mpc:
        return mp.log(mp.sinh(z / 2) / (z / 2))

    deviation = mp.sqrt(mpf(n) / 12)
    tilt = 1 / deviation
    if y > 2 * deviation:
        guess = 12 * y / n
        ratio = 2 * y / n
        guess = 2 * ratio * (3 - ratio**2) / (1 - ratio**2)
        tilt = mp.findroot(lambda c: n * (mp.coth(c / 2) / 2 - 1 / c) - y, guess)
    spread = mp.sqrt(n * (1 / tilt**2 - mp.csch(tilt / 2) ** 2 / 4))
    log_at = n * log_sinhc(tilt)
    log_tail = invert(
        lambda z: n * (log_sinhc(z) - log_at / n),
        log_at,
        lambda z: z,
        tilt,
        y,
        1 / (4 * spread),
    )
    return log_tail if 2 * mpf(s) >= n else mp.log1p(-mp.exp(log_tail))


def irwin_hall(s: float, n: int) -> mpf:
    """The exact sum up to n = 1000, the inversion beyond."""
    return irwin_hall_exact(s, n) if n <= 1000 else irwin_hall_contour(s, n)


def truncated_counts(n: int, weights: Sequence[int], degree: int) -> list[int]:
    """Coefficients 0..degree of prod_l (1 + x**w_l)**n, in integers."""
    counts = [1] + [0] * degree
    for w in weights:
        choose = [math.comb(n, i) for i in range(min(n, degree // w) + 1)]
        counts = [
            sum(choose[i] * counts[d - i * w] for i in range(min(len(choose), d // w + 1)))
            for d in range(degree + 1)
        ]
    return counts


def all_counts(n: int, weights: Sequence[int]) -> list[int]:
    """All coefficients of prod_l (1 + x**w_l)**n: one integer power, digits as coefficients."""
    width = n * len(weights) + 1  # bits that hold 2**(n m)
    packed = 1
    for w in weights:
        packed += packed << (w * width)
    product = packed**n
    size = n * sum(weights) + 1
    binary = bin(product)[2:].zfill(size * width)
    return [int(binary[i * width : (i + 1) * width], 2) for i in range(size)][::-1]


def bits_from_counts(total: int, n: int, weights: Sequence[int], counts: list[int]) -> mpf:
    """log P(sum >= total) from the counts of the deficits 0, 1, ..."""
    deficit = n * sum(weights) - total
    ways = sum(counts[: deficit + 1])
    bits = n * len(weights)
    upper = 2 * ways <= 1 << bits
    # ldexp, because mpmath strips the zeros of a power of two one by one.
    return from_smaller(upper, mp.ldexp(mpf(ways if upper else (1 << bits) - ways), -bits))


def bits_contour(total: int, n: int, weights: Sequence[int]) -> mpf:
    """log P(sum >= total) by inversion, for n of at least 100 and totals not near the top."""
    whole = n * sum(weights)
    upper = 2 * total > whole
    if not upper:
        total = whole - total + 1
    y = mpf(2 * total - whole) / 2
    if y >= mpf(whole) / 2 - 4 * max(weights):
        raise SecondaryPeak("near the top the distribution is a few points")
    deviation = mp.sqrt(mpf(n * sum(w * w for w in weights)) / 4)
    tilt = 1 / deviation
    if y > 2 * deviation:

        def excess(c: mpf) -> mpf:
            return n * sum(w * mp.tanh(w * c / 2) for w in weights) / 2 - y

        low, high = mpf(0), 4 * y / deviation**2
        while excess(high) < 0:
            high *= 2
        tilt = mp.findroot(excess, (low, high), solver="anderson", tol=1e-15)
    spread = mp.sqrt(n * sum(w * w * mp.sech(w * tilt / 2) ** 2 for w in weights) / 4)
    log_at = n * mp.fsum(mp.log(mp.cosh(w * tilt / 2)) for w in weights)

    # Outside the main peak the integrand must vanish, or this route does not apply.
    edge = 25 / float(spread)
    flats = [1.0 / math.cosh(min(300.0, 0.5 * w * float(tilt))) ** 2 for w in weights]
    for i in range(200_001):
        theta = edge + (math.pi - edge) * i / 200_000 if i else edge
        log_size = 0.0
        for w, flat in zip(weights, flats, strict=True):
            log_size += 0.5 * math.log1p(-flat * math.sin(0.5 * w * theta) ** 2 + 1e-18)
            if n * log_size < -90.0:
                break
        else:
            raise SecondaryPeak(f"at {theta}: {total=} {n=}")

    def log_ratio(z: mpc) -> mpc:
        value = mpc(1)
        for w in weights:
            value *= mp.cosh(w * z / 2)
        return n * (mp.log(value) - log_at / n)

    log_tail = invert(log_ratio, log_at, lambda z: 1 - mp.exp(-z), tilt, y, 1 / (4 * spread))
    return log_tail if upper else mp.log1p(-mp.exp(log_tail))


# --------------------------------------------------------------------------- cases


def binomial_cases() -> list[dict[str, object]]:
    """Cases over n, p and distance from the mean."""
    cases = {(1, 1, 0.25), (1, 1, 0.9999), (1, 2, 1e-5), (2, 2, 0.999), (1, 1000000, 1e-9)}
    cases |= {(1000000, 1000000, 0.5), (999999, 1000000, 0.5), (9000, 10000, 0.25), (5, 9, 1e-300)}
    cases |= {(1, 1, 1e-14), (3, 7, 1 / 3), (10, 10, 0.1), (500000, 1000000, 0.5)}
    cases |= {(60, 200, 0.25), (1000, 1000000, 1e-12), (990, 1000, 0.999), (20, 1000, 0.5)}
    for n in (5, 30, 200, 1000, 10_000, 100_000, 1_000_000):
        for i, z in enumerate((-7.1, -3.7, -1.0, 0.0, 0.4, 3.0, 8.0, 30.0, 139.0)):
            for p in ((0.25, 0.5, 1 / 3), (0.5, 0.1, 0.9), (0.01, 0.25, 0.997))[i % 3]:
                k = round(n * p + z * math.sqrt(n * p * (1 - p)))
                if 0 < k <= n and (i + n // 7) % 3 != 1:
                    cases.add((k, n, p))
    return [{"k": k, "n": n, "p": p, "log_p": text(binomial(k, n, p))} for k, n, p in sorted(cases)]


def gamma_cases() -> list[dict[str, object]]:
    """Cases over n and distance from the mean."""
    cases = {(1e-12, 1), (0.5, 1), (745.25, 1), (1e4, 1), (1e-5, 2), (1e-3, 4), (12000.0, 200)}
    cases |= {(1e300, 3), (1e-30, 9), (200.0, 200), (1e6, 1000000), (3e6, 1000000), (5e4, 1000000)}
    for n in (2, 3, 12, 60, 200, 1000, 30_000, 1_000_000):
        for z in (-7.1, -3.7, -1.3, -0.01, 0.3, 3.0, 8.0, 30.0, 141.0):
            s = n + z * math.sqrt(n)
            if s > 0:
                cases.add((s, n))
    return [{"s": s, "n": n, "log_p": text(gamma(s, n))} for s, n in sorted(cases)]


def two_gammas_cases() -> list[dict[str, object]]:
    """Cases over n, share and distance from the mean; few of the longest, which take seconds."""
    cases = {
        (1e-9, 1, 0.25),
        (1e-3, 2, 0.75),
        (3000.0, 1, 0.4),
        (2e3, 30, 0.9),
        (1e4, 2, 0.4),
        (5.0, 4, 0.02),
    }
    cases |= {(60.0, 1, 0.98), (0.7, 3, 0.499999), (400.0, 200, 0.500001), (200.0, 200, 0.3)}
    for n in (1, 2, 5, 12, 60, 200, 1000):
        for i, z in enumerate((-7.1, -3.0, -0.5, 0.01, 1.0, 5.0, 30.0, 141.0)):
            for share in ((0.25, 0.7), (0.45, 0.9), (0.1, 0.03125), (0.49, 0.6))[(i + n) % 4]:
                s = n + z * math.sqrt(n * (share**2 + (1 - share) ** 2))
                if s > 0:
                    cases.add((s, n, share))
    for z, share in ((-3.0, 0.3), (0.5, 0.75), (6.0, 0.3), (141.0, 0.4375)):
        cases.add(
            (100_000 + z * math.sqrt(100_000 * (share**2 + (1 - share) ** 2)), 100_000, share)
        )
    return [
        {"s": s, "n": n, "share": share, "log_p": text(two_gammas(s, n, share))}
        for s, n, share in sorted(cases)
    ]


def irwin_hall_cases() -> list[dict[str, object]]:
    """Cases over n and distance from the mean, near the corners, and between the routes."""
    cases = {(1e-12, 1), (0.999999999, 1), (0.7, 1), (1e-3, 2), (1.999, 2), (1.0, 2), (2.5, 3)}
    cases |= {(1.0, 6), (5.25, 6), (1e-9, 3), (2.999999, 3), (999999.5, 1000000), (999990.5, 10**6)}
    cases |= {(20.5, 40), (20.5, 41), (37.5, 40), (38.5, 41), (3.0, 40), (2.0, 41), (990.25, 1000)}
    cases |= {(700.0, 1000), (850.0, 1000), (870.0, 1000), (880.0, 1000), (9000.0, 10000)}
    cases |= {(9100.5, 10000), (900_000.0, 1_000_000), (930_000.5, 1_000_000)}
    for n in (4, 12, 25, 39, 45, 64, 200, 1000, 10_000, 1_000_000):
        for z in (-7.1, -3.7, -1.0, 0.01, 0.5, 3.0, 9.0, 40.0, 141.0):
            s = n / 2 + z * math.sqrt(n / 12)
            if 0 < s < n:
                cases.add((s, n))
    return [{"s": s, "n": n, "log_p": text(irwin_hall(s, n))} for s, n in sorted(cases)]


def weighted_bits_cases() -> list[dict[str, object]]:
    """Several sets of weights; the thirty tournament weights for most."""
    rows: list[dict[str, object]] = []

    def add(total: int, n: int, weights: Sequence[int], log_p: mpf) -> None:
        rows.append({"total": total, "n": n, "weights": list(weights), "log_p": text(log_p)})

    rng = random.Random(20261121)
    small = ((3, 2, 1), (1, 2, 4, 8), (20, 40, 60), (7, 7, 7), (5,), (10, 1), (1000, 1, 1))
    for weights in small:
        for n in (1, 3, 8, 40):
            counts = all_counts(n, weights)
            top = n * sum(weights)
            for total in sorted({1, top, top - 1, rng.randint(1, top), rng.randint(top // 2, top)}):
                add(total, n, weights, bits_from_counts(total, n, weights, counts))
    for n in (1, 2, 5, 6, 12, 16):
        counts = all_counts(n, TOURNAMENT)
        top = n * sum(TOURNAMENT)
        deviation = math.sqrt(n * sum(w * w for w in TOURNAMENT)) / 2
        for z in (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 5.0, 8.0, 12.0):
            total = round(top / 2 + z * deviation)
            if 0 < total < top:
                add(total, n, TOURNAMENT, bits_from_counts(total, n, TOURNAMENT, counts))
        add(top - 60, n, TOURNAMENT, bits_from_counts(top - 60, n, TOURNAMENT, counts))
    for n in (50, 200, 1000, 100_000):
        counts = truncated_counts(n, TOURNAMENT, 1500)
        top = n * sum(TOURNAMENT)
        for deficit in (0, 28, 29, 100, 700, 1500):
            log_p = bits_from_counts(top - deficit, n, TOURNAMENT, counts)
            add(top - deficit, n, TOURNAMENT, log_p)
    for n in (200, 400, 1000, 10_000, 100_000):
        top = n * sum(TOURNAMENT)
        deviation = math.sqrt(n * sum(w * w for w in TOURNAMENT)) / 2
        for z in (-7.1, -1.0, 0.2, 3.0, 9.0, 30.0, 141.0):
            total = round(top / 2 + z * deviation)
            try:
                add(total, n, TOURNAMENT, bits_contour(total, n, TOURNAMENT))
            except SecondaryPeak:
                continue  # far out in a short sum, where the exact counts above take over
    for n in (1_000_000, 10_000_000):
        for z in (-1.0, 0.2, 3.0):
            total = round(3 * n + z * math.sqrt(3.5 * n))
            add(total, n, (3, 2, 1), bits_contour(total, n, (3, 2, 1)))
    return rows


def correction_cases() -> dict[str, list[dict[str, object]]]:
    """Corrections and helpers: each a one-line formula at 60 digits and wide exponents."""
    log_ps = (
        -1e4,
        -800.0,
        -745.0,
        -60.5,
        -36.5,
        -35.5,
        -15.5,
        -13.8,
        -3.0,
        -0.7,
        -0.1,
        -1e-3,
        -1e-12,
    )
    sidak: list[dict[str, object]] = []
    bonferroni: list[dict[str, object]] = []
    for log_p in (*log_ps, -1e-300):
        for k in (1, 2, 37, 1000, 10**6, 10**12):
            value = log1mexp(k * log1mexp(mpf(log_p)))
            sidak.append({"log_p": log_p, "k": k, "adjusted": text(value)})
            bound = min(mpf(0), mpf(log_p) + mp.log(k))
            bonferroni.append({"log_p": log_p, "k": k, "adjusted": text(bound)})
    families = (
        [-3.0],
        [-0.5, -20.0, -3.0, -3.0, -1e4, -0.01],
        [-1e-3, -2e-3, 0.0, -5.0],
        [*(-711.0 + i for i in range(12)), -5.0, -4.5, -4.25, -4.0, -3.9],
    )
    holm: list[dict[str, object]] = []
    benjamini_hochberg: list[dict[str, object]] = []
    for family in families:
        k = len(family)
        order = sorted(range(k), key=lambda i: family[i])
        down = [min(mpf(0), family[i] + mp.log(k - rank)) for rank, i in enumerate(order)]
        up = [min(mpf(0), family[i] + mp.log(mpf(k) / (rank + 1))) for rank, i in enumerate(order)]
        step_down, step_up = [""] * k, [""] * k
        for rank, i in enumerate(order):
            step_down[i] = text(max(down[: rank + 1]))
            step_up[i] = text(min(up[rank:]))
        holm.append({"log_ps": family, "adjusted": step_down})
        benjamini_hochberg.append({"log_ps": family, "adjusted": step_up})
    monte_carlo = [
        {"count": count, "n": n, "log_p": text(mp.log(mpf(count + 1) / (n + 1)))}
        for count, n in ((0, 1), (0, 999), (1, 10**6), (10**6, 10**6), (10**9 - 1, 10**9), (7, 19))
    ]
    one_minus = [
        {"x": x, "value": text(log1mexp(mpf(x)))}
        for x in (-1e-300, -1e-16, -1e-5, -0.3, -0.69, -0.7, -2.0, -40.0, -700.0)
    ]
    return {
        "sidak": sidak,
        "bonferroni": bonferroni,
        "holm": holm,
        "benjamini_hochberg": benjamini_hochberg,
        "monte_carlo_log_pvalue": monte_carlo,
        "log1mexp": one_minus,
    }


def check_routes() -> None:
    """Compare the inversion with exact integers where both apply."""
    for s, n in ((560.5, 1000), (500.25, 1000), (450.5, 1000), (800.0, 1000)):
        exact, contour = irwin_hall_exact(s, n), irwin_hall_contour(s, n)
        assert abs(exact / contour - 1) < mpf(10) ** -33, (s, n)
    weights = (5, 4, 3, 2)
    counts = all_counts(150, weights)
    for total in (1000, 1051, 1200, 1350):
        exact = bits_from_counts(total, 150, weights, counts)
        assert abs(exact / bits_contour(total, 150, weights) - 1) < mpf(10) ** -33, total
    for s, n in ((150.0, 200), (260.0, 200)):
        exact = mp.log(mp.gammainc(n, mpf(s), regularized=True))
        assert abs(exact / gamma(s, n) - 1) < mpf(10) ** -33, (s, n)
    for s, n in ((150.0, 200), (260.0, 200)):
        share = 0.5 - 2.0**-40
        equal = gamma(2 * s, 2 * n)
        assert abs(equal / two_gammas(s, n, share) - 1) < mpf(10) ** -20, (s, n)
    # Two exponentials in closed form.
    closed = mp.log((3 * mp.exp(-mpf(8)) - mp.exp(-mpf(24))) / 2)
    assert abs(closed / two_gammas(6.0, 1, 0.25) - 1) < mpf(10) ** -33
    for k, n, p in ((30, 100, 0.25), (12, 100, 0.25)):
        exact = mp.log(mp.betainc(k, n - k + 1, 0, mpf(p), regularized=True))
        assert abs(exact / binomial(k, n, p) - 1) < mpf(10) ** -33, (k, n, p)


def main() -> None:
    """Write the file, one case a line."""
    check_routes()
    sections: dict[str, list[dict[str, object]]] = {
        "binomial": binomial_cases(),
        "gamma": gamma_cases(),
        "two_gammas": two_gammas_cases(),
        "irwin_hall": irwin_hall_cases(),
        "weighted_bits": weighted_bits_cases(),
        **correction_cases(),
    }
    parts = [f'"provenance": {json.dumps(PROVENANCE)}']
    for name, rows in sections.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        parts.append(f'"{name}": [\n{lines}\n]')
    OUTPUT.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
