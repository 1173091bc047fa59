"""The no-go theorem: closed forms against simulation, programmes against another solver."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from filigrane.errors import FiligraneError
from filigrane.speculative import nogo


@pytest.fixture(scope="module")
def certificate() -> nogo.Certificate:
    return nogo.certify((2, 3), 2_000, 1)


def test_every_claim_holds(certificate: nogo.Certificate) -> None:
    assert certificate.held, [claim for claim in certificate.claims if not claim.held]
    assert len(certificate.claims) > 25


def test_table(certificate: nogo.Certificate) -> None:
    rows = {row.name: row for row in certificate.worked}
    two, three, halves, ten = (
        rows[name] for name in ("2 tokens", "3 tokens", "3 tokens, halves", "10 tokens")
    )
    assert (two.full, two.race, two.inverse_cdf, two.gamma) == pytest.approx((0.7,) * 4)
    assert three[1:5] == pytest.approx((0.7, 0.630769, 0.4, 0.6), abs=1e-6)
    assert halves[1:5] == pytest.approx((0.5, 1 / 3, 0.5, 1 / 3))
    assert ten[1:3] == pytest.approx((0.7, 0.6257382), abs=1e-6) and ten.gamma is None
    for row in rows.values():
        assert row.otmc.acceptance == pytest.approx(row.full)
    # With two tokens OTMC is the full mark, with more it is not, and keeps most of its evidence.
    assert two.otmc.agreement == 1.0
    assert 0.6 < halves.otmc.agreement < 0.9 and 0.8 < halves.otmc.evidence < 0.9


@pytest.mark.parametrize("size", [2, 3, 5])
def test_closed_forms_by_simulation(size: int) -> None:
    rng = np.random.default_rng(size)
    p, q = rng.dirichlet(np.ones(size), 2)
    draws = 100_000
    clocks = rng.exponential(size=(draws, size))
    same = np.mean(np.argmin(clocks / p, 1) == np.argmin(clocks / q, 1))
    assert nogo.race(p, q) == pytest.approx(same, abs=0.008)
    u = rng.random(draws)
    same = np.mean(np.searchsorted(np.cumsum(p), u) == np.searchsorted(np.cumsum(q), u))
    assert nogo.inverse_cdf(p, q) == pytest.approx(same, abs=0.008)


def test_gamma_is_the_scheme() -> None:
    """Against the reweight that the library uses, over many keys."""
    from filigrane.schemes import GammaReweight

    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.ones(4), 2)
    blocks = rng.integers(0, 2**32, (20_000, 8), dtype=np.uint32)
    wide = [np.broadcast_to(law, (len(blocks), 4)) for law in (p, q)]
    marked = [GammaReweight().reweight(law, blocks) for law in wide]
    assert nogo.gamma(p, q) == pytest.approx(nogo.overlap(*marked).mean(), abs=0.01)


def test_reweights_are_unbiased() -> None:
    rng = np.random.default_rng(4)
    law = rng.dirichlet(np.ones(4))
    mean = np.zeros(4)
    for order in itertools.permutations(range(4)):
        mean[list(order)] += nogo._upper_half(law[list(order)]) / 24
    assert mean == pytest.approx(law)


def test_simplex_against_another_solver() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        m, n = int(rng.integers(1, 8)), int(rng.integers(8, 30))
        # The first row bounds x; the last is a copy, so that redundancy occurs.
        rows = np.vstack([np.ones(n), rng.normal(size=(m, n))])
        rows = np.vstack([rows, rows[-1]])
        right = rows @ rng.dirichlet(np.ones(n))
        cost = rng.normal(size=n)
        found = nogo.minimise(cost, rows, right)
        other = linprog(cost, A_eq=rows[:-1], b_eq=right[:-1], bounds=(0, None))
        assert found.value == pytest.approx(other.fun, abs=1e-8)
        assert found.bound == pytest.approx(found.value, abs=1e-8)
        assert rows @ found.x == pytest.approx(right, abs=1e-8) and found.x.min() > -1e-12


def test_simplex_without_solution() -> None:
    with pytest.raises(FiligraneError, match="no solution"):
        nogo.minimise(np.ones(2), np.ones((2, 2)), np.array([1.0, 2.0]))


def test_one_pair_alone_is_no_obstacle() -> None:
    """A code made for two laws may be their maximal coupling: it takes three to forbid."""
    rng = np.random.default_rng(6)
    for _ in range(5):
        laws = rng.dirichlet(np.ones(3), 2)
        assert nogo.best_one_hot(laws, worst=True).value == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("size", "loss"), [(2, 0.0), (3, 1 / 6), (4, 1 / 6)])
def test_any_one_hot_code(size: int, loss: float) -> None:
    best = nogo.best_one_hot(nogo.pair_laws(size), worst=True)
    assert best.value == pytest.approx(loss) and best.bound == pytest.approx(loss)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.3, 0.5])
def test_strength_costs_acceptance(strength: float) -> None:
    best = nogo.best_with_strength(strength, grid=10)
    assert -best.value == pytest.approx(1.5 - strength)
    assert -best.bound == pytest.approx(1.5 - strength)


def test_a_false_claim_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nogo, "race", lambda p, q: nogo.overlap(p, q))
    found = nogo.certify((3,), 50, 0)
    assert not found.held
    assert {claim.statement for claim in found.claims if not claim.held} >= {
        "3 tokens: race stays below 1 - TV",
        "halves: race reaches that sum",
    }


@pytest.mark.parametrize("sizes", [(), (1,), (3, 6)])
def test_sizes_that_cannot_be_enumerated(sizes: tuple[int, ...]) -> None:
    with pytest.raises(FiligraneError, match="from 2 to 5"):
        nogo.certify(sizes)


def test_no_pairs() -> None:
    with pytest.raises(FiligraneError, match="at least one"):
        nogo.certify((2,), 0)
