"""Next-token laws on their supports, and the few ways in which one draws from them.

This module knows nothing of keys, contexts or methods. After top-k a law lives on some fifty tokens
of a vocabulary of a hundred thousand, so a law here is a list of ids with their probabilities.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from filigrane.embedding import Logits, Sampling, truncate
from filigrane.errors import LogitsError
from filigrane.prf import FIELD, Words, open_uniform

Ids = npt.NDArray[np.uint32]
Array = npt.NDArray[np.float64]


class Law(NamedTuple):
    """A next-token law: ids (s,) uint32, ascending; probs (s,) float64, summing to one."""

    ids: Ids
    probs: Array

    def probability(self, token: int) -> float:
        """The probability of a token, 0.0 outside the support."""
        at = int(np.searchsorted(self.ids, np.uint32(token)))
        inside = at < self.ids.shape[0] and int(self.ids[at]) == token
        return float(self.probs[at]) if inside else 0.0


def certain(token: int) -> Law:
    """The law of a token that is not in question."""
    return Law(np.array([token], dtype=np.uint32), np.ones(1))


@lru_cache(maxsize=8)
def _all_ids(vocab_size: int) -> Ids:
    ids = np.arange(vocab_size, dtype=np.uint32)
    ids.flags.writeable = False
    return ids


def law_of(logits: Logits, sampling: Sampling) -> Law:
    """The law that is sampled from: raw logits (V,) through temperature, top-k and top-p.

    Raises LogitsError for NaN, +inf or nothing above -inf.
    """
    from filigrane.kernels.draw import drawable

    if not drawable(logits):
        raise LogitsError(
            "logits hold NaN or +inf, or nothing above -inf; no token can be drawn. Check the "
            "model's dtype (float16 overflows) and your logit masks."
        )
    if sampling.temperature == 0.0:
        return certain(int(np.argmax(logits)))
    kept = truncate(logits, sampling)
    ids = _all_ids(logits.shape[0]) if kept is None else kept.astype(np.uint32)
    pool = logits.astype(np.float64) if kept is None else logits[kept].astype(np.float64)
    # The maximum is taken out before the division: a small temperature must not overflow.
    weights = np.exp((pool - pool.max()) / sampling.temperature)
    return Law(ids, weights / weights.sum())


def aligned(p: Law, q: Law) -> tuple[Ids, Array, Array]:
    """Two laws over the union of their supports: ids (n,), p (n,), q (n,)."""
    if p.ids is q.ids:
        return p.ids, p.probs, q.probs
    ids = np.union1d(p.ids, q.ids)
    wide = np.zeros((2, ids.shape[0]))
    wide[0, np.searchsorted(ids, p.ids)] = p.probs
    wide[1, np.searchsorted(ids, q.ids)] = q.probs
    return ids, wide[0], wide[1]


def index_of(ids: Ids, token: int) -> int:
    """Where a token stands among ascending ids; it has to be there."""
    return int(np.searchsorted(ids, np.uint32(token)))


def clocks(block: Words, ids: Ids) -> Array:
    """The keyed exponential clocks E of some tokens: block (8,), ids (n,) -> (n,) float64, Exp(1).

    E = -log(1 - x) with the x of `schemes.gumbel`: an early clock is a large score.
    """
    from filigrane.kernels.prf import field_row

    numbers = np.empty(ids.shape[0], dtype=np.uint32)
    field_row(*block[FIELD], ids, numbers)
    return -np.log1p(-open_uniform(numbers))


def race(clocks: Array, rates: Array) -> int:
    """Index of the clock that rings first: argmin of E / rate, where a rate of 0 never rings."""
    with np.errstate(divide="ignore", over="ignore"):
        return int(np.argmin(clocks / rates))


def excess(p: Array, q: Array) -> Array:
    """The residual law (P - Q)+ / TV of aligned laws; P itself where the two are equal."""
    rest = np.maximum(p - q, 0.0)
    total = rest.sum()
    return rest / total if total > 0.0 else p


def draw(probs: Array, rng: np.random.Generator) -> int:
    """An index drawn privately: probs (n,), summing to about one."""
    cumulative = np.cumsum(probs)
    at = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    # Rounding can leave the target a hair above the last sum, or on a token of probability zero.
    return at if at < probs.shape[0] and probs[at] > 0.0 else int(np.flatnonzero(probs)[-1])
