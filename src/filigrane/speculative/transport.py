"""Optimal single-key maximal coupling (OTMC): plain acceptance, with the most evidence left in it.

The draft token x won the race of its law q with the clocks of the position. This module decides
from the same clocks whether x stays or which token takes its place. It knows nothing of keys,
texts or blocks of drafts: laws are aligned arrays and tokens are indices into them.

Among all couplings that keep x with probability min(1, p_x / q_x) it is the one with the largest
expected score -log E of the token that is emitted. That is a problem of optimal transport from the
tokens with too much probability (p < q) to those with too little (p > q); its potentials are race
weights of the latter and thresholds of the former, and they follow from one walk over the tokens.
"""

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LARGE: Final = 1e100
"""From this p / q - 1 on, q counts as zero: the weight is then p to all digits."""


class Plan(NamedTuple):
    """What the solver returns.

    weights: (n,) float64, race rates of the replacement, positive where p > q and else 0;
    thresholds: (n,) float64, positive, inf where p >= q or p = 0; residual: how far the two ends of
    the walk miss each other, zero but for rounding. The achieved law misses p by no more than
    residual * weights.sum() in L1 and rounding.
    """

    weights: Floats
    thresholds: Floats
    residual: float


def solve_reference(p: Floats, q: Floats) -> Plan:
    """The solver in plain Python; `solve` computes the same bits, compiled.

    p, q: (n,) float64, aligned, each summing to 1 (target and draft law).

    Notation. A token y with p > q enters the replacement race at ratio u_y with rate q_y / u_y, a
    token x with p < q leaves the pool of excess mass at ratio U_x. Then

        M(u) = 1 + sum_y (q_y / u_y) (u - u_y)+        1 / M(U_x) = p_x / q_x
        W(u) = sum of q_x with U_x > u                  h(u) = integral of W / M**2 from u
        p_y - q_y = (q_y / u_y) h(u_y)

    and the walk goes through u upwards: h is known at 0 (it is 1), each step ends at the next
    entry or exit, whichever comes first, and both have a closed form because M is linear between.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ratios = np.where(p > 0.0, q / p, np.inf)
    order = np.argsort(ratios)
    at_once = (p > q) & (p - q >= LARGE * q)
    weights = np.where(at_once, p, 0.0)
    thresholds = np.full(p.shape, np.inf)
    entering = [int(i) for i in order if p[i] > q[i] and not at_once[i]]
    leaving = [int(i) for i in order if p[i] < q[i]]
    excess = [0.0]
    for x in reversed(leaving):
        excess.append(excess[-1] + float(q[x]))
    beta = 0.0
    for i in order:
        beta += float(weights[i])

    u, m, h = 0.0, 1.0, 1.0
    j = k = 0
    while True:
        w = excess[len(leaving) - k]
        to_entry = to_exit = math.inf
        if j < len(entering):
            y = entering[j]
            kappa = float((p[y] - q[y]) / q[y])
            to_entry = _step(kappa, u, m, h, w, beta)
        if k < len(leaving) and beta > 0.0 and p[leaving[k]] > 0.0:
            x = leaving[k]
            to_exit = max((float(q[x] / p[x]) - m) / beta, 0.0)
        step = min(to_entry, to_exit)
        if step == math.inf:
            break
        after = m + beta * step
        h -= w * step / (m * after)
        u += step
        m = after
        if to_entry <= to_exit:
            weights[entering[j]] = q[entering[j]] / u
            beta += float(weights[entering[j]])
            j += 1
        else:
            thresholds[leaving[k]] = u
            k += 1
    # Beyond the last event M is a line and W constant, so the integral has a closed form.
    end = excess[len(leaving) - k] / (m * beta) if beta > 0.0 else 0.0
    return Plan(weights, thresholds, abs(h - end) if beta > 0.0 and leaving else 0.0)


def _step(kappa: float, u: float, m: float, h: float, w: float, beta: float) -> float:
    """Smallest d >= 0 with h(u + d) = kappa (u + d), a quadratic equation."""
    c = h - kappa * u
    if c <= 0.0:
        return 0.0
    a1 = kappa * m * m + w - c * beta * m
    a2 = kappa * beta * m
    root = math.sqrt(a1 * a1 + 4.0 * a2 * c * m * m)
    # Two forms of the same root: each is free of cancellation for one sign of a1.
    return 2.0 * c * m * m / (a1 + root) if a1 >= 0.0 else (root - a1) / (2.0 * a2)


def solve(p: Floats, q: Floats) -> Plan:
    """Weights and thresholds of the coupling of two laws, compiled.

    p, q: (n,) float64, aligned, each summing to 1 (target and draft law); any n, zeros in either.
    Time is that of sorting n numbers. See `Plan` for what comes back.
    """
    from filigrane.kernels import transport

    return Plan(*transport.solve(p, q, LARGE))


def resolve(p: Floats, q: Floats, clocks: Floats, x: int) -> int:
    """The token that is emitted, as an index; x itself means that the draft token is kept.

    p, q, clocks: (n,) float64, aligned: target law, draft law, Exp(1) clocks of the position;
    x: argmin of clocks / q. Keeps x with probability min(1, p_x / q_x); the law of the result is p.
    A function of the clocks alone: no coin, so the ordinary detector reads the mark.
    """
    if p[x] >= q[x]:
        return x
    plan = solve(p, q)
    with np.errstate(divide="ignore", over="ignore"):
        arrivals = np.where(plan.weights > 0.0, clocks / plan.weights, np.inf)
    y = int(np.argmin(arrivals))
    return y if arrivals[y] < plan.thresholds[x] * (clocks[x] / q[x]) else x
