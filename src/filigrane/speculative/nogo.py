"""The no-go theorem of Hu and Huang 2024 (arXiv 2410.20418), recomputed on small vocabularies.

A reweight R turns a law into a law by a code E, unbiased: E[R_E(P)] = P. A drafter that does not
know the target draws from R_E(Q), the output has to be R_E(P). Given E, the best coupling of the
two keeps the draft with probability 1 - TV(R_E(P), R_E(Q)), so the best acceptance at full strength
is the mean of that over codes. The theorem: with more than two tokens no reweight but the trivial
one reaches 1 - TV(P, Q) for all P and Q. This module computes the means exactly, optimises over
all reweights by linear programmes on three laws that overlap by halves, and states each claim with
the two numbers that it compares. It knows nothing of keys or texts and needs numpy alone.
Why this does not contradict `transport`: docs/design/0006-no-go.md.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from filigrane.errors import FiligraneError
from filigrane.speculative import transport

Floats = npt.NDArray[np.float64]

SIZES: Final = range(2, 6)
"""Vocabularies that are enumerated: all orders of the tokens, all codes of all pair laws."""
EXACT: Final = 1e-9
HALVES: Final[tuple[tuple[float, ...], ...]] = ((0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5))
"""Three laws with pairwise total variation 1/2."""
PAIRS: Final[dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "2 tokens": ((0.5, 0.5), (0.2, 0.8)),
    "3 tokens": ((0.5, 0.3, 0.2), (0.2, 0.3, 0.5)),
    "3 tokens, halves": (HALVES[0], HALVES[1]),
    "10 tokens": (
        (0.1, 0.13, 0.155, 0.115, 0.235, 0.065, 0.055, 0.05, 0.06, 0.035),
        (0.4, 0.10, 0.12, 0.11, 0.08, 0.06, 0.05, 0.035, 0.025, 0.02),
    ),
}
"""The worked pairs (target, draft); the last one is that of He et al. 2026, figure 1."""


def overlap(p: Floats, q: Floats) -> Floats:
    """1 - TV = sum of min(p, q): (..., V) and (..., V) -> (...)."""
    return np.asarray(np.minimum(p, q).sum(axis=-1))


def race(p: Floats, q: Floats) -> Floats:
    """Best acceptance at full strength of the Gumbel race, (..., V) x 2 -> (...).

    sum_w 1 / sum_v max(q_v / q_w, p_v / p_w): w wins both races (Daliri et al. 2024, 2408.07978).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        slower = np.maximum(
            q[..., None, :] / q[..., :, None],
            p[..., None, :] / p[..., :, None],
        ).sum(axis=-1)
        chance = np.where((p > 0.0) & (q > 0.0), 1.0 / slower, 0.0)
    return np.asarray(chance.sum(axis=-1))


def inverse_cdf(p: Floats, q: Floats) -> Floats:
    """The same of the inverse CDF at one shared uniform, tokens in their natural order.

    Token w is drawn by both where its two intervals of the unit line overlap.
    """
    above_p, above_q = np.cumsum(p, axis=-1), np.cumsum(q, axis=-1)
    common = np.minimum(above_p, above_q) - np.maximum(above_p - p, above_q - q)
    return np.asarray(np.maximum(common, 0.0).sum(axis=-1))


def gamma(p: Floats, q: Floats) -> Floats:
    """The same of gamma (Hu et al. 2023), the mean over all orders of the tokens: V at most 7."""
    total = np.zeros(p.shape[:-1])
    orders = list(itertools.permutations(range(p.shape[-1])))
    for order in orders:
        total += overlap(*(_upper_half(law[..., list(order)]) for law in (p, q)))
    return total / len(orders)


def _upper_half(law: Floats) -> Floats:
    """The upper half of the cumulative probability counts double, the lower half not at all."""
    upper = np.maximum(2.0 * np.cumsum(law, axis=-1) - 1.0, 0.0)
    return np.diff(upper, axis=-1, prepend=0.0)


class Optimum(NamedTuple):
    """Solution of a linear programme: x, the value reached, and a bound that no x can beat."""

    x: Floats
    value: float
    bound: float


def minimise(cost: Floats, rows: Floats, right: Floats) -> Optimum:
    """Minimise cost @ x over 0 <= x <= 1 with rows @ x = right (x <= 1 must follow from the rows).

    cost (n,), rows (m, n), right (m,). A dense simplex for programmes of some hundred variables.
    Nobody has to trust it: x is feasible as far as rows @ x says, and `bound` follows from weak
    duality alone, so that value = bound proves both. Raises FiligraneError if nothing is feasible.
    """
    m, n = rows.shape
    sign = np.where(right < 0.0, -1.0, 1.0)
    table = np.concatenate([rows * sign[:, None], np.eye(m), (right * sign)[:, None]], axis=1)
    basis = list(range(n, n + m))
    _pivot_until_best(np.concatenate([np.zeros(n), np.ones(m)]), table, basis, n + m)
    if sum(table[i, -1] for i in range(m) if basis[i] >= n) > 1e-8:
        raise FiligraneError("the linear programme has no solution; check that the laws sum to 1.")
    for i in range(m):
        # What stands for a row that is still missing leaves, unless the row says nothing new.
        if basis[i] >= n and np.abs(table[i, :n]).max() > 1e-9:
            _pivot(table, basis, i, int(np.argmax(np.abs(table[i, :n]))))
    full = np.concatenate([cost, np.zeros(m)])
    _pivot_until_best(full, table, basis, n)
    x = np.zeros(n + m)
    x[basis] = table[:, -1]
    prices = (full[basis] @ table[:, n : n + m]) * sign
    bound = prices @ right + np.minimum(cost - prices @ rows, 0.0).sum()
    return Optimum(x[:n], float(cost @ x[:n]), float(bound))


def _pivot_until_best(cost: Floats, table: Floats, basis: list[int], columns: int) -> None:
    turn = 0
    while True:
        reduced = cost[:columns] - cost[basis] @ table[:, :columns]
        candidates = np.flatnonzero(reduced < -1e-11)
        if candidates.size == 0:
            return
        # Steepest first; after many steps the first one (Bland), which cannot go in circles.
        turn += 1
        column = int(np.argmin(reduced)) if turn < 200 else int(candidates[0])
        rising = table[:, column] > 1e-9
        ratios = np.full(len(basis), np.inf)
        ratios[rising] = table[rising, -1] / table[rising, column]
        ties = np.flatnonzero(ratios <= ratios.min() + 1e-15)
        _pivot(table, basis, int(min(ties, key=lambda i: basis[i])), column)


def _pivot(table: Floats, basis: list[int], row: int, column: int) -> None:
    table[row] /= table[row, column]
    others = np.arange(table.shape[0]) != row
    table[others] -= table[others, column][:, None] * table[row]
    basis[row] = column


def best_one_hot(laws: Floats, *, worst: bool) -> Optimum:
    """The best that any one-hot reweight can do on a few laws, over all its codes at once.

    laws: (k, V). A code gives each law one token of its support, so a one-hot reweight restricted
    to these laws is a distribution over all such choices with the laws as marginals. worst=True
    minimises the largest loss against 1 - TV over all pairs of laws; worst=False minimises the sum
    of the losses.
    """
    supports = [np.flatnonzero(law > 0.0) for law in laws]
    codes = np.array(list(itertools.product(*supports)))
    couples = list(itertools.combinations(range(len(laws)), 2))
    same = np.array([codes[:, i] == codes[:, j] for i, j in couples], dtype=np.float64)
    wanted = np.array([float(overlap(laws[i], laws[j])) for i, j in couples])
    marginals = [(codes[:, i] == y, laws[i, y]) for i, s in enumerate(supports) for y in s]
    rows = np.array([row for row, _ in marginals], dtype=np.float64)
    right = np.array([value for _, value in marginals])
    if not worst:
        found = minimise(-same.sum(axis=0), rows, right)
        total = float(wanted.sum())
        return Optimum(found.x, found.value + total, found.bound + total)
    # One more variable, the largest loss, and a slack for each pair: same @ x + loss - slack = 1-TV
    k = len(couples)
    rows = np.block(
        [[rows, np.zeros((len(right), 1 + k))], [same, np.ones((k, 1)), -np.eye(k)]],
    )
    cost = np.zeros(rows.shape[1])
    cost[len(codes)] = 1.0
    return minimise(cost, rows, np.concatenate([right, wanted]))


def best_with_strength(strength: float, grid: int = 8) -> Optimum:
    """Largest sum of the three acceptances among `HALVES`, over all reweights of a given strength.

    R_E of the three laws is (a, 1-a, 0), (b, 0, 1-b), (0, c, 1-c) with a, b, c of mean 1/2;
    strength is E|a - 1/2|, 0 for the trivial reweight and 1/2 for a one-hot one. Codes are all
    (a, b, c) on a grid. The value is minus the sum. By hand: for each code the sum is at most
    a + (1 - a) + min(a, 1 - a) = 3/2 - |a - 1/2|, so 3/2 - strength is an upper bound.
    """
    axis = np.arange(grid + 1) / grid
    a, b, c = (x.ravel() for x in np.meshgrid(axis, axis, axis, indexing="ij"))
    gain = np.minimum(a, b) + np.minimum(1.0 - a, c) + np.minimum(1.0 - b, 1.0 - c)
    rows = np.stack([np.ones_like(a), a, b, c, np.abs(a - 0.5)])
    return minimise(-gain, rows, np.array([1.0, 0.5, 0.5, 0.5, strength]))


def pair_laws(size: int) -> Floats:
    """Laws on which a one-hot reweight is tested: one half on each of two tokens, for all pairs.

    Two tokens have one such pair, so there they are three laws on a quarter lattice instead.
    """
    if size == 2:
        return np.array([[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]])
    laws = np.zeros((math.comb(size, 2), size))
    for law, couple in zip(laws, itertools.combinations(range(size), 2), strict=True):
        law[list(couple)] = 0.5
    return laws


class Transport(NamedTuple):
    """OTMC on a pair: its acceptance, from its plan, and what it gives up, by simulation.

    agreement: share of positions where it writes the token of the full mark, race(E, P);
    evidence: its mean score -log(1 - exp(-E)) as a share of that of the full mark.
    """

    acceptance: float
    agreement: float
    evidence: float


def otmc_acceptance(p: Floats, q: Floats) -> float:
    """Chance that OTMC keeps the draft, from thresholds and weights: 1 / M(U_x) on its excess."""
    plan = transport.solve_reference(p, q)
    entry = np.where(plan.weights > 0.0, q, 0.0)
    total = float(q[p >= q].sum())
    for x in np.flatnonzero((p < q) & (p > 0.0)):
        total += q[x] / (1.0 + np.maximum(plan.weights * plan.thresholds[x] - entry, 0.0).sum())
    return float(total)


def otmc(p: Floats, q: Floats, rng: np.random.Generator, draws: int = 20_000) -> Transport:
    """See `Transport`."""
    plan = transport.solve_reference(p, q)
    clocks = rng.exponential(size=(draws, p.size))
    rows = np.arange(draws)
    with np.errstate(divide="ignore"):
        x = np.argmin(clocks / q, axis=1)
        full = np.argmin(clocks / p, axis=1)
        arrivals = clocks / plan.weights
    y = np.argmin(arrivals, axis=1)
    late = plan.thresholds[x] * clocks[rows, x] / q[x]
    y = np.where((p[x] < q[x]) & (arrivals[rows, y] < late), y, x)
    score = -np.log(-np.expm1(-clocks))
    evidence = float(score[rows, y].mean() / score[rows, full].mean())
    return Transport(otmc_acceptance(p, q), float(np.mean(y == full)), evidence)


class Claim(NamedTuple):
    """A comparison: what is claimed, left and right hand side, and whether it held."""

    statement: str
    left: float
    relation: str
    right: float
    held: bool


class Worked(NamedTuple):
    """One pair: best acceptance at full strength by reweight (gamma None beyond enumeration)."""

    name: str
    full: float
    race: float
    inverse_cdf: float
    gamma: float | None
    otmc: Transport


class Random(NamedTuple):
    """Random pairs of one vocabulary: largest loss against 1 - TV, by reweight."""

    size: int
    pairs: int
    race: float
    inverse_cdf: float
    gamma: float


class Strength(NamedTuple):
    """Largest mean of the three acceptances among `HALVES` at a strength, and what bounds it."""

    strength: float
    acceptance: float
    bound: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """Everything that was computed, and the claims; `held` if all of them are true."""

    worked: tuple[Worked, ...]
    random: tuple[Random, ...]
    strengths: tuple[Strength, ...]
    claims: tuple[Claim, ...]

    @property
    def held(self) -> bool:
        """Whether every claim held."""
        return all(claim.held for claim in self.claims)


def _equal(statement: str, left: float, right: float, tolerance: float = EXACT) -> Claim:
    return Claim(statement, left, "=", right, abs(left - right) <= tolerance)


def _less(statement: str, left: float, right: float) -> Claim:
    return Claim(statement, left, "<", right, left < right - EXACT)


def _at_most(statement: str, left: float, right: float) -> Claim:
    return Claim(statement, left, "<=", right, left <= right + EXACT)


def _best(statement: str, reached: float, bound: float, right: float) -> Claim:
    """An optimum: what is reached is what weak duality allows at most."""
    claim = _equal(statement, reached, right)
    return claim._replace(held=claim.held and abs(bound - right) <= EXACT)


def certify(sizes: Sequence[int] = (2, 3, 4), pairs: int = 20_000, seed: int = 0) -> Certificate:
    """Compute every claim of the theorem on vocabularies of these sizes.

    sizes: each in SIZES, else FiligraneError; pairs: random pairs of laws per size, uniform on the
    simplex; seed: of the random pairs. Seconds for the defaults.
    """
    if not sizes or any(size not in SIZES for size in sizes):
        raise FiligraneError(
            f"vocabulary sizes must be from {SIZES[0]} to {SIZES[-1]}: larger ones cannot be "
            "enumerated."
        )
    if pairs < 1:
        raise FiligraneError("pass at least one random pair.")
    rng = np.random.default_rng(seed)
    claims: list[Claim] = []
    worked = tuple(_work(name, np.array(p), np.array(q), rng) for name, (p, q) in PAIRS.items())
    for row in worked:
        if row.name == "2 tokens":
            reached = {"race": row.race, "inverse CDF": row.inverse_cdf, "gamma": row.gamma or 0.0}
            for name, left in reached.items():
                claims.append(_equal(f"{row.name}: {name} reaches 1 - TV", left, row.full, 1e-12))
        else:
            claims.append(_less(f"{row.name}: race stays below 1 - TV", row.race, row.full))
        claims.append(
            _equal(f"{row.name}: OTMC, not R_E(P), reaches 1 - TV", row.otmc.acceptance, row.full)
        )
    three = next(row for row in worked if row.name == "3 tokens")
    claims.append(_less("3 tokens: inverse CDF stays below 1 - TV", three.inverse_cdf, three.full))
    claims.append(_less("3 tokens: gamma stays below 1 - TV", three.gamma or 0.0, three.full))

    strengths, more = _three_laws()
    claims += more
    random = []
    for size in sizes:
        drawn, more = _random(size, pairs, rng)
        random.append(drawn)
        claims += [*more, _all_codes(size)]
    return Certificate(worked, tuple(random), strengths, tuple(claims))


def _work(name: str, p: Floats, q: Floats, rng: np.random.Generator) -> Worked:
    small = float(gamma(p, q)) if p.size in SIZES else None
    simulated = otmc(p, q, rng)
    return Worked(
        *(name, float(overlap(p, q)), float(race(p, q)), float(inverse_cdf(p, q))),
        *(small, simulated),
    )


def _three_laws() -> tuple[tuple[Strength, ...], list[Claim]]:
    """The certificate on `HALVES`: one-hot codes sum to 1, and only the trivial one to 3/2."""
    laws = np.array(HALVES)
    couples = list(itertools.combinations(range(3), 2))
    # The wanted overlaps sum to 3/2, so the best sum of acceptances is 3/2 less the least loss.
    hot = best_one_hot(laws, worst=False)
    statement = "halves: best sum of acceptances, any one-hot code"
    claims = [_best(statement, 1.5 - hot.value, 1.5 - hot.bound, 1.0)]
    for name, rule in (("race", race), ("inverse CDF", inverse_cdf)):
        total = sum(float(rule(laws[i], laws[j])) for i, j in couples)
        claims.append(_equal(f"halves: {name} reaches that sum", total, 1.0))
    strengths = []
    for strength in (0.0, 0.125, 0.25, 0.375, 0.5):
        best = best_with_strength(strength)
        statement = f"halves: best sum, any code of strength {strength:g}"
        claims.append(_best(statement, -best.value, -best.bound, 1.5 - strength))
        strengths.append(Strength(strength, -best.value / 3.0, -best.bound / 3.0))
    return tuple(strengths), claims


def _all_codes(size: int) -> Claim:
    """Whether any one-hot reweight, whatever its code, loses nothing on all pairs of laws."""
    best = best_one_hot(pair_laws(size), worst=True)
    statement = f"{size} tokens: least loss on the worst pair, any one-hot code"
    return _best(statement, best.value, best.bound, 0.0 if size == 2 else 1.0 / 6.0)


def _random(size: int, pairs: int, rng: np.random.Generator) -> tuple[Random, list[Claim]]:
    p, q = rng.dirichlet(np.ones(size), (2, pairs))
    full = overlap(p, q)
    found = {"race": race(p, q), "inverse CDF": inverse_cdf(p, q), "gamma": gamma(p, q)}
    claims = []
    for name, accepted in found.items():
        gap = full - accepted
        worst = float(gap.max())
        statement = f"{size} tokens, random pairs: {name}"
        if size == 2:
            claims.append(_equal(f"{statement}, largest loss", float(np.abs(gap).max()), 0.0))
        else:
            claims.append(_at_most(f"{statement}, largest gain", float(-gap.min()), 0.0))
            claims.append(Claim(f"{statement}, largest loss", worst, ">", 0.0, worst > EXACT))
    tv = 1.0 - full
    slack = float((found["race"] - (1.0 - tv) / (1.0 + tv)).min())
    statement = f"{size} tokens, random pairs: race less (1 - TV) / (1 + TV)"
    claims.append(Claim(statement, slack, ">=", 0.0, slack >= -EXACT))
    off = max(abs(otmc_acceptance(p[i], q[i]) - float(full[i])) for i in range(min(pairs, 200)))
    claims.append(_equal(f"{size} tokens, random pairs: OTMC, largest loss", off, 0.0))
    row = Random(size, pairs, *(float((full - accepted).max()) for accepted in found.values()))
    return row, claims
