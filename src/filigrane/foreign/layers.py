"""The law of weighted sums of layers of bits, when layers differ in size and bits are not fair.

Knows no tool; `stats.log_sf_weighted_bits` is the law of equal layers of fair bits.
"""

import math

import numpy as np
import numpy.typing as npt

from filigrane import stats

__all__ = ["log_sf_layers"]


def log_sf_layers(
    total: int, sizes: npt.NDArray[np.int64], weights: npt.NDArray[np.int64], share: float
) -> float:
    """log P(sum_l w_l Bin(n_l, share) >= total), independent; natural, exact up to rounding.

    sizes (m,) from 0; weights (m,) positive; share in (0, 1). The inversion formula of
    `stats.log_sf_weighted_bits` for layers of different sizes and a share other than one half;
    below the mean the complement of the mirrored sum.
    """
    sizes, weights = sizes[sizes > 0], weights[sizes > 0]
    # Steps of the lattice: with others the characteristic function has peaks away from zero.
    divisor = math.gcd(*weights.tolist()) or 1
    weights, total = weights // divisor, -(-total // divisor)
    top = int(sizes @ weights)
    if total <= 0:
        return 0.0
    if total > top:
        return -math.inf
    if total <= top * share:
        below = log_sf_layers(top - total + 1, sizes, weights, 1.0 - share)
        return stats.log1mexp(min(below, -1e-300))
    w, n = weights.astype(np.float64), sizes.astype(np.float64)
    if total == top:
        return float(n.sum()) * math.log(share)

    def tilted(theta: float) -> npt.NDArray[np.float64]:
        odds = math.log(share) - math.log1p(-share)
        chances: npt.NDArray[np.float64] = 1.0 / (1.0 + np.exp(-(odds + theta * w)))
        return chances

    low, high = 0.0, 1.0
    while float((n * w) @ tilted(high)) < total and high < 1e3:
        high *= 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float((n * w) @ tilted(middle)) < total else (low, middle)
    chances = tilted(low)
    deviation = math.sqrt(float((n * w * w) @ (chances * (1.0 - chances))))
    # A pole at zero: stay three deviations away from it.
    theta = max(low, 3.0 / max(deviation, 1.0))
    cumulant = float(n @ np.log1p(share * np.expm1(theta * w)))
    # What the periodicity adds is below exp(-theta nodes).
    least = max(float(top), (45.0 + theta * total - cumulant) / theta)
    nodes = 1 << max(4, math.ceil(math.log2(least)) + 1)
    # Further out the characteristic function is below rounding (it may not be for few bits, which
    # take all nodes).
    reach = nodes // 2 if nodes <= 1 << 18 else min(nodes // 2, int(2.0 * nodes / deviation) + 64)
    j = np.arange(reach + 1)
    z = theta + (2j * math.pi / nodes) * j
    exponent = np.zeros(j.shape[0], dtype=np.complex128)
    for size, weight in zip(n.tolist(), weights.tolist(), strict=True):
        if size:
            turn = np.exp(-2j * math.pi / nodes * ((j * weight) % nodes)).conj()
            factor = 1.0 - share + share * math.exp(theta * weight) * turn
            exponent += size * np.log(factor)
    at_tilt = float(exponent[0].real)
    phase = (2.0 * math.pi / nodes) * ((j * total) % nodes)
    values = (np.exp(exponent - at_tilt - 1j * phase) / -np.expm1(-z)).real
    values[(j != 0) & (2 * j != nodes)] *= 2.0
    return min(0.0, at_tilt - theta * total + math.log(float(values.sum()) / nodes))
