"""The strength of a method without the luck of the draw: real positions, replayed under much noise.

A text shows each position under one key. Here the two laws of a position are taken from real models
and text, and a method decides there again and again under fresh noise, through the same code that
writes texts. Knows nothing of keys; noise comes from a generator.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from filigrane.contexts import as_token_ids
from filigrane.embedding import Sampling
from filigrane.errors import SchemeError, TokenError
from filigrane.prf import BLOCK_WORDS, FIELD, field, open_uniform
from filigrane.speculative.base import Method, Noise, Position, TokenMethod
from filigrane.speculative.laws import Law, law_of
from filigrane.speculative.models import BlockModel

Pair = tuple[Law, Law]
"""The laws of target and draft at one position."""


class Replayed(NamedTuple):
    """mean_u, mean_a: expected scores 1 - x and -log x of a token's keyed number; acceptance: how
    often the draft was kept; overlap: mean of sum min(P, Q), what plain speculation would keep.
    """

    mean_u: float
    mean_a: float
    acceptance: float
    overlap: float


def laws_along(
    model: BlockModel, prompt: npt.ArrayLike, tokens: npt.ArrayLike, sampling: Sampling
) -> list[Law]:
    """A model's law at every position of a text, read in one go: one per token.

    Raises TokenError for an empty prompt: there is no law before the first token.
    """
    before, text = as_token_ids(prompt), as_token_ids(tokens)
    if not before.size:
        raise TokenError("the prompt is empty; begin with the model's start token (BOS).")
    if not text.size:
        return []
    ids = np.concatenate([before, text[:-1]])[None]
    state = model.open(1)
    logits = model.read(state, ids, np.ones(ids.shape, dtype=np.bool_), last=text.shape[0])
    return [law_of(row, sampling) for row in logits[0]]


def replay(
    pairs: Sequence[Pair],
    method: Method,
    *,
    rng: np.random.Generator,
    fields: int = 100,
    report: Callable[[int], None] = lambda done: None,
) -> Replayed:
    """Decide every position under `fields` fresh fields: what a marked, drafted position is worth.

    pairs: laws of target and draft; method: of one key and token-level, on the gumbel scheme, or
    without drafts; report: told how many positions are done. Raises SchemeError for others: the
    score of a token is not defined there, or depends on more than one position.
    """
    if not isinstance(method, TokenMethod) or not method.one_key or method.scheme.name != "gumbel":
        raise SchemeError(f"{method.tag} cannot be replayed position by position.")
    u = a = kept = overlap = 0.0
    for done, (p, q) in enumerate(pairs):
        report(done)
        at = np.minimum(np.searchsorted(q.ids, p.ids), q.ids.shape[0] - 1)
        overlap += float(np.minimum(p.probs, np.where(q.ids[at] == p.ids, q.probs[at], 0.0)).sum())
        blocks = rng.integers(0, 2**32, size=(fields, 1, BLOCK_WORDS), dtype=np.uint32)
        tokens = np.empty(fields, dtype=np.int64)
        for number, block in enumerate(blocks):
            noise = Noise(block, True)
            here = Position(noise, p=p)
            if method.drafted:
                here.q = q
                here.tokens = [token for token, _ in method.propose(q, noise, rng)]
                tokens[number] = method.decide(here, rng)
                kept += int(tokens[number]) in here.tokens
            else:
                tokens[number] = method.bonus(here, rng)
        x = open_uniform(field(blocks[:, 0, FIELD], tokens))
        u += float((1.0 - x).sum())
        a += float(-np.log(x).sum())
    n = max(1, len(pairs) * fields)
    return Replayed(u / n, a / n, kept / n, overlap / max(1, len(pairs)))
