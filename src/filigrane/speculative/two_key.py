"""Full acceptance with two independent keys: one for drafts, one for what the target writes itself.

SynthID-Text's fast variant (Dathathri et al. 2024, supplement I.5), also found in engines. The
detector does not know which key made a token: `detectors.detect_two_key` weighs both.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from filigrane.contexts import Corpus
from filigrane.detection import DetectionResult
from filigrane.keys import MarkingKey
from filigrane.speculative.base import Noise, Position, TokenMethod
from filigrane.speculative.coupled import marked_law
from filigrane.speculative.detectors import detect_two_key
from filigrane.speculative.laws import Law, draw
from filigrane.speculative.plain import accept, residual, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoKey(TokenMethod):
    """Drafts race under one key, residual and bonus under another; the coin is private.

    draft_share: the detector's guess at the share of tokens that were drafted, in [0, 1]. It has to
    be chosen without looking at the text that is tested.
    """

    name: ClassVar[str] = "two-key"
    reference: ClassVar[str] = "Dathathri et al. 2024, Nature 634:818, supplement I.5"
    streams: ClassVar[tuple[str, ...]] = ("/draft", "/target")
    full_acceptance: ClassVar[bool] = True

    draft_share: float = 0.5

    def _propose(self, q: Law, noise: Noise, rng: np.random.Generator) -> int:
        return draw(marked_law(self.scheme, q, noise.blocks[0]).probs, rng)

    def _coin(self, here: Position, rng: np.random.Generator) -> float:
        return rng.random()

    def decide(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.decide`."""
        p, q, token = here.target, here.q, here.tokens[0]
        assert q is not None
        if accept(p, q, token, self._coin(here, rng)):
            return token
        return sample(marked_law(self.scheme, residual(p, q), here.noise.blocks[1]), rng)

    def bonus(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.bonus`."""
        return sample(marked_law(self.scheme, here.target, here.noise.blocks[1]), rng)

    def detect(
        self, tokens: npt.ArrayLike | Corpus, key: MarkingKey, *, vocab_size: int | None = None
    ) -> DetectionResult:
        """See `detectors.detect_two_key`."""
        return detect_two_key(
            tokens, key, self.scheme, draft_share=self.draft_share, vocab_size=vocab_size
        )
