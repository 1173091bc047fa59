"""What one-key rules stand on: the arrival time is a coin, and what clocks have left is fresh."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from filigrane.speculative import shifted_race
from filigrane.speculative.laws import race

DRAWS = 20_000


def laws(n: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(n))


def drawn(q: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """clocks (draws, n), winners and arrival times of the draft's race."""
    clocks = np.random.default_rng(seed).exponential(size=(DRAWS, q.shape[0]))
    times = clocks / q
    return clocks, times.argmin(axis=1), times.min(axis=1)


def test_arrival_time_is_a_coin_that_does_not_know_the_token() -> None:
    _, q = laws()
    _, x, t = drawn(q)
    assert scipy_stats.kstest(t, "expon").pvalue > 1e-4
    for token in range(q.shape[0]):
        assert scipy_stats.kstest(t[x == token], "expon").pvalue > 1e-4


def test_what_clocks_have_left_is_fresh() -> None:
    """E_w - Q_w T of the losers: Exp(1), whatever won and when, and independent of each other."""
    _, q = laws()
    clocks, x, t = drawn(q)
    left = clocks - q * t[:, None]
    assert np.all(left >= -1e-9)
    for w in range(q.shape[0]):
        lost = x != w
        assert scipy_stats.kstest(left[lost, w], "expon").pvalue > 1e-4
        assert abs(np.corrcoef(left[lost, w], t[lost])[0, 1]) < 4.5 / np.sqrt(lost.sum())
    both = (x != 0) & (x != 1)
    assert abs(np.corrcoef(left[both, 0], left[both, 1])[0, 1]) < 4.5 / np.sqrt(both.sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_rule_keeps_what_it_should_and_replaces_by_the_residual(seed: int) -> None:
    p, q = laws(seed=seed)
    clocks, x, t = drawn(q, seed + 10)
    y = np.array([shifted_race.resolve(p, q, e, int(w)) for e, w in zip(clocks, x, strict=True)])
    kept = x == y
    z = (kept.sum() - DRAWS * np.minimum(p, q).sum()) / np.sqrt(DRAWS * 0.25)
    assert abs(z) < 4.0
    assert scipy_stats.chisquare(np.bincount(y, minlength=6), DRAWS * p).pvalue > 1e-4
    rest = np.maximum(p - q, 0.0)
    some = rest > 0.0
    replaced = np.bincount(y[~kept], minlength=6)
    assert not replaced[~some].any()
    expected = rest[some] / rest.sum() * replaced.sum()
    assert scipy_stats.chisquare(replaced[some], expected).pvalue > 1e-4
    # The early arrivals of a token in excess are the ones that stay.
    for w in np.flatnonzero(p < q):
        mine = x == w
        assert t[mine & kept].max() <= t[mine & ~kept].min()


def test_ends_of_the_range() -> None:
    p = np.array([0.0, 0.5, 0.5])
    q = np.array([1.0, 0.0, 0.0])
    clocks = np.array([0.3, 0.2, 0.4])
    x = race(clocks, q)
    assert x == 0 and shifted_race.resolve(p, q, clocks, x) == 1  # never kept, untouched clocks
    assert shifted_race.resolve(q, q, clocks, 0) == 0
    # Rounding may leave a clock of nothing: it rings at once, and nothing divides by zero.
    late = np.array([0.3, 0.3 * 0.5, 1.0])
    assert shifted_race.resolve(np.array([0.1, 0.8, 0.1]), np.array([0.6, 0.3, 0.1]), late, 0) in (
        0,
        1,
    )
