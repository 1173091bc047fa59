"""Counting lattice paths, compiled: the law of the two-sample Kolmogorov-Smirnov distance."""

import math

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def log_leaving(n, m, distance):
    """Log of the share of paths from (0, 0) to (n, m) that reach |i m - j n| >= distance.

    The last step into (i, j) of a random path comes from the left with probability i / (i + j). So
    the share of paths to (i, j) that have left the band is 1 outside of it, and inside the mean of
    the two before: sums of positive numbers only, and nothing is lost however small it gets.
    """
    if distance <= 0:
        return 0.0
    row = np.full(m + 1, -math.inf)
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i * m - j * n) >= distance:
                row[j] = 0.0
                continue
            left = row[j] + math.log(i / (i + j)) if i else -math.inf
            below = row[j - 1] + math.log(j / (i + j)) if j else -math.inf
            high, low = max(left, below), min(left, below)
            row[j] = high + math.log1p(math.exp(low - high)) if high > -math.inf else -math.inf
    return row[m]
