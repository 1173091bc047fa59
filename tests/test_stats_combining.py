"""Normal tails, combinations and Kolmogorov-Smirnov, against scipy and by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as oracle

from filigrane import stats

log_ps = st.lists(st.floats(-600.0, -1e-3), min_size=1, max_size=8)


@pytest.mark.parametrize("z", [-30, -5, -1, 0, 1e-9, 1, 5, 19.99, 20, 20.01, 38, 100, 1e4])
def test_normal_tail(z: float) -> None:
    assert stats.log_sf_normal(z) == pytest.approx(oracle.norm.logsf(z), rel=1e-12, abs=1e-300)


@given(st.floats(-1e6, -1e-12))
def test_normal_quantile_is_the_inverse(log_p: float) -> None:
    z = stats.log_isf_normal(log_p)
    assert stats.log_sf_normal(z) == pytest.approx(log_p, rel=1e-11)


def test_ends_of_the_normal_law() -> None:
    assert stats.log_isf_normal(0.0) == -math.inf and stats.log_isf_normal(-math.inf) == math.inf
    assert stats.log_sf_normal(math.inf) == -math.inf and stats.log_sf_normal(-math.inf) == 0.0
    with pytest.raises(ValueError, match="z"):
        stats.log_sf_normal(math.nan)
    with pytest.raises(ValueError, match="log_p"):
        stats.log_isf_normal(0.5)


@given(log_ps)
def test_fisher(values: list[float]) -> None:
    expected = oracle.chi2.logsf(-2 * sum(values), 2 * len(values))
    if math.isfinite(expected):
        assert stats.fisher(values) == pytest.approx(expected, rel=1e-9)


@given(log_ps)
def test_stouffer(values: list[float]) -> None:
    z = oracle.norm.isf(np.exp(values))
    if np.isfinite(z).all():
        expected = oracle.norm.logsf(z.sum() / math.sqrt(len(z)))
        assert stats.stouffer(values) == pytest.approx(expected, rel=1e-8)


def test_combinations_far_below_a_double_and_with_weights() -> None:
    assert stats.stouffer([-1e5, -1e5]) == pytest.approx(-2e5, rel=1e-4)
    assert stats.fisher([-1e5, -1e5]) == pytest.approx(-2e5, rel=1e-3)
    weighted = stats.stouffer([math.log(0.01), math.log(0.5)], [3.0, 1.0])
    expected = oracle.combine_pvalues([0.01, 0.5], "stouffer", weights=[3.0, 1.0]).pvalue
    assert weighted == pytest.approx(math.log(expected), rel=1e-9)
    for bad in ([1.0], [1.0, 0.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
            stats.stouffer([-1.0, -2.0], bad)
    with pytest.raises(ValueError, match="log"):
        stats.fisher([0.1])


@pytest.mark.parametrize("n", [20, 50, 200, 1000])
def test_one_sample_kolmogorov_is_as_close_as_it_says(n: int) -> None:
    for p in (0.9, 0.5, 0.1, 0.05, 0.011):
        d = float(oracle.kstwo.isf(p, n))
        assert math.exp(stats.log_sf_kolmogorov(d, n)) == pytest.approx(p, rel=0.03)
    assert stats.log_sf_kolmogorov(0.0, n) == 0.0
    assert stats.log_sf_kolmogorov(1.0, n) < -30.0


def test_uniformity_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for power in (1.0, 1.1, 1.5):
        p = rng.random(300) ** power
        expected = oracle.kstest(p, "uniform", method="exact").pvalue
        assert math.exp(stats.log_uniformity(p)) == pytest.approx(expected, rel=0.1)
    for bad in ([], [0.5, 1.5], [0.5, math.nan]):
        with pytest.raises(ValueError, match="between 0 and 1"):
            stats.log_uniformity(bad)


@given(st.permutations(range(40)), st.integers(1, 39), st.integers(2, 40))
def test_two_sample_distance_is_scipys_and_so_is_its_law(
    order: list[int], cut: int, end: int
) -> None:
    x, y = order[: min(cut, end - 1)], order[min(cut, end - 1) : end]
    distance, log_p = stats.kolmogorov_smirnov(x, y)
    expected = oracle.ks_2samp(x, y, method="exact")
    assert distance == pytest.approx(expected.statistic)
    assert math.exp(log_p) == pytest.approx(expected.pvalue, rel=1e-9)


def test_ties_make_the_p_value_larger_not_smaller() -> None:
    # All values one of three: the law of D over relabellings, by going through all of them.
    values = [0, 0, 0, 1, 1, 1, 2, 2]
    found = []
    for chosen in itertools.combinations(range(8), 4):
        x = [values[i] for i in chosen]
        y = [values[i] for i in range(8) if i not in chosen]
        found.append(stats.kolmogorov_smirnov(x, y))
    distances = np.array([distance for distance, _ in found])
    for distance, log_p in found:
        assert (distances >= distance - 1e-12).mean() <= math.exp(log_p) + 1e-12


def test_two_sample_tail_goes_below_a_double() -> None:
    # Apart altogether: one ordering of all, and its mirror image.
    _, log_p = stats.kolmogorov_smirnov(np.arange(900), np.arange(900) + 1000)
    paths = math.lgamma(1801) - 2 * math.lgamma(901)
    assert log_p == pytest.approx(math.log(2.0) - paths, rel=1e-10)
    assert log_p < -1000
    for bad, message in (([], "at least one value"), ([math.nan], "finite")):
        with pytest.raises(ValueError, match=message):
            stats.kolmogorov_smirnov(bad, [1.0])
