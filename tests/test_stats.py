"""Tail probabilities against 30-digit references, enumeration, closed forms and properties."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filigrane import stats

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "v1" / "stats.json").read_text(encoding="utf-8")
)
TOURNAMENT = [290 - 9 * layer for layer in range(30)]
RELATIVE = 1e-10
# Two results for neighbouring statistics may each be off by rounding.
ROUNDING = 1e-12

quick = settings(max_examples=40, deadline=None)


def near(got: float, reference: str) -> bool:
    """Equal to RELATIVE, or both too close to zero for a normal float."""
    expected = float(reference)
    return math.isclose(got, expected, rel_tol=RELATIVE, abs_tol=2.3e-308)


def not_above(later: float, earlier: float) -> bool:
    """later <= earlier, up to rounding."""
    return later <= earlier or math.isclose(later, earlier, rel_tol=ROUNDING, abs_tol=2.3e-308)


# --------------------------------------------------------------------------- vectors


@pytest.mark.parametrize(
    ("section", "function", "arguments"),
    [
        ("binomial", stats.log_sf_binomial, ("k", "n", "p")),
        ("gamma", stats.log_sf_gamma, ("s", "n")),
        ("two_gammas", stats.log_sf_two_gammas, ("s", "n", "share")),
        ("irwin_hall", stats.log_sf_irwin_hall, ("s", "n")),
        ("weighted_bits", stats.log_sf_weighted_bits, ("total", "n", "weights")),
    ],
)
def test_laws_match_the_vectors(
    section: str, function: Callable[..., float], arguments: tuple[str, ...]
) -> None:
    rows = VECTORS[section]
    assert len(rows) >= 60
    wrong = []
    for row in rows:
        got = function(*(row[name] for name in arguments))
        assert type(got) is float
        if not (near(got, row["log_p"]) and got <= 0.0):
            wrong.append((row, got))
    assert not wrong, wrong[:5]


def test_vectors_reach_both_ends() -> None:
    for section in ("binomial", "gamma", "two_gammas", "irwin_hall", "weighted_bits"):
        values = [float(row["log_p"]) for row in VECTORS[section]]
        assert min(values) < -9_000.0
        assert max(v for v in values if v < 0.0) > -1e-10
        assert max(row["n"] for row in VECTORS[section]) >= 100_000
    assert "mpmath" in VECTORS["provenance"]


@pytest.mark.parametrize("name", ["sidak", "bonferroni"])
def test_single_corrections_match_the_vectors(name: str) -> None:
    for row in VECTORS[name]:
        got = getattr(stats, name)(row["log_p"], row["k"])
        assert near(got, row["adjusted"]), (row, got)
        assert got <= 0.0


@pytest.mark.parametrize("name", ["holm", "benjamini_hochberg"])
def test_family_corrections_match_the_vectors(name: str) -> None:
    for row in VECTORS[name]:
        got = getattr(stats, name)(row["log_ps"])
        assert got.dtype == np.float64
        assert got.shape == (len(row["log_ps"]),)
        assert all(near(float(g), a) for g, a in zip(got, row["adjusted"], strict=True)), row


def test_helpers_match_the_vectors() -> None:
    for row in VECTORS["log1mexp"]:
        assert near(stats.log1mexp(row["x"]), row["value"]), row
    for row in VECTORS["monte_carlo_log_pvalue"]:
        assert near(stats.monte_carlo_log_pvalue(row["count"], row["n"]), row["log_p"]), row


# --------------------------------------------------------------------------- enumeration


@pytest.mark.parametrize("p", [0.5, 0.25, 1e-3, 0.999])
@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_binomial_by_summing_all_terms(n: int, p: float) -> None:
    pmf = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    for k in range(n + 1):
        below, above = math.fsum(pmf[:k]), math.fsum(pmf[k:])
        expected = math.log(above) if above < 0.5 else math.log1p(-below)
        assert math.isclose(stats.log_sf_binomial(k, n, p), expected, rel_tol=1e-11)


@pytest.mark.parametrize("weights", [[1], [2, 1], [3, 3], [5, 1, 1], [6, 4, 10], [1, 2, 4]])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_weighted_bits_by_enumeration(n: int, weights: list[int]) -> None:
    outcomes = [
        sum(w * b for w, b in zip(weights * n, bits, strict=True))
        for bits in itertools.product((0, 1), repeat=n * len(weights))
    ]
    for total in range(-1, n * sum(weights) + 2):
        ways = sum(outcome >= total for outcome in outcomes)
        expected = math.log(ways / len(outcomes)) if ways else -math.inf
        got = stats.log_sf_weighted_bits(total, n, weights)
        assert math.isclose(got, expected, rel_tol=1e-11)


@pytest.mark.parametrize("n", [2, 5, 9, 17])
def test_irwin_hall_at_integers_counts_permutations(n: int) -> None:
    # P(j <= sum < j + 1) = (permutations of n with j descents) / n!.
    eulerian = [1]
    for size in range(2, n + 1):
        eulerian = [
            (j + 1) * (eulerian[j] if j < size - 1 else 0)
            + (size - j) * (eulerian[j - 1] if j else 0)
            for j in range(size)
        ]
    for j in range(1, n):
        above, below = (sum(part) / math.factorial(n) for part in (eulerian[j:], eulerian[:j]))
        expected = math.log(above) if above < 0.5 else math.log1p(-below)
        assert math.isclose(stats.log_sf_irwin_hall(j, n), expected, rel_tol=1e-10)


def test_routes_of_weighted_bits_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, transforms and separate nodes compute the same numbers."""
    cases = [(n, z) for n in (5, 40, 150) for z in (-4.0, 0.1, 5.0)]
    totals = [
        round(n * sum(TOURNAMENT) / 2 + z * math.sqrt(n / 4 * sum(w * w for w in TOURNAMENT)))
        for n, z in cases
    ]
    usual = [
        stats.log_sf_weighted_bits(t, n, TOURNAMENT)
        for t, (n, _) in zip(totals, cases, strict=True)
    ]
    monkeypatch.setattr(stats, "_TABLE_WORK", 0)
    monkeypatch.setattr(stats, "_FFT_NODES", 0)
    for total, (n, _), expected in zip(totals, cases, usual, strict=True):
        got = stats.log_sf_weighted_bits(total, n, TOURNAMENT)
        assert math.isclose(got, expected, rel_tol=1e-11)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.45, 0.499])
@pytest.mark.parametrize("s", [1e-3, 0.4, 1.0, 3.0, 90.0, 5000.0])
def test_two_gammas_of_one_position_in_closed_form(s: float, share: float) -> None:
    w, v = share, 1.0 - share
    # (v exp(-s/v) - w exp(-s/w)) / (v - w), from the smaller tail; below, its series in s.
    if s >= 0.4:
        expected = -s / v + math.log((v - w * math.exp(s / v - s / w)) / (v - w))
        assert math.isclose(stats.log_sf_two_gammas(s, 1, share), expected, rel_tol=1e-11)
    elif s < 1e-3 * w:
        below = s * s / (2.0 * v * w) * (1.0 - s / (3.0 * v * w))
        assert math.isclose(stats.log_sf_two_gammas(s, 1, share), -below, rel_tol=1e-5)
    assert stats.log_sf_two_gammas(s, 1, share) == pytest.approx(
        stats.log_sf_two_gammas(s, 1, 1.0 - share), rel=1e-10
    )


@pytest.mark.parametrize("n", [1, 9, 300])
def test_two_gammas_meet_one_gamma_at_the_ends(n: int) -> None:
    for s in (0.3 * n, 1.1 * n, 4.0 * n):
        for share in (0.0, 1.0, 1e-15):
            one = stats.log_sf_gamma(s, n)
            assert math.isclose(stats.log_sf_two_gammas(s, n, share), one, rel_tol=1e-11)
        half = stats.log_sf_gamma(2.0 * s, 2 * n)
        assert stats.log_sf_two_gammas(s, n, 0.5) == half
        assert math.isclose(stats.log_sf_two_gammas(s, n, 0.5 - 1e-13), half, rel_tol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 41, 3000, 10**6])
def test_chernoff_bounds_lie_above_the_tails(n: int) -> None:
    for share in (0.5, 0.5001, 0.51, 0.6, 0.8, 0.97, 0.985, 0.999, 0.9999999):
        bound, tail = (
            stats.log_chernoff_irwin_hall(share * n, n),
            stats.log_sf_irwin_hall(share * n, n),
        )
        assert tail <= bound <= 0.0
        bound, tail = (
            stats.log_chernoff_gamma(2.0 * share * n, n),
            stats.log_sf_gamma(2.0 * share * n, n),
        )
        assert tail <= bound <= 0.0
    assert stats.log_chernoff_gamma(0.9 * n, n) == stats.log_chernoff_irwin_hall(0.4 * n, n) == 0.0


@pytest.mark.parametrize("mean", [0.5000001, 0.5004, 0.502, 0.55, 0.7, 0.9, 0.978, 0.983, 0.99999])
def test_chernoff_of_uniforms_is_the_least_of_its_family(mean: float) -> None:
    n = 1000
    bound = stats.log_chernoff_irwin_hall(mean * n, n)

    def at(t: float) -> float:  # log((exp(t) - 1)/t) - t mean, centred against cancellation
        half = t / 2
        log_sinhc = half * half / 6 if half < 1e-4 else half + math.log(-math.expm1(-t) / t)
        return n * (log_sinhc - t * (mean - 0.5))

    guesses = np.exp(np.linspace(math.log(1e-7), math.log(2e5), 20_001))
    least = min(at(float(t)) for t in guesses)
    assert math.isclose(bound, least, rel_tol=1e-5)
    # The grid misses the minimum by a little, from above.
    assert bound <= least + 1e-9 * abs(least)


def test_chernoff_of_gammas_is_the_published_form() -> None:
    for n, mean in ((1, 3.0), (200, 1.5), (5000, 1.0001), (7, 1e6)):
        expected = -n * (mean - 1.0 - math.log(mean))
        assert math.isclose(stats.log_chernoff_gamma(mean * n, n), expected, rel_tol=1e-8)


def test_routes_of_irwin_hall_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers and the contour meet in both directions."""
    cases = [(n, x * n) for n in (60, 90) for x in (0.3, 0.45, 0.5, 0.52, 0.6, 0.7)]
    contour = [stats.log_sf_irwin_hall(s, n) for n, s in cases]
    monkeypatch.setattr(stats, "_RATIONAL_MAX_N", 100)
    for (n, s), expected in zip(cases, contour, strict=True):
        assert math.isclose(stats.log_sf_irwin_hall(s, n), expected, rel_tol=1e-11)


@pytest.mark.parametrize("n", [7, 300, 20_000])
def test_equal_weights_are_the_binomial(n: int) -> None:
    for k in (n, round(1.6 * n), 2 * n):
        expected = stats.log_sf_binomial(k, 3 * n, 0.5)
        assert stats.log_sf_weighted_bits(4 * k, n, [4, 4, 4]) == expected
        assert stats.log_sf_weighted_bits(4 * k - 3, n, [4, 4, 4]) == expected


def test_common_divisor_does_not_matter() -> None:
    for total in (100, 215, 330):
        expected = stats.log_sf_weighted_bits(total, 90, [3, 2])
        assert stats.log_sf_weighted_bits(70 * total, 90, [210, 140]) == expected
        assert stats.log_sf_weighted_bits(70 * total - 69, 90, [210, 140]) == expected


# --------------------------------------------------------------------------- properties


@quick
@given(st.integers(1, 5000), st.floats(1e-9, 1.0 - 1e-9), st.floats(-0.1, 1.1))
def test_binomial_is_monotone(n: int, p: float, share: float) -> None:
    k = round(share * n)
    here, there = stats.log_sf_binomial(k, n, p), stats.log_sf_binomial(k + 1, n, p)
    assert not_above(there, here)
    assert there <= 0.0
    assert (there == -math.inf) == (k + 1 > n)


@quick
@given(st.integers(1, 5000), st.floats(-9.0, 60.0), st.floats(0.0, 3.0))
def test_gamma_is_monotone(n: int, z: float, step: float) -> None:
    s = n + z * math.sqrt(n)
    here, there = stats.log_sf_gamma(s, n), stats.log_sf_gamma(s + step, n)
    assert not_above(there, here)
    assert -math.inf < there <= 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 500), st.floats(0.0, 1.0), st.floats(-9.0, 60.0), st.floats(0.0, 3.0))
def test_two_gammas_are_monotone(n: int, share: float, z: float, step: float) -> None:
    s = n + z * math.sqrt(n)
    here = stats.log_sf_two_gammas(s, n, share)
    there = stats.log_sf_two_gammas(s + step, n, share)
    assert not_above(there, here)
    assert -math.inf < there <= 0.0


@quick
@given(st.integers(1, 3000), st.floats(0.0, 1.0), st.floats(0.0, 0.5))
def test_irwin_hall_is_monotone(n: int, share: float, step: float) -> None:
    s = share * n
    here, there = stats.log_sf_irwin_hall(s, n), stats.log_sf_irwin_hall(s + step, n)
    assert not_above(there, here)
    assert there <= 0.0
    assert (there == -math.inf) == (s + step >= n)


@quick
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 400),
    st.floats(-0.05, 1.05),
)
def test_weighted_bits_are_monotone(weights: list[int], n: int, share: float) -> None:
    top = n * sum(weights)
    total = round(share * top)
    here = stats.log_sf_weighted_bits(total, n, weights)
    there = stats.log_sf_weighted_bits(total + 1, n, weights)
    assert not_above(there, here)
    assert there <= 0.0
    assert (there == -math.inf) == (total + 1 > top)


@quick
@given(st.integers(2, 2000), st.floats(0.01, 0.99))
def test_irwin_hall_is_symmetric(n: int, share: float) -> None:
    s = n * share
    upper, lower = stats.log_sf_irwin_hall(s, n), stats.log_sf_irwin_hall(n - s, n)
    # n - s rounds by up to half a unit in the last place of n, so the sum is 1 only to that.
    assert math.isclose(math.exp(upper) + math.exp(lower), 1.0, rel_tol=1e-10)


@quick
@given(st.floats(0.0, 1.0, exclude_max=True), st.floats(0.0, 1e5), st.floats(0.0, 1.0))
def test_closed_forms_for_one_position(u: float, s: float, p: float) -> None:
    assert stats.log_sf_irwin_hall(u, 1) == math.log1p(-u)
    assert stats.log_sf_gamma(s, 1) == -s
    if 0.0 < p < 1.0:
        assert math.isclose(stats.log_sf_binomial(1, 1, p), math.log(p), rel_tol=1e-12)


@quick
@given(st.floats(0.0, 700.0))
def test_closed_form_of_two_exponentials(s: float) -> None:
    expected = math.log1p(s) - s
    # The difference cancels for small s; the function does not.
    assert math.isclose(stats.log_sf_gamma(s, 2), expected, rel_tol=1e-12, abs_tol=3e-16)


@quick
@given(st.floats(-2e4, 0.0), st.integers(1, 10**12))
def test_sidak_lies_between_p_and_bonferroni(log_p: float, k: int) -> None:
    adjusted = stats.sidak(log_p, k)
    assert not_above(log_p, adjusted)
    assert not_above(adjusted, stats.bonferroni(log_p, k))
    assert adjusted <= 0.0


@quick
@given(st.lists(st.floats(-1e4, 0.0), max_size=30), st.randoms())
def test_family_corrections_follow_the_order_of_the_input(values: list[float], rng: Any) -> None:
    order = list(range(len(values)))
    rng.shuffle(order)
    for correct in (stats.holm, stats.benjamini_hochberg):
        adjusted = correct(values)
        shuffled = correct([values[i] for i in order])
        assert np.array_equal(shuffled, adjusted[order])
        assert np.all(adjusted >= np.array(values))
        assert np.all(adjusted <= 0.0)
    assert np.all(stats.holm(values) >= stats.benjamini_hochberg(values) - 1e-12)


@quick
@given(st.lists(st.floats(-1e5, 700.0), min_size=1, max_size=20))
def test_logsumexp(values: list[float]) -> None:
    top = max(values)
    expected = top + math.log(math.fsum(math.exp(v - top) for v in values))
    assert math.isclose(stats.logsumexp(values), expected, rel_tol=1e-13, abs_tol=1e-13)


# --------------------------------------------------------------------------- ends and checks


def test_impossible_and_certain_events() -> None:
    assert stats.log_sf_binomial(0, 5, 0.3) == 0.0
    assert stats.log_sf_binomial(6, 5, 0.3) == -math.inf
    assert stats.log_sf_binomial(1, 5, 0.0) == -math.inf
    assert stats.log_sf_binomial(5, 5, 1.0) == 0.0
    assert stats.log_sf_gamma(-1.0, 4) == 0.0
    assert stats.log_sf_gamma(math.inf, 4) == -math.inf
    assert stats.log_sf_gamma(5e-324, 2) == 0.0
    assert stats.log_sf_two_gammas(-1.0, 4, 0.3) == 0.0
    assert stats.log_sf_two_gammas(math.inf, 4, 0.3) == -math.inf
    assert stats.log_sf_two_gammas(1e-200, 4, 0.3) == 0.0
    assert -math.inf < stats.log_sf_two_gammas(1e300, 4, 0.3) < -1e299
    assert stats.log_chernoff_gamma(math.inf, 4) == -math.inf
    assert stats.log_chernoff_irwin_hall(4.0, 4) == -math.inf
    assert stats.log_sf_irwin_hall(0.0, 4) == 0.0
    assert stats.log_sf_irwin_hall(4.0, 4) == -math.inf
    assert stats.log_sf_irwin_hall(5e-324, 1000) == 0.0
    assert stats.log_sf_weighted_bits(0, 3, [2, 1]) == 0.0
    assert stats.log_sf_weighted_bits(10, 3, [2, 1]) == -math.inf
    assert stats.logsumexp([]) == -math.inf
    assert stats.logsumexp([-math.inf, -math.inf]) == -math.inf
    assert stats.log1mexp(0.0) == -math.inf
    assert stats.log1mexp(-math.inf) == 0.0
    assert stats.sidak(-math.inf, 9) == -math.inf
    assert stats.sidak(0.0, 9) == 0.0
    assert stats.sidak(-1e-300, 1) == -1e-300
    assert stats.holm([]).shape == (0,)
    assert stats.benjamini_hochberg([]).shape == (0,)
    assert not math.copysign(1.0, stats.log_sf_gamma(1e-200, 3)) < 0.0


def test_the_largest_float_below_the_top_is_finite() -> None:
    for n in (1, 2, 40, 41, 1000):
        s = math.nextafter(float(n), 0.0)
        expected = n * math.log(n - s) - math.lgamma(n + 1)
        assert math.isclose(stats.log_sf_irwin_hall(s, n), expected, rel_tol=1e-12)


def test_numpy_scalars_are_accepted() -> None:
    assert stats.log_sf_binomial(np.int64(3), np.int32(9), np.float64(0.25)) < 0.0
    assert stats.log_sf_gamma(np.float32(3.0), np.int64(2)) < 0.0
    got = stats.log_sf_weighted_bits(np.int64(8), np.int64(3), np.array([2, 1]))
    assert got == stats.log_sf_weighted_bits(8, 3, [2, 1])


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (stats.log_sf_binomial, (1, 0, 0.5), "n must be at least 1"),
        (stats.log_sf_binomial, (1.5, 3, 0.5), "k must be an integer"),
        (stats.log_sf_binomial, (1, 3, 1.5), r"p must be a probability in \[0, 1\]"),
        (stats.log_sf_binomial, (1, 3, math.nan), "p must be a probability"),
        (stats.log_sf_gamma, (math.nan, 3), "s is NaN"),
        (stats.log_sf_gamma, (1.0, 2.0), "n must be an integer"),
        (stats.log_sf_two_gammas, (math.nan, 3, 0.4), "s is NaN"),
        (stats.log_sf_two_gammas, (1.0, 0, 0.4), "n must be at least 1"),
        (stats.log_sf_two_gammas, (1.0, 3, 1.1), r"share must lie in \[0, 1\]"),
        (stats.log_sf_two_gammas, (1.0, 3, math.nan), "share must lie in"),
        (stats.log_chernoff_gamma, (math.nan, 3), "total is NaN"),
        (stats.log_chernoff_gamma, (1.0, 0), "n must be at least 1"),
        (stats.log_chernoff_irwin_hall, (math.nan, 3), "total is NaN"),
        (stats.log_chernoff_irwin_hall, (1.0, 1.5), "n must be an integer"),
        (stats.log_sf_irwin_hall, (math.nan, 3), "s is NaN"),
        (stats.log_sf_irwin_hall, (1.0, -3), "n must be at least 1"),
        (stats.log_sf_weighted_bits, (1, 3, []), "weights must hold 1 to 1000"),
        (stats.log_sf_weighted_bits, (1, 3, [1, 0]), "weights must be positive"),
        (stats.log_sf_weighted_bits, (1, 3, [1.5]), "every weight must be an integer"),
        (stats.log_sf_weighted_bits, (1, 3, [1 << 21, 1]), "coarser lattice"),
        (stats.log_sf_weighted_bits, (0.5, 3, [1]), "total must be an integer"),
        (stats.log1mexp, (0.1,), "x must be at most 0"),
        (stats.logsumexp, ([0.0, math.nan],), "values contain NaN"),
        (stats.sidak, (0.1, 3), "log_p must be at most 0"),
        (stats.sidak, (-1.0, 0), "k must be at least 1"),
        (stats.bonferroni, (math.nan, 3), "log_p is NaN"),
        (stats.holm, ([0.5],), "log_ps must all be at most 0"),
        (stats.holm, ([[-1.0]],), "one-dimensional"),
        (stats.benjamini_hochberg, ([math.nan],), "not NaN"),
        (stats.monte_carlo_log_pvalue, (4, 3), r"count must lie in 0\.\.3"),
        (stats.monte_carlo_log_pvalue, (-1, 3), "count must lie in"),
    ],
)
def test_bad_arguments_raise(
    function: Callable[..., Any], arguments: Sequence[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_no_warnings_and_no_scipy() -> None:
    code = (
        "import sys, filigrane.stats as s; s.log_sf_weighted_bits(800, 7, [30, 20, 1000]); "
        "s.log_sf_irwin_hall(600.0, 1000); s.log_sf_gamma(1e300, 10**6); "
        "assert not {'scipy', 'numba', 'mpmath'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_speed_is_of_the_right_order() -> None:
    """Generous limits (ten times the usual): they catch a lost early stop, not a slow machine."""

    def best(function: Callable[..., float], *arguments: Any) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function(*arguments)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(stats.log_sf_binomial, 300, 1000, 0.25) < 300e-6
    assert best(stats.log_sf_gamma, 1010.0, 1000) < 300e-6
    assert best(stats.log_sf_binomial, 250_100, 10**6, 0.25) < 5e-3
    assert best(stats.log_sf_gamma, 1_000_100.0, 10**6) < 5e-3
    assert best(stats.log_sf_two_gammas, 210.0, 200, 0.7) < 50e-3
    assert best(stats.log_sf_two_gammas, 100_500.0, 100_000, 0.7) < 150e-3
    assert best(stats.log_sf_weighted_bits, 490_000, 200, TOURNAMENT) < 25e-3
    assert best(stats.log_sf_weighted_bits, 239_500_000, 100_000, TOURNAMENT) < 50e-3
