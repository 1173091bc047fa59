import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filigrane import SCHEMES, DeltaReweight, GreenList, Gumbel, Tournament, stats
from filigrane.errors import SchemeError
from filigrane.radioactivity.weighted import (
    ScoreLaw,
    reference_cumulant,
    reference_total,
    tail,
    uniform_cumulants,
)
from filigrane.schemes import Scheme

LAWFUL = [GreenList(), GreenList(gamma=0.5), Gumbel(), Tournament(depth=30), Tournament(depth=3)]
by_scheme = pytest.mark.parametrize("scheme", LAWFUL, ids=lambda scheme: scheme.tag)


def sparse(rng: np.random.Generator, windows: int, width: int) -> tuple[np.ndarray, ...]:
    lengths = rng.integers(1, 9, size=windows)
    starts = np.concatenate([[0], lengths.cumsum()])
    m = int(starts[-1])
    return (
        rng.integers(0, 50_000, size=(windows, width), dtype=np.uint32),
        starts.astype(np.int64),
        rng.integers(0, 50_000, size=m, dtype=np.uint32),
        rng.normal(size=m),
    )


@by_scheme
@pytest.mark.parametrize("width", [1, 4, 7])
def test_compiled_sums_are_those_of_the_plain_twin(scheme: Scheme, width: int) -> None:
    rng = np.random.default_rng(width)
    law = ScoreLaw.of(scheme)
    parts = sparse(rng, 200, width)
    words = rng.integers(0, 2**32, size=8, dtype=np.uint32)
    assert law.total(words, *parts) == pytest.approx(
        reference_total(words, *parts, law), rel=1e-12, abs=1e-9
    )


@by_scheme
def test_cumulants_are_those_of_the_plain_twin_and_their_derivatives(scheme: Scheme) -> None:
    rng = np.random.default_rng(0)
    law = ScoreLaw.of(scheme)
    weights = rng.normal(size=300)
    scale = math.sqrt(law.variance) * 40
    limit = 0.9 / np.abs(weights).max() if law.limit < math.inf else math.inf
    for theta in (-3.0, -0.2, 1e-6, 0.5, 4.0):
        theta = math.copysign(min(abs(theta) / scale * 10, limit), theta)
        k0, k1, k2 = law.cumulants(theta, weights)
        assert k0 == pytest.approx(reference_cumulant(theta, weights, law), rel=1e-9, abs=1e-12)
        if abs(theta) * scale < 1.0:
            continue  # differences of numbers this small are all rounding
        h = 1e-5 * abs(theta)
        up, down = law.cumulants(theta + h, weights), law.cumulants(theta - h, weights)
        assert k1 == pytest.approx((up[0] - down[0]) / (2 * h), rel=1e-4, abs=1e-6)
        assert k2 == pytest.approx((up[1] - down[1]) / (2 * h), rel=1e-4, abs=1e-6)
    k0, k1, k2 = law.cumulants(0.0, weights)
    assert (k0, k1) == (0.0, 0.0)
    assert k2 == pytest.approx(law.variance * float(weights @ weights))


def test_cumulants_far_out_neither_overflow_nor_lose_their_digits() -> None:
    weights = np.array([1.0, -2.0])
    for scheme in (GreenList(), Tournament(depth=2)):
        law = ScoreLaw.of(scheme)
        for theta in (-1e5, 1e5):
            values = law.cumulants(theta, weights)
            assert all(map(math.isfinite, values)) and values[2] < 1e-9


@by_scheme
def test_the_law_is_that_of_real_keyed_scores(scheme: Scheme) -> None:
    # A fixed corpus and many keys: mean, spread and tail of what is really summed.
    rng = np.random.default_rng(3)
    law = ScoreLaw.of(scheme)
    parts = sparse(rng, 60, 2)
    keys = rng.integers(0, 2**32, size=(20_000, 8), dtype=np.uint32)
    sums = np.array([law.total(words, *parts) for words in keys])
    spread = math.sqrt(law.variance * float(parts[3] @ parts[3]))
    assert abs(sums.mean()) < 4 * spread / math.sqrt(20_000)
    assert sums.std() / spread == pytest.approx(1.0, abs=0.03)
    for z in (1.0, 2.0, 3.0):
        nominal = math.exp(tail(z * spread, parts[3], law).log_pvalue)
        seen = (sums >= z * spread).mean()
        room = 4.5 * math.sqrt(nominal / 20_000)
        assert seen < nominal + room
        # Green sums have a grain, which makes the p-value of so few windows somewhat too large.
        assert seen > (0.6 if isinstance(scheme, GreenList) else 1.0) * nominal - room


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 30_000])
def test_equal_weights_of_gumbel_have_a_known_law(n: int) -> None:
    law, weights = ScoreLaw.of(Gumbel()), np.full(n, 0.37)
    for z in (-2.0, -0.5, 0.0, 1e-7, 0.01, 1.0, 5.0, 30.0, 140.0):
        total = n + z * math.sqrt(n)
        if total <= 0:
            continue
        found = tail(0.37 * (total - n), weights, law)
        exact = stats.log_sf_gamma(total, n)
        # The relative error of the saddlepoint is of order 1 / n; one exponential is the worst.
        assert found.log_pvalue == pytest.approx(exact, abs=0.08 / n + 2e-6, rel=1e-9)
        assert found.log_bound >= exact - 1e-9
    if n == 30_000:
        far = tail(0.37 * 40_000, weights, law).log_pvalue
        assert far < -1e4
        assert far == pytest.approx(stats.log_sf_gamma(70_000, n), rel=1e-9)


def test_copies_are_independent_keys() -> None:
    law, weights = ScoreLaw.of(Gumbel()), np.ones(50)
    exact = stats.log_sf_gamma(460, 400)
    assert tail(60, weights, law, copies=8).log_pvalue == pytest.approx(exact, abs=1e-3)


def test_the_largest_sum_has_the_probability_of_all_scores_at_their_best() -> None:
    weights = np.array([0.5, -0.25, 1.0])
    law = ScoreLaw.of(GreenList(gamma=0.25))
    best = 0.75 * 1.5 + 0.25 * 0.25
    expected = 2 * math.log(0.25) + math.log(0.75)
    assert tail(best, weights, law).log_pvalue == pytest.approx(expected)
    # Weights too small to be seen in the sum say nothing about it.
    dust = np.array([1.0] + [1e-15] * 63)
    assert tail(0.75, dust, law).log_pvalue == pytest.approx(math.log(0.25))
    for scheme in (Tournament(depth=3), Tournament(depth=3, scoring="mean")):
        bits = ScoreLaw.of(scheme)
        most = 0.5 * float(bits.layers.sum())
        assert tail(most, dust, bits).log_pvalue == pytest.approx(-3 * math.log(2.0))
    assert tail(best * 0.999, weights, law).log_pvalue >= expected - 1e-6


@pytest.mark.parametrize(
    ("n", "count"), [(12, 7), (12, 3), (40, 21), (200, 60), (1000, 300), (10_000, 9000)]
)
def test_equal_weights_of_green_scores_are_counted_as_a_count(n: int, count: int) -> None:
    # Without the grain the formula would say about half of the atom's probability.
    law = ScoreLaw.of(GreenList(gamma=0.25))
    found = tail(0.8 * (count - 0.25 * n), np.full(n, 0.8), law).log_pvalue
    exact = stats.log_sf_binomial(count, n, 0.25)
    assert exact - 0.01 < found < exact + 1.0
    if exact > -20:
        assert found == pytest.approx(exact, abs=0.2)


@pytest.mark.parametrize("windows", [1, 2, 3, 10, 100])
def test_few_and_peaked_windows_do_not_reject_too_often(windows: int) -> None:
    rng = np.random.default_rng(windows)
    law, weights = ScoreLaw.of(GreenList(gamma=0.25)), rng.dirichlet(np.full(32, 0.05), windows)
    c = weights.reshape(-1)
    sums = ((rng.random((1500, c.size)) < 0.25) - 0.25) @ c
    logs = np.array([tail(float(total), c, law).log_pvalue for total in sums])
    for level in (0.1, 0.01, 0.001):
        assert (logs <= math.log(level)).mean() <= level + 3 * math.sqrt(level / 1500)


@pytest.mark.parametrize("width", [0.3, 2.0])
def test_cumulants_of_the_grain(width: float) -> None:
    for theta in (-80.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 80.0):
        x = np.linspace(0.0, width, 200_001)
        middle = 0.5 * (x[1:] + x[:-1])
        tilt = np.exp(theta * (middle - (width if theta > 0 else 0.0)))
        k0, k1, k2 = uniform_cumulants(theta, width)
        shift = theta * width if theta > 0 else 0.0
        assert k0 == pytest.approx(math.log(tilt.mean()) + shift, rel=1e-5, abs=1e-9)
        mean = float((tilt * middle).sum() / tilt.sum())
        assert k1 == pytest.approx(mean, rel=1e-5)
        spread = float((tilt * (middle - mean) ** 2).sum() / tilt.sum())
        assert k2 == pytest.approx(spread, rel=1e-4)


@given(
    st.lists(st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=12),
    st.floats(-3.0, 3.0),
)
def test_small_sums_of_green_scores_against_all_outcomes(weights: list[float], z: float) -> None:
    law, c = ScoreLaw.of(GreenList(gamma=0.25)), np.array(weights)
    spread = math.sqrt(law.variance * float(c @ c))
    green = (np.arange(2 ** len(c))[:, None] >> np.arange(len(c))) & 1
    sums = (green - 0.25) @ c
    odds = np.where(green == 1, 0.25, 0.75).prod(axis=1)
    exact = float(odds[sums >= z * spread - 1e-12].sum())
    found = tail(z * spread, c, law)
    # The bound holds always, and whatever is said is never above it.
    assert exact <= math.exp(found.log_bound) * (1 + 1e-9)
    assert found.log_pvalue <= found.log_bound + 1e-12


def test_schemes_with_a_coin_per_window_are_refused() -> None:
    with pytest.raises(SchemeError, match="radioactivity is tested for greenlist, gumbel"):
        ScoreLaw.of(DeltaReweight())
    assert {"gamma", "delta"} == set(SCHEMES) - {"greenlist", "gumbel", "tournament"}
