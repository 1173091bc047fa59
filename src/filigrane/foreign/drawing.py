"""From logits to a token, for writers: truncation, and draws that no key decides."""

import numpy as np
import numpy.typing as npt

from filigrane.embedding import Sampling, truncate
from filigrane.errors import LogitsError

Candidates = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Ids that may be drawn, (n,) int64 ascending, and their logits over temperature, (n,) float32."""


def candidates(logits: npt.NDArray[np.float32], sampling: Sampling) -> Candidates:
    """What temperature and truncation leave of one row of logits (V,).

    Greedy sampling leaves the largest logit alone. Raises LogitsError for NaN, +inf or nothing.
    """
    row = np.asarray(logits, dtype=np.float32)
    if row.ndim != 1 or not row.size or np.isnan(row).any() or not np.isfinite(row.max()):
        raise LogitsError("logits of one row must be (V,) numbers, at least one of them finite.")
    if sampling.greedy:
        best = np.array([int(np.argmax(row))])
        return best, row[best]
    kept = truncate(row, sampling)
    ids = np.flatnonzero(row > -np.inf) if kept is None else kept[row[kept] > -np.inf]
    return ids.astype(np.int64), (row[ids] / np.float32(sampling.temperature)).astype(np.float32)


def softmax(scaled: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Probabilities of scaled logits, (n,) float64."""
    weights = np.exp(scaled.astype(np.float64) - float(scaled.max()))
    probs: npt.NDArray[np.float64] = weights / weights.sum()
    return probs


def pick(
    ids: npt.NDArray[np.int64], scaled: npt.NDArray[np.float32], rng: np.random.Generator
) -> int:
    """One of the candidates, drawn from the law of their scaled logits: an id."""
    return int(ids[draw(softmax(scaled), rng)])


def draw(probs: npt.NDArray[np.float64], rng: np.random.Generator) -> int:
    """An index drawn from probabilities with private randomness."""
    edges = np.cumsum(probs)
    index = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return min(index, int(probs.shape[0]) - 1)
