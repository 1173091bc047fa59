"""Texts without a mark that readers find hard, and what their p-values have to be."""

import numpy as np

from filigrane import stats
from filigrane.foreign import Profile, Written
from foreignkit import random_keys

HARD_TEXTS = (
    [7] * 300,
    [0] * 300,
    list(range(12)) * 25,
    [11, 12] * 150,
    [token for i in range(150) for token in (5, i % 40)],
    [token for i in range(100) for token in (0, 0, i)],
)
"""Texts that repeat: constant, periodic, pairs."""


def log_valid(profile: Profile, text: Written, count: int = 240) -> float:
    """Log p-value that other keys' p-values are too small: binomial at six thresholds, corrected.

    One-sided, for texts whose few different numbers make p take steps.
    """
    ps = np.array([profile.read(text, key).pvalue for key in random_keys(profile, count)])
    levels = (0.5, 0.2, 0.1, 0.03, 0.01, 1e-3)
    tails = [stats.log_sf_binomial(int((ps <= level).sum()), count, level) for level in levels]
    return min(0.0, min(tails) + float(np.log(len(levels))))
