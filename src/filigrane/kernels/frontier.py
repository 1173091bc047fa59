"""The law that rates achieve in `speculative.frontier`, and Newton's direction towards another.

Knows nothing of keys, clocks or fallbacks: two aligned laws, a number c and rates go in. Every
probability of the target is positive, and so is every one of the draft but perhaps the first.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]


@njit(nogil=True, cache=True)
def _break_points(q, weights, c, order, kinds, tokens, points):
    """Merge u_w ("enters M", kind 0) and u_w / c ("leaves W", kind 1) in ascending order.

    order (n,): the tokens by their u of the last call. It changes little from step to step, which
    is where insertion sort is fast.
    """
    n = q.shape[0]
    u = q / weights
    for i in range(1, n):
        token = order[i]
        j = i
        while j > 0 and u[order[j - 1]] > u[token]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = token
    i = 0
    j = 0
    while j < n:
        # Entries first where both meet: it makes no difference to any integral.
        if i < n and u[order[i]] <= u[order[j]] / c:
            kinds[i + j] = 0
            tokens[i + j] = order[i]
            points[i + j] = u[order[i]]
            i += 1
        else:
            kinds[i + j] = 1
            tokens[i + j] = order[j]
            points[i + j] = u[order[j]] / c
            j += 1
    while i < n:
        kinds[i + j] = 0
        tokens[i + j] = order[i]
        points[i + j] = u[order[i]]
        i += 1


@njit(nogil=True, cache=True)
def _achieved(q, dead, weights, c, law, entry, kept, moments, order, kinds, tokens, points):
    """Fill in law, entry, kept, moments (see `Workspace`). All sums are of positive terms."""
    n = q.shape[0]
    _break_points(q, weights, c, order, kinds, tokens, points)
    size = 2 * n
    m = np.empty(size)
    value = 1.0
    beta = 0.0
    last = 0.0
    for k in range(size):
        value += beta * (points[k] - last)
        last = points[k]
        m[k] = value
        if kinds[k] == 0:
            beta += weights[tokens[k]]
        else:
            kept[tokens[k]] = value
    # From the far end, where M is a line and only dead mass is left.
    w = dead
    area = w / (beta * m[size - 1])
    moment = w * (last / (2.0 * beta * m[size - 1] ** 2) + 0.5 / (beta * beta * m[size - 1]))
    for k in range(size - 1, -1, -1):
        if k < size - 1:
            d = points[k + 1] - points[k]
            a = m[k]
            b = m[k + 1]
            area += w * d / (a * b)
            moment += w * d * (points[k] * (a + b) / a + d) / (2.0 * a * b * b)
        if kinds[k] == 0:
            entry[tokens[k]] = area
            moments[tokens[k]] = moment
        else:
            w += q[tokens[k]]
    for y in range(n):
        law[y] = q[y] / kept[y] + weights[y] * entry[y]


@njit(nogil=True, cache=True)
def _direction(p, q, weights, c, law, kept, moments, matrix, step):
    """Newton's direction in log weights: a system with an M-matrix whose row sums are zero."""
    n = q.shape[0]
    for y in range(n):
        u_y = q[y] / weights[y]
        lost = q[y] / (kept[y] * kept[y]) * u_y / c
        total = 0.0
        for w in range(n):
            if w == y:
                continue
            u_w = q[w] / weights[w]
            d = 2.0 * weights[y] * weights[w] * (moments[w] if u_w > u_y else moments[y])
            if u_w < u_y / c:
                d += lost * weights[w]
            if u_w > c * u_y:
                d += weights[y] * (u_w / c) * q[w] / (kept[w] * kept[w])
            matrix[y, w] = -d
            total += d
        matrix[y, y] = total
        step[y] = p[y] - law[y]
    # Scaling all weights changes nothing, so one component is free: the last is 0. Elimination
    # needs no pivoting, and pivots are made of off-diagonal entries, all of one sign (Grassmann,
    # Taksar and Heyman 1985), so that no digit is lost however small some probabilities are.
    for k in range(n - 1):
        pivot = 0.0
        for w in range(k + 1, n):
            pivot -= matrix[k, w]
        if pivot <= 0.0:
            return False
        for y in range(k + 1, n):
            if matrix[y, k] != 0.0:
                f = matrix[y, k] / pivot
                for w in range(k + 1, n):
                    matrix[y, w] -= f * matrix[k, w]
                step[y] -= f * step[k]
        matrix[k, k] = pivot
    step[n - 1] = 0.0
    for k in range(n - 2, -1, -1):
        value = step[k]
        for w in range(k + 1, n):
            value -= matrix[k, w] * step[w]
        step[k] = value / matrix[k, k]
    return True


class Workspace:
    """One problem: arrays that both functions fill, kept between steps.

    p, q: (n,) laws; dead: draft mass on tokens that p does not have, which always moves; c: the
    knob; weights (n,): where the steps will start.
    """

    def __init__(self, p: Floats, q: Floats, dead: float, c: float, weights: Floats) -> None:
        n = p.shape[0]
        self.p, self.q, self.dead, self.c = p, q, float(dead), float(c)
        self.law = np.empty(n)
        self.entry = np.empty(n)
        """Integral of W / M**2 from u_y."""
        self.kept = np.empty(n)
        """M(u_y / c): one over the probability that a drafted y is kept."""
        self.moments = np.empty(n)
        """Integral of W v / M**3 from u_y."""
        self.order = np.argsort(q / weights)
        self.kinds = np.empty(2 * n, np.int8)
        self.tokens = np.empty(2 * n, np.int64)
        self.points = np.empty(2 * n)
        self.matrix = np.empty((n, n))
        self.step = np.empty(n)

    def error(self, weights: Floats) -> float:
        """L1 distance of p and the law that these weights achieve, which is left in `law`."""
        _achieved(
            *(self.q, self.dead, weights, self.c, self.law, self.entry, self.kept, self.moments),
            *(self.order, self.kinds, self.tokens, self.points),
        )
        return float(np.abs(self.law - self.p).sum())

    def direction(self, weights: Floats) -> Floats | None:
        """Newton's step in log weights, from those that `error` last saw; None if there is none."""
        found = _direction(
            *(self.p, self.q, weights, self.c, self.law, self.kept, self.moments),
            *(self.matrix, self.step),
        )
        return self.step if found else None
