"""The mark at full acceptance, first published way: mark what is drafted, judge as if unmarked."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from filigrane.speculative.base import Position
from filigrane.speculative.coupled import Coupled
from filigrane.speculative.plain import speculate


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficient(Coupled):
    """Maintain sampling efficiency (Hu and Huang 2024): what replaces a draft is not marked."""

    name: ClassVar[str] = "mse"
    reference: ClassVar[str] = "Hu and Huang 2024, arXiv 2410.20418"
    full_strength: ClassVar[bool] = False
    full_acceptance: ClassVar[bool] = True

    def decide(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.decide`: test and residual know the unmarked laws only."""
        assert here.q is not None
        return speculate(here.target, here.q, here.tokens[0], rng)
