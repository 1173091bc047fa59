"""`speculative.transport.solve_reference`, compiled: race weights and thresholds of two laws.

Knows nothing of keys, clocks or tokens: two aligned arrays go in, two come out. One sort and one
walk over its result, so a whole vocabulary takes some milliseconds.
"""

import math

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]


@njit(nogil=True, cache=True)
def _ratios(p, q, out):
    """out = q / p, inf where p = 0."""
    for i in range(p.shape[0]):
        out[i] = q[i] / p[i] if p[i] > 0.0 else np.inf


@njit(nogil=True, cache=True)
def _walk(p, q, order, large, weights, thresholds):
    """The solver of `speculative.transport`, given the order of q / p; returns the residual."""
    n = p.shape[0]
    ys = np.empty(n, np.int64)
    xs = np.empty(n, np.int64)
    n_y = 0
    n_x = 0
    beta = 0.0
    for i in order:
        weights[i] = 0.0
        thresholds[i] = np.inf
        if p[i] > q[i]:
            if p[i] - q[i] >= large * q[i]:
                weights[i] = p[i]
                beta += p[i]
            else:
                ys[n_y] = i
                n_y += 1
        elif p[i] < q[i]:
            xs[n_x] = i
            n_x += 1
    # Sums from the end, so that what is left of the excess is exactly zero when nothing is left.
    rest = np.zeros(n_x + 1, np.float64)
    for j in range(n_x - 1, -1, -1):
        rest[j] = rest[j + 1] + q[xs[j]]
    u = 0.0
    m = 1.0
    h = 1.0
    j = 0
    k = 0
    while True:
        w = rest[k]
        dy = np.inf
        if j < n_y:
            y = ys[j]
            kappa = (p[y] - q[y]) / q[y]
            c = h - kappa * u
            if c <= 0.0:
                dy = 0.0
            else:
                a1 = kappa * m * m + w - c * beta * m
                a2 = kappa * beta * m
                root = math.sqrt(a1 * a1 + 4.0 * a2 * c * m * m)
                # Two forms of the same root: each is free of cancellation for one sign of a1.
                dy = 2.0 * c * m * m / (a1 + root) if a1 >= 0.0 else (root - a1) / (2.0 * a2)
        dx = np.inf
        if k < n_x and beta > 0.0 and p[xs[k]] > 0.0:
            dx = max((q[xs[k]] / p[xs[k]] - m) / beta, 0.0)
        d = min(dx, dy)
        if d == np.inf:
            break
        after = m + beta * d
        h -= w * d / (m * after)
        u += d
        m = after
        if dy <= dx:
            weights[ys[j]] = q[ys[j]] / u
            beta += weights[ys[j]]
            j += 1
        else:
            thresholds[xs[k]] = u
            k += 1
    return abs(h - rest[k] / (m * beta)) if beta > 0.0 and n_x > 0 else 0.0


def solve(p: Floats, q: Floats, large: float) -> tuple[Floats, Floats, float]:
    """Weights (n,), thresholds (n,) and the residual; see `speculative.transport.solve`."""
    p = np.ascontiguousarray(p, dtype=np.float64)
    q = np.ascontiguousarray(q, dtype=np.float64)
    ratios, weights, thresholds = np.empty_like(p), np.empty_like(p), np.empty_like(p)
    _ratios(p, q, ratios)
    # numpy's sort has vector instructions, that of compiled functions has not. The order of equal
    # ratios is free: it moves last bits of the weights.
    order = np.argsort(ratios)
    return weights, thresholds, float(_walk(p, q, order, large, weights, thresholds))
