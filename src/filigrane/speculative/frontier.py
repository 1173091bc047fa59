"""Between full strength and full acceptance: one number c from 1 (coupled race) to inf (OTMC).

This module knows nothing of keys, texts or blocks of drafts: laws are aligned arrays and tokens are
indices into them. Every token w has a rate l_w; with u_w = q_w / l_w and T = E_x / q_x, the draft
token x stays if u_x T / c <= min over w of E_w / l_w, and else the token of that minimum comes in
its place. c = 1 with l = p is the coupled race; as c grows a draft token is kept more often and
the clock of what is kept tells a little less.

The law of the result. With M(v) = 1 + sum_w q_w (v / u_w - 1)+ and W(v) = sum of q_w with
u_w > c v, because the clocks that did not win are fresh once T has passed:

    law_y = q_y / M(u_y / c) + l_y * integral from u_y of W / M**2      acceptance: sum of the first

and the rates have to make it p. More rate for y means more of y and less of every other token, and
scaling all rates changes nothing: the Jacobian in log rates has no positive entry off its diagonal
and row sums zero, a singular M-matrix, so that Newton's step exists up to scale and can be computed
without cancellation. M is linear between the 2n points u_w and u_w / c, so law and Jacobian are
closed forms. Started from OTMC's plan it takes some five steps.
"""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from filigrane.errors import SchemeError
from filigrane.prf import COIN, Words, open_uniform
from filigrane.speculative import transport

Floats = npt.NDArray[np.float64]

TOLERANCE: Final = 1e-9
"""Largest L1 distance between the achieved law and p; what misses it falls back to OTMC."""
_AIM: Final = 1e-12
_PATIENCE: Final = 20
"""Steps after which a tenth of TOLERANCE is good enough."""
_ROUNDS: Final = 200
LARGEST: Final = 256
"""Most tokens with p > 0 and q > 0; a Newton step costs the cube of their number."""


class Plan(NamedTuple):
    """What the solver returns.

    weights: (n,) float64, the rates, 0 where p = 0; thresholds: (n,) float64, x is kept if
    thresholds[x] * clocks[x] / q[x] <= min over w of clocks[w] / weights[w]; acceptance: how
    often the draft token is kept; error: L1 distance of the achieved law and p; rounds: Newton
    steps; solved: whether this is the plan for c. If not it is OTMC's, exact all the same.
    """

    weights: Floats
    thresholds: Floats
    acceptance: float
    error: float
    rounds: int
    solved: bool


@dataclass(slots=True)
class Tally:
    """Counts, over many positions, how often a plan for c was found and how often OTMC stood in."""

    solved: int = 0
    fell_back: int = 0


def check_c(c: float) -> None:
    """Raise SchemeError unless c is a number in [1, inf]."""
    if not c >= 1.0:  # so that NaN is refused as well
        raise SchemeError(
            f"frontier: c must be from 1 (full strength) to inf (full acceptance), got {c!r}."
        )


def solve(p: Floats, q: Floats, c: float) -> Plan:
    """The plan for one pair of laws.

    p, q: (n,) float64, aligned, each summing to 1 (target and draft law), zeros allowed in either;
    c: in [1, inf], else SchemeError. Falls back to the plan of OTMC, which has no bias, when the
    law would miss p by more than TOLERANCE or when more than LARGEST tokens are shared.
    """
    check_c(c)
    ends = transport.solve(p, q)
    if c == math.inf:
        return _full_acceptance(p, q, ends, 0, solved=True)
    shared = (p > 0.0) & (q > 0.0)
    count = int(np.count_nonzero(shared))
    if count > LARGEST:
        return _full_acceptance(p, q, ends, 0, solved=False)
    fresh = (p > 0.0) & (q == 0.0)
    start = p[shared] if c == 1.0 else _start(p, q, ends, c)[shared]
    ps, qs = p[shared], q[shared]
    # Tokens that only p has differ in nothing but their size: for the solver they are one token.
    mass = float(p[fresh].sum())
    if mass > 0.0:
        ps, qs = np.append(mass, ps), np.append(0.0, qs)
        start = np.append(mass if c == 1.0 else ends.weights[fresh].sum(), start)

    dead = float(q[p == 0.0].sum())
    rates, acceptance, error, rounds = _newton(ps, qs, dead, c, start, 0 if c == 1.0 else _ROUNDS)
    if not error <= TOLERANCE:
        return _full_acceptance(p, q, ends, rounds, solved=False)
    weights = np.zeros_like(p)
    weights[shared] = rates[rates.size - count :]
    if mass > 0.0:
        weights[fresh] = rates[0] * (p[fresh] / mass)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        thresholds = np.where(q > 0.0, q / (c * weights), 0.0)
    return Plan(weights, thresholds, acceptance, error, rounds, True)


def _start(p: Floats, q: Floats, ends: transport.Plan, c: float) -> Floats:
    """Rates that tend to the solution as c grows: OTMC's, and what its thresholds mean at c."""
    finite = np.isfinite(ends.thresholds)
    late = float(ends.thresholds[finite].max()) if finite.any() else 1.0
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        losing = np.where(p < q, q / (c * ends.thresholds), q / late)
    rates = np.where(p > q, ends.weights, losing)
    # Laws that differ by rounding alone may leave a rate of zero.
    return np.where(rates > 0.0, rates, p)


def _newton(
    p: Floats, q: Floats, dead: float, c: float, start: Floats, most: int
) -> tuple[Floats, float, float, int]:
    """(rates, acceptance, L1 error, steps) of damped Newton in log rates: the best of its steps."""
    from filigrane.kernels.frontier import Workspace

    problem = Workspace(p, q, dead, c, start)
    weights = best = start
    error = lowest = problem.error(start)
    top = int(np.argmax(p))
    rounds = 0
    while rounds < most and lowest > (_AIM if rounds < _PATIENCE else 0.1 * TOLERANCE):
        rounds += 1
        trial, after = None, error
        step = problem.direction(weights)
        if step is not None:
            # The scale is free: the largest token stays. The others move by a factor of e**4 at
            # most, each for itself, so that a hopelessly small token does not hold up the rest.
            step = np.clip(step - step[top], -4.0, 4.0)
            for halvings in range(8):
                t = 0.5**halvings
                trial = weights * np.exp(t * step)
                after = problem.error(trial)
                if after < (1.0 - 0.1 * t) * error:
                    break
            else:
                trial = None
        if trial is None:
            # More rate where the law is too small: slow, and always the right way.
            problem.error(weights)
            trial = weights * np.sqrt(p / problem.law)
            after = problem.error(trial)
        weights, error = trial, after
        if error < lowest:
            best, lowest = weights, error
    lowest = problem.error(best)
    return best, float((q / problem.kept).sum()), lowest, rounds


def _full_acceptance(
    p: Floats, q: Floats, ends: transport.Plan, rounds: int, *, solved: bool
) -> Plan:
    thresholds = np.where(p >= q, 0.0, ends.thresholds)
    kept = float(np.minimum(p, q).sum())
    return Plan(ends.weights, thresholds, kept, ends.residual, rounds, solved)


def resolve(
    p: Floats, q: Floats, clocks: Floats, x: int, c: float, tally: Tally | None = None
) -> int:
    """The token that is emitted, as an index; x itself means that the draft token is kept.

    p, q, clocks: (n,) float64, aligned: target law, draft law, Exp(1) clocks of the position;
    x: argmin of clocks / q; c: in [1, inf]; tally: counts plans and fallbacks. The law of the
    result is p within TOLERANCE, whatever happens: whether to fall back does not look at clocks.
    """
    check_c(c)
    if c == 1.0:
        return _coupled(p, clocks)
    if c == math.inf:
        return transport.resolve(p, q, clocks, x)
    plan = solve(p, q, c)
    if tally is not None:
        tally.solved += plan.solved
        tally.fell_back += not plan.solved
    return apply(plan, q, clocks, x)


def apply(plan: Plan, q: Floats, clocks: Floats, x: int) -> int:
    """`resolve` for a plan that is already there."""
    with np.errstate(divide="ignore", over="ignore"):
        arrivals = np.where(plan.weights > 0.0, clocks / plan.weights, np.inf)
    y = int(np.argmin(arrivals))
    return x if plan.thresholds[x] * (clocks[x] / q[x]) <= arrivals[y] else y


def mixed(p: Floats, q: Floats, clocks: Floats, x: int, block: Words, share: float) -> int:
    """The baseline without a solver: OTMC at a share of the positions, the coupled race elsewhere.

    The coin is the word COIN of the position's block (8,) uint32, of which the clocks use the
    words FIELD: independent of them, and the text stays a function of the key. share: in [0, 1].
    Exact, since either rule is; acceptance and strength lie on the chord between the two.
    """
    if float(open_uniform(block[COIN : COIN + 1])[0]) < share:
        return transport.resolve(p, q, clocks, x)
    return _coupled(p, clocks)


def _coupled(p: Floats, clocks: Floats) -> int:
    with np.errstate(divide="ignore", over="ignore"):
        return int(np.argmin(clocks / p))
