"""Drawing the next tokens of marked texts from an engine's logits, on the processor.

The twin for graphics processors is `filigrane.adapters.fused`. Knows nothing of engines.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from filigrane import prf
from filigrane.embedding import Logits, Sampling, bias_logits, truncate
from filigrane.errors import LogitsError
from filigrane.schemes.base import Candidates
from filigrane.serving.texts import MarkedText

_NOT_DRAWABLE: Final = (
    "logits hold NaN or +inf, or nothing above -inf; no token can be drawn. "
    "Check the model's dtype and what masks its logits."
)
_NO_NOISE: Final = np.zeros(4, dtype=np.uint32)


class Drawer:
    """Scratch memory for one vocabulary, and the two things that are done with a row of logits."""

    __slots__ = ("_ids", "_workspace", "vocab_size")

    def __init__(self, vocab_size: int) -> None:
        from filigrane.kernels.draw import Workspace

        self.vocab_size = vocab_size
        self._ids = np.arange(vocab_size, dtype=np.uint32)
        self._workspace = Workspace(vocab_size)

    def bias(self, text: MarkedText, block: prf.Words, logits: Logits) -> None:
        """Add a green list's bias to one row, (V,) float32, in place, before temperature."""
        bias_logits(text.scheme, logits, self._ids[: logits.shape[0]], block, logits)

    def draw(
        self,
        text: MarkedText,
        block: prf.Words,
        logits: Logits,
        sampling: Sampling,
        position: int | None = None,
    ) -> int:
        """Draw a marked token of one row, (V,) float32, before temperature and truncation.

        position: of the token in its text, the next by default. Raises LogitsError for NaN, +inf or
        a row of -inf.
        """
        from filigrane.kernels.draw import drawable

        if not drawable(logits):
            raise LogitsError(_NOT_DRAWABLE)
        kept = truncate(logits, sampling)
        ids, pool = self._ids[: logits.shape[0]], logits
        if kept is not None:
            ids, pool = kept.astype(np.uint32), logits[kept]
        candidates = Candidates(pool, ids, 1.0 / sampling.temperature)
        # A one-hot law asks for no randomness: its words are not computed.
        noise = _NO_NOISE if text.scheme.deterministic else text.noise(position)
        index = text.scheme.draw(candidates, block, noise, self._workspace)
        if index < 0:
            raise LogitsError(_NOT_DRAWABLE)
        return int(ids[index])


def only(logits: npt.NDArray[np.float32], token: int) -> None:
    """Leave one token of a row, (V,) float32, in place: whatever draws next draws it."""
    logits.fill(-np.inf)
    logits[token] = 0.0
