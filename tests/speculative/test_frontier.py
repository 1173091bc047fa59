"""The knob between full strength and full acceptance: its law, its ends, its fallbacks."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats as sps

from filigrane import prf
from filigrane.errors import SchemeError
from filigrane.speculative import frontier, transport

Floats = npt.NDArray[np.float64]
Pair = tuple[Floats, Floats]
KNOB = [1.0, 1.1, 1.5, 2.0, 3.0, 6.0, 50.0, math.inf]


def normal(*arrays: npt.ArrayLike) -> Pair:
    p, q = (np.asarray(a, dtype=np.float64) for a in arrays)
    return p / p.sum(), q / q.sum()


def pairs(family: str, count: int) -> list[Pair]:
    rng = np.random.default_rng(len(family))
    made = []
    for _ in range(count):
        z = rng.normal(size=70)
        if family == "dirichlet":
            p, q = rng.dirichlet(np.full(50, 0.5), 2)
        elif family == "low entropy":
            z *= 4.0
            z[0] += 8.0
            p, q = normal(np.exp(z), np.exp(z + rng.normal(size=70)))
        elif family == "top-k":
            p, q = np.exp(2 * z), np.exp(2 * z + 0.7 * rng.normal(size=70))
            p[p < np.sort(p)[-50]] = 0.0
            q[q < np.sort(q)[-50]] = 0.0
        else:
            p, q = rng.integers(0, 4, (2, 50)).astype(np.float64)
        made.append(normal(p, q))
    return made


def acceptance_of_the_race(p: Floats, q: Floats) -> float:
    both = (p > 0) & (q > 0)
    with np.errstate(divide="ignore", over="ignore"):
        return float(sum(1 / np.maximum(q / q[w], p / p[w]).sum() for w in np.flatnonzero(both)))


def law_of(plan: frontier.Plan, p: Floats, q: Floats, steps: int = 400_000) -> Floats:
    """The achieved law by brute quadrature over v, independent of the kernel."""
    live = plan.weights > 0
    with np.errstate(divide="ignore", over="ignore"):
        u = np.where(live, q / np.where(live, plan.weights, 1.0), np.inf)

    def m(v: Floats) -> Floats:
        gain = np.maximum(v[:, None] * plan.weights - np.where(live, q, 0.0), 0.0)
        return 1.0 + gain.sum(axis=1)

    # s = v / (1 + v) maps the half line to (0, 1).
    s = (np.arange(steps) + 0.5) / steps
    v = s / (1 - s)
    keep = np.where(q > 0, plan.thresholds, 0.0)
    left = np.where(keep[None, :] > v[:, None], q, 0.0).sum(axis=1)
    integrand = left / m(v) ** 2 / (1 - s) ** 2 / steps
    tail = np.cumsum(integrand[::-1])[::-1]
    law = np.where(live & (q > 0), q / m(np.where(live, keep, 0.0)), 0.0)
    at = np.minimum(np.searchsorted(v, np.where(live, u, 0.0)), steps - 1)
    return law + plan.weights * tail[at]


def simulate(plan: frontier.Plan, q: Floats, draws: int, seed: int) -> tuple[Floats, ...]:
    """(clocks, x, y): `apply`, vectorised."""
    rng = np.random.default_rng(seed)
    clocks = rng.exponential(size=(draws, q.size))
    rows = np.arange(draws)
    with np.errstate(divide="ignore", over="ignore"):
        x = np.argmin(clocks / q, axis=1)
        arrivals = np.where(plan.weights > 0, clocks / plan.weights, np.inf)
    y = np.argmin(arrivals, axis=1)
    stays = plan.thresholds[x] * (clocks[rows, x] / q[x]) <= arrivals[rows, y]
    return clocks, x, np.where(stays, x, y)


@pytest.mark.parametrize("c", KNOB)
@pytest.mark.parametrize("family", ["dirichlet", "low entropy", "top-k", "ties"])
def test_solver(family: str, c: float) -> None:
    for p, q in pairs(family, 15):
        plan = frontier.solve(p, q, c)
        assert plan.solved and plan.error <= 1e-9
        low, high = acceptance_of_the_race(p, q), float(np.minimum(p, q).sum())
        assert low - 1e-9 <= plan.acceptance <= high + 1e-9
        assert np.all(plan.weights[p == 0] == 0)


def test_acceptance_grows_with_c() -> None:
    for p, q in pairs("top-k", 5):
        found = [frontier.solve(p, q, c).acceptance for c in KNOB]
        assert np.all(np.diff(found) >= -1e-9) and found[-1] > found[0] + 0.01


@pytest.mark.parametrize("c", [1.0, 1.3, 2.0, 8.0])
def test_error_is_the_error(c: float) -> None:
    """The law by other means than the kernel's closed forms."""
    p, q = normal([4, 3, 2, 1, 0.5, 0, 1], [1, 2, 3, 1, 2, 0.5, 0])
    assert law_of(frontier.solve(p, q, c), p, q) == pytest.approx(p, abs=2e-5)


@pytest.mark.parametrize("c", [1.2, 2.0, 5.0])
@pytest.mark.parametrize("family", ["dirichlet", "low entropy"])
def test_law_and_acceptance(family: str, c: float) -> None:
    p, q = pairs(family, 1)[0]
    plan = frontier.solve(p, q, c)
    draws = 40_000
    _, x, y = simulate(plan, q, draws, 3)
    counts = np.bincount(y, minlength=p.size)
    rare = draws * p < 20
    seen = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(draws * p[~rare], draws * p[rare].sum())
    assert sps.chisquare(seen, expected * draws / expected.sum()).pvalue > 1e-4
    sigma = math.sqrt(plan.acceptance * (1 - plan.acceptance) / draws)
    assert np.mean(x == y) == pytest.approx(plan.acceptance, abs=4.5 * sigma)


def test_strength_lies_between() -> None:
    p, q = pairs("top-k", 1)[0]
    scores = []
    for c in (1.0, 2.0, math.inf):
        clocks, _, y = simulate(frontier.solve(p, q, c), q, 50_000, 4)
        scores.append(float(np.mean(-np.log(-np.expm1(-clocks[np.arange(y.size), y])))))
    assert scores[0] > scores[1] > scores[2] > 0.9 * scores[0]


@pytest.mark.parametrize("family", ["dirichlet", "top-k", "ties"])
def test_corners_are_race_and_transport(family: str) -> None:
    rng = np.random.default_rng(5)
    for p, q in pairs(family, 20):
        for _ in range(20):
            clocks = rng.exponential(size=p.size)
            with np.errstate(divide="ignore", over="ignore"):
                x, race = int(np.argmin(clocks / q)), int(np.argmin(clocks / p))
            assert frontier.resolve(p, q, clocks, x, 1.0) == race
            moved = transport.resolve(p, q, clocks, x)
            assert frontier.resolve(p, q, clocks, x, math.inf) == moved
            # The same two ends through the general rule.
            assert frontier.apply(frontier.solve(p, q, 1.0), q, clocks, x) == race
            assert frontier.apply(frontier.solve(p, q, math.inf), q, clocks, x) == moved


def test_resolve_is_the_rule_and_counts() -> None:
    p, q = pairs("top-k", 1)[0]
    clocks, x, y = simulate(frontier.solve(p, q, 1.5), q, 100, 6)
    tally = frontier.Tally()
    found = [frontier.resolve(p, q, e, int(i), 1.5, tally) for e, i in zip(clocks, x, strict=True)]
    assert found == list(y) and tally == frontier.Tally(100, 0)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 0, 0], [0, 0, 3, 4]),
        ([1, 0], [0, 1]),
        ([1, 0], [1, 0]),
        ([1], [1]),
        ([1, 2, 3], [0, 1, 0]),
        ([0, 1, 0], [1, 2, 3]),
        ([1, 1e-300, 1e-12, 2], [1e-12, 1, 1e-300, 1e-320]),
    ],
)
@pytest.mark.parametrize("c", [1.0, 1.5, 10.0, math.inf])
def test_extreme_supports(p: list[float], q: list[float], c: float) -> None:
    target, draft = normal(p, q)
    plan = frontier.solve(target, draft, c)
    _, x, y = simulate(plan, draft, 20_000, 7)
    counts = np.bincount(y, minlength=target.size) / 20_000
    assert np.abs(counts - target).max() < 0.02
    assert np.mean(x == y) == pytest.approx(plan.acceptance, abs=0.02)


def test_fallback_is_transport_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = pairs("dirichlet", 1)[0]
    rng = np.random.default_rng(8)
    for name, value in (("LARGEST", 10), ("TOLERANCE", -1.0)):
        with monkeypatch.context() as here:
            here.setattr(frontier, name, value)
            plan = frontier.solve(p, q, 2.0)
            assert not plan.solved
            assert plan.acceptance == pytest.approx(float(np.minimum(p, q).sum()))
            tally = frontier.Tally()
            for _ in range(50):
                clocks = rng.exponential(size=p.size)
                x = int(np.argmin(clocks / q))
                expected = transport.resolve(p, q, clocks, x)
                assert frontier.resolve(p, q, clocks, x, 2.0, tally) == expected
            assert tally == frontier.Tally(0, 50)


@pytest.mark.parametrize("c", [0.99, 0.0, -1.0, math.nan])
def test_c_outside_its_range(c: float) -> None:
    p, q = normal([1, 2], [2, 1])
    with pytest.raises(SchemeError, match="from 1"):
        frontier.resolve(p, q, np.ones(2), 0, c)


def test_mixed_is_exact_and_on_the_chord() -> None:
    p, q = normal([4, 3, 2, 1], [1, 2, 3, 4])
    share, draws = 0.4, 20_000
    rng = np.random.default_rng(9)
    blocks = rng.integers(0, 2**32, (draws, 8), dtype=np.uint32)
    clocks = rng.exponential(size=(draws, 4))
    x = np.argmin(clocks / q, axis=1)
    y = np.array(
        [
            frontier.mixed(p, q, e, int(i), b, share)
            for e, i, b in zip(clocks, x, blocks, strict=True)
        ]
    )
    assert sps.chisquare(np.bincount(y, minlength=4), draws * p).pvalue > 1e-4
    low, high = acceptance_of_the_race(p, q), float(np.minimum(p, q).sum())
    assert np.mean(x == y) == pytest.approx(low + share * (high - low), abs=0.016)
    # The coin alone decides which rule is used.
    heads = prf.open_uniform(blocks[:, prf.COIN]) < share
    raced = np.argmin(clocks / p, axis=1)
    assert np.array_equal(y[~heads], raced[~heads])
    some = np.flatnonzero(heads)[:1000]
    assert [transport.resolve(p, q, clocks[i], int(x[i])) for i in some] == list(y[some])
    assert np.any(y[some] != raced[some])
