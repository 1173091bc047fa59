"""Gumbel race (exponential minimum): Aaronson 2022; Kuditipudi et al. 2023 (arXiv 2307.15593)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.prf import FIELD, Words, field, open_uniform, upper_uniform
from filigrane.schemes.base import (
    NO_TABLE,
    Candidates,
    Probs,
    Scheme,
    Statistic,
    all_ids,
    one_hot,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gumbel(Scheme):
    """The token whose keyed exponential clock rings first, clocks running at rate p.

    Unbiased, and the strongest of the schemes here per token. Deterministic given key and context.
    """

    name: ClassVar[str] = "gumbel"
    reference: ClassVar[str] = "Aaronson 2022; Kuditipudi et al. 2023, arXiv 2307.15593"
    unbiased: ClassVar[bool] = True
    acts_on: ClassVar[Literal["logits", "distribution"]] = "distribution"
    deterministic: ClassVar[bool] = True
    KIND: ClassVar[int] = 0

    def reweight(self, probs: Probs, block: Words, ids: npt.ArrayLike | None = None) -> Probs:
        """One-hot at argmin_w E_w / p_w with E_w = -log(1 - x_w) ~ Exp(1)."""
        x = open_uniform(field(block[..., None, FIELD], all_ids(probs, ids)))
        with np.errstate(divide="ignore"):
            winner = np.argmax(np.log(probs) - np.log(-np.log1p(-x)), axis=-1)
        return one_hot(winner, probs.shape[-1])

    def score(self, block: Words, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """-log x_w, an Exp(1) variable without a mark; large when the clock rang early."""
        evidence: npt.NDArray[np.float64]
        evidence = -np.log(upper_uniform(field(block[..., FIELD], tokens)))
        return evidence

    def log_sf(self, total: float, n: int) -> float:
        """Upper tail of Gamma(n, 1); exact up to the 2**-32 lattice of x, never too small."""
        return stats.log_sf_gamma(total, n)

    def draw(self, candidates: Candidates, block: Words, noise: Words, workspace: object) -> int:
        """See `Scheme.draw`."""
        from filigrane.kernels.draw import race

        return int(race(*candidates, *block[FIELD]))

    @property
    def statistic(self) -> Statistic:
        """See `Scheme.statistic`."""
        return Statistic(self.KIND, 0, NO_TABLE)
