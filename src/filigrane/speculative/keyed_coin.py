"""Full acceptance with a keyed coin: the detector can recompute the coin and guess the route."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from filigrane.contexts import Corpus
from filigrane.detection import DetectionResult
from filigrane.keys import MarkingKey
from filigrane.prf import COIN, open_uniform
from filigrane.speculative.base import Position
from filigrane.speculative.detectors import detect_keyed_coin
from filigrane.speculative.two_key import TwoKey


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedCoin(TwoKey):
    """Two keys and a third for the acceptance coin (He et al. 2026, Algorithm 1).

    threshold: coins up to this are read as "drafted" by the detector (their Ars-tau), in [0, 1]. It
    has to be chosen without looking at the text that is tested; the expected acceptance is good.
    """

    name: ClassVar[str] = "keyed-coin"
    reference: ClassVar[str] = "He et al. 2026, arXiv 2602.01428"
    streams: ClassVar[tuple[str, ...]] = ("/draft", "/target", "/coin")

    threshold: float = 0.7

    def _coin(self, here: Position, rng: np.random.Generator) -> float:
        return float(open_uniform(here.noise.blocks[2][COIN : COIN + 1])[0])

    def detect(
        self, tokens: npt.ArrayLike | Corpus, key: MarkingKey, *, vocab_size: int | None = None
    ) -> DetectionResult:
        """See `detectors.detect_keyed_coin`."""
        return detect_keyed_coin(
            tokens, key, self.scheme, threshold=self.threshold, vocab_size=vocab_size
        )
