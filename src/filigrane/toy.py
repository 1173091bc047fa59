"""A language model of a few lines, for documentation and tests: no framework, no download.

It writes ids, not language. Nothing here is meant for production.
"""

import numpy as np
import numpy.typing as npt

from filigrane.contexts import TokenIds
from filigrane.embedding import Logits
from filigrane.speculative.models import BlockModel, Mask


class ZipfModel(BlockModel):
    """Next-token law: a Zipf curve over a vocabulary shuffled by the previous token.

    vocab_size: V; exponent: steepness (1.0 gives about 6 nats at V = 1000, 2.0 about 1.6). Models
    of one vocabulary size and different exponents are a target and its draft.
    """

    def __init__(self, vocab_size: int = 1000, exponent: float = 1.5) -> None:
        ranks = np.arange(1, vocab_size + 1, dtype=np.float64)
        self._curve = (-exponent * np.log(ranks)).astype(np.float32)
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        """See `BlockModel.vocab_size`."""
        return self._vocab_size

    def _row(self, previous: int) -> Logits:
        order = np.random.default_rng(previous).permutation(self._vocab_size)
        return self._curve[order]

    def open(self, rows: int) -> None:
        """See `BlockModel.open`: a law of one token back needs no state."""

    def read(
        self,
        state: None,
        tokens: TokenIds,
        valid: Mask,
        *,
        last: int,
        parents: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """See `BlockModel.read`."""
        recent = tokens[:, tokens.shape[1] - last :]
        return np.stack([[self._row(int(token)) for token in row] for row in recent])

    def keep(self, state: None, kept: Mask) -> None:
        """See `BlockModel.keep`."""

    def select(self, state: None, rows: npt.NDArray[np.int64]) -> None:
        """See `BlockModel.select`."""
