"""Weighted sums of scores, and their cumulants, compiled.

The twin in plain numpy is `radioactivity.weighted`: `reference_total` and `reference_cumulant`.
"""

import math

import numpy as np
from numba import njit, uint32

from filigrane.kernels.prf import mix
from filigrane.kernels.scan import GREEN, GUMBEL


@njit(nogil=True, cache=True)
def total(blocks, starts, tokens, weights, kind, threshold, table, mean):
    """Sum of weight times (score - mean): blocks (n, 8), the rest as in `evidence.Weighted`."""
    out = 0.0
    for i in range(blocks.shape[0]):
        s0, s1, s2, s3 = blocks[i, 0], blocks[i, 1], blocks[i, 2], blocks[i, 3]
        for e in range(starts[i], starts[i + 1]):
            number = mix(tokens[e], s0, s1, s2, s3)
            if kind == GREEN:
                score = 1.0 if number < threshold else 0.0
            elif kind == GUMBEL:
                score = -math.log((np.float64(number) + 1.0) * 2.0**-32)
            else:
                score = table[number & uint32(0xFF)]
                score += table[256 + ((number >> uint32(8)) & uint32(0xFF))]
                score += table[512 + ((number >> uint32(16)) & uint32(0xFF))]
                score += table[768 + (number >> uint32(24))]
            out += weights[e] * (score - mean)
    return out


@njit(nogil=True, cache=True)
def cumulants(theta, weights, kind, gamma, layers):
    """K, K' and K'' at theta of the sum of weight times (score - mean), scores independent.

    layers: (depth,) weights of the tournament's rounds; gamma: of the green list.
    """
    k0, k1, k2 = 0.0, 0.0, 0.0
    for e in range(weights.shape[0]):
        c = weights[e]
        t = theta * c
        if kind == GREEN:
            # Of both forms the one whose exponential cannot overflow.
            if t > 0.0:
                tail = math.exp(-t) * (1.0 - gamma)
                p = gamma / (gamma + tail)
                k0 += t * (1.0 - gamma) + math.log(gamma + tail)
            else:
                tail = math.exp(t) * gamma
                p = tail / (1.0 - gamma + tail)
                k0 += -t * gamma + math.log1p(math.expm1(t) * gamma)
            k1 += c * (p - gamma)
            k2 += c * c * p * (1.0 - p)
        elif kind == GUMBEL:
            rest = 1.0 - t
            k0 += -math.log1p(-t) - t
            k1 += c * t / rest
            k2 += c * c / (rest * rest)
        else:
            for layer in layers:
                half = 0.5 * layer * t
                a = abs(half)
                k0 += a + math.log1p(math.exp(-2.0 * a)) - math.log(2.0)
                slope = math.tanh(half)
                k1 += 0.5 * layer * c * slope
                k2 += (0.5 * layer * c) ** 2 * (1.0 - slope * slope)
    return k0, k1, k2
