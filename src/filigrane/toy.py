"""A language model of a few lines, for documentation and tests: no framework, no download.

It writes ids, not language. Nothing here is meant for production.
"""

from collections.abc import Sequence

import numpy as np

from filigrane.contexts import TokenIds
from filigrane.embedding import LanguageModel, Logits


class ZipfModel(LanguageModel):
    """Next-token law: a Zipf curve over a vocabulary shuffled by the previous token.

    vocab_size: V; exponent: steepness (1.0 gives about 6 nats at V = 1000, 2.0 about 1.6).
    """

    def __init__(self, vocab_size: int = 1000, exponent: float = 1.5) -> None:
        ranks = np.arange(1, vocab_size + 1, dtype=np.float64)
        self._curve = (-exponent * np.log(ranks)).astype(np.float32)
        self.vocab_size = vocab_size

    def _row(self, previous: int) -> Logits:
        order = np.random.default_rng(previous).permutation(self.vocab_size)
        return self._curve[order]

    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Logits, None]:
        """See `LanguageModel.prefill`."""
        last = [int(prompt[-1]) if prompt.size else 0 for prompt in prompts]
        return np.stack([self._row(token) for token in last]), None

    def step(self, tokens: TokenIds, state: None) -> tuple[Logits, None]:
        """See `LanguageModel.step`."""
        return np.stack([self._row(int(token)) for token in tokens]), None
