"""Optimal transport within one race: the plan's equations, and the laws of what it emits."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats as sps

from filigrane.speculative import transport

Floats = npt.NDArray[np.float64]
Pair = tuple[Floats, Floats]


def normal(*arrays: npt.ArrayLike) -> Pair:
    p, q = (np.asarray(a, dtype=np.float64) for a in arrays)
    return p / p.sum(), q / q.sum()


def dirichlet(seed: int, size: int, concentration: float = 0.5) -> Pair:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(size, concentration), 2)
    return p, q


def logits(seed: int, size: int, spread: float, noise: float) -> Pair:
    rng = np.random.default_rng(seed)
    l = rng.normal(size=size) * spread  # noqa: E741
    return normal(np.exp(l), np.exp(l + noise * rng.normal(size=size)))


CORNERS: dict[str, Pair] = {
    "equal": normal([1, 2, 3], [1, 2, 3]),
    "draft lacks tokens": normal([1, 2, 3, 4], [0, 5, 0, 1]),
    "target lacks tokens": normal([0, 5, 0, 1], [1, 2, 3, 4]),
    "both lack tokens": normal([0, 5, 0, 1, 2], [1, 2, 0, 0, 4]),
    "disjoint": normal([1, 2, 0, 0], [0, 0, 3, 4]),
    "one token each, same": normal([1, 0], [1, 0]),
    "one token each, other": normal([1, 0], [0, 1]),
    "point draft": normal([1, 2, 3], [0, 1, 0]),
    "point target": normal([0, 1, 0], [1, 2, 3]),
    "one token in all": normal([1], [1]),
    "tied ratios": normal([2, 2, 1, 1, 4], [1, 1, 2, 2, 4]),
    "tiny probabilities": normal([1, 1e-300, 1e-12, 2], [1e-12, 1, 1e-300, 1e-320]),
}
PAIRS: dict[str, Pair] = CORNERS | {
    "dirichlet": dirichlet(1, 50),
    "sparse": dirichlet(2, 50, 0.05),
    "close": logits(3, 50, 2.0, 0.02),
    "peaked": logits(4, 50, 4.0, 1.0),
    "two tokens": dirichlet(5, 2, 1.0),
}


def simulate(p: Floats, q: Floats, draws: int, seed: int) -> tuple[Floats, ...]:
    """(clocks, x, y) of many positions with fresh clocks: `resolve`, vectorised."""
    rng = np.random.default_rng(seed)
    clocks = rng.exponential(size=(draws, p.size))
    rows = np.arange(draws)
    with np.errstate(divide="ignore", over="ignore"):
        x = np.argmin(clocks / q, axis=1)
        plan = transport.solve(p, q)
        arrivals = np.where(plan.weights > 0, clocks / plan.weights, np.inf)
    y = np.argmin(arrivals, axis=1)
    moves = (p[x] < q[x]) & (arrivals[rows, y] < plan.thresholds[x] * clocks[rows, x] / q[x])
    return clocks, x, np.where(moves, y, x)


def m_of(u: Floats, q: Floats, plan: transport.Plan) -> Floats:
    gain = np.maximum(u[:, None] * plan.weights - np.where(plan.weights > 0, q, 0.0), 0.0)
    return 1.0 + gain.sum(axis=1)


@pytest.mark.parametrize("name", PAIRS)
def test_invariants(name: str) -> None:
    p, q = PAIRS[name]
    plan = transport.solve(p, q)
    assert plan.residual < 1e-9
    assert np.array_equal(plan.weights > 0, p > q)
    assert np.all(np.isinf(plan.thresholds[(p >= q) | (p == 0)]))
    leaving = (p < q) & (p > 0) & np.isfinite(plan.thresholds)
    assert np.array_equal(leaving, (p < q) & (p > 0))
    found = m_of(plan.thresholds[leaving], q, plan)
    assert found == pytest.approx((q / np.where(leaving, p, 1.0))[leaving], rel=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_compiled_is_reference(name: str) -> None:
    compiled, plain = transport.solve(*PAIRS[name]), transport.solve_reference(*PAIRS[name])
    assert np.array_equal(compiled.weights, plain.weights)
    assert np.array_equal(compiled.thresholds, plain.thresholds)
    assert compiled.residual == plain.residual


@pytest.mark.parametrize("size", [1_000, 49_152, 152_064])
@pytest.mark.parametrize("family", ["dirichlet", "logits", "zipf"])
def test_whole_vocabularies(size: int, family: str) -> None:
    zipf = 1.0 / np.arange(1, size + 1) ** 1.2
    p, q = {
        "dirichlet": lambda: dirichlet(size, size),
        "logits": lambda: logits(size, size, 3.0, 0.7),
        "zipf": lambda: normal(zipf, np.random.default_rng(size).permutation(zipf)),
    }[family]()
    plan = transport.solve(p, q)
    assert plan.residual < 1e-9
    assert np.array_equal(plan.weights > 0, p > q)
    some = np.flatnonzero(p < q)[:: size // 20]
    assert m_of(plan.thresholds[some], q, plan) == pytest.approx(q[some] / p[some], rel=1e-9)


def test_the_law_that_is_achieved_is_the_target() -> None:
    """By quadrature of p_y = q_y + l_y h(u_y), independent of the walk's own arithmetic."""
    p, q = logits(7, 12, 1.0, 0.8)
    plan = transport.solve(p, q)
    u = np.unique(np.concatenate([q[p > q] / plan.weights[p > q], plan.thresholds[p < q]]))
    nodes, heights = np.polynomial.legendre.leggauss(40)
    for y in np.flatnonzero(p > q):
        edges = np.concatenate([[q[y] / plan.weights[y]], u[u > q[y] / plan.weights[y]]])
        total = 0.0
        for a, b in pairwise(edges):
            v = (a + b) / 2 + (b - a) / 2 * nodes
            excess = np.where((p < q) & (plan.thresholds > v[:, None]), q, 0.0).sum(axis=1)
            total += (b - a) / 2 * float(heights @ (excess / m_of(v, q, plan) ** 2))
        assert q[y] + plan.weights[y] * total == pytest.approx(p[y], abs=1e-12)


@pytest.mark.parametrize("name", [*CORNERS, "dirichlet", "peaked", "two tokens"])
def test_law_and_acceptance(name: str) -> None:
    p, q = PAIRS[name]
    draws = 40_000 if p.size > 10 else 100_000
    _, x, y = simulate(p, q, draws, 11)
    counts = np.bincount(y, minlength=p.size)
    assert counts[p == 0].sum() == 0
    # Rare tokens together, so that the chi-square's law holds.
    rare = draws * p < 20
    seen, expected = counts[~rare], draws * p[~rare]
    if rare.any() and draws * p[rare].sum() > 5:
        seen = np.append(seen, counts[rare].sum())
        expected = np.append(expected, draws * p[rare].sum())
    if seen.size > 1:
        assert sps.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-4
    kept = np.minimum(p, q).sum()
    assert np.mean(x == y) == pytest.approx(
        kept, abs=4.5 * np.sqrt(kept * (1 - kept) / draws + 1e-12)
    )


def test_kept_given_the_draft_is_plain() -> None:
    """Not only on average: given x, it stays with min(1, p_x / q_x), whence block lengths."""
    p, q = dirichlet(6, 6, 1.0)
    _, x, y = simulate(p, q, 100_000, 12)
    for token in range(6):
        here = x == token
        rate = min(1.0, p[token] / q[token])
        sigma = np.sqrt(rate * (1 - rate) / here.sum())
        assert np.mean(y[here] == token) == pytest.approx(rate, abs=4.5 * sigma + 1e-12)


def test_resolve_is_the_rule() -> None:
    p, q = dirichlet(8, 20)
    clocks, x, y = simulate(p, q, 300, 13)
    assert [transport.resolve(p, q, c, int(i)) for c, i in zip(clocks, x, strict=True)] == list(y)


def test_two_tokens_are_the_coupled_race() -> None:
    rng = np.random.default_rng(14)
    for _ in range(20):
        p, q = rng.dirichlet(np.ones(2), 2)
        clocks, _, y = simulate(p, q, 5_000, int(rng.integers(2**32)))
        assert np.array_equal(y, np.argmin(clocks / p, axis=1))


def test_clock_laws() -> None:
    p, q = dirichlet(9, 8, 1.0)
    plan = transport.solve(p, q)
    clocks, x, y = simulate(p, q, 200_000, 15)
    own = clocks[np.arange(y.size), y]
    tests = 0
    for token in range(8):
        kept = (x == token) & (y == token)
        # Kept from a token in short supply: q_y Exp(1). Kept from one in excess: p_x Exp(1), as in
        # the full mark.
        scale = min(p[token], q[token])
        if kept.sum() > 1000:
            assert sps.kstest(own[kept] / scale, "expon").pvalue > 1e-4
            tests += 1
    assert tests >= 5
    moved = x != y
    first = clocks[np.arange(y.size), x] / q[x]
    l_y = plan.weights[y[moved]]
    u = own[moved] / l_y / first[moved]
    pivot = own[moved] * m_of(u, q, plan) / (l_y * u)
    assert moved.sum() > 10_000
    assert sps.kstest(pivot, "gamma", args=(2.0,)).pvalue > 1e-4


def test_more_evidence_than_a_shifted_race() -> None:
    """What it is for: among couplings of full acceptance, the largest mean of -log E."""
    p, q = logits(10, 20, 1.0, 0.8)
    clocks, x, y = simulate(p, q, 100_000, 16)
    rows = np.arange(x.size)
    first = (clocks[rows, x] / q[x])[:, None]
    short = np.maximum(p - q, 0.0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        z = np.argmin(np.where(short > 0, np.maximum(clocks - q * first, 0.0) / short, np.inf), 1)
        stay = (p[x] >= q[x]) | (first[:, 0] <= -np.log(np.maximum(1 - p[x] / q[x], 0.0)))
    z = np.where(stay, x, z)
    gain = np.log(clocks[rows, z]) - np.log(clocks[rows, y])
    assert gain.mean() > 4 * gain.std() / np.sqrt(gain.size)
