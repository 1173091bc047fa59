"""Unbiased reweights: delta (inverse CDF) and gamma, Hu et al. 2023 (arXiv 2310.10669).

Both walk through the vocabulary in a keyed order: tokens by their keyed number, which is a strict
order because the field is a bijection. The published detectors need the model's probabilities; the
U scores here need the key only (for delta this is the alignment idea of Kuditipudi et al. 2023).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.prf import COIN, FIELD, Words, field, open_uniform
from filigrane.schemes.base import (
    NO_TABLE,
    Candidates,
    Probs,
    Scheme,
    Statistic,
    all_ids,
    one_hot,
    private_uniform,
)


def _in_keyed_order(
    probs: Probs, block: Words, ids: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Order of the tokens by keyed number and the cumulative probabilities in that order."""
    order = np.argsort(field(block[..., None, FIELD], all_ids(probs, ids)), axis=-1)
    return order, np.cumsum(np.take_along_axis(probs, order, axis=-1), axis=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaReweight(Scheme):
    """Inverse CDF: the token at the keyed uniform number, in the keyed order."""

    name: ClassVar[str] = "delta"
    reference: ClassVar[str] = (
        "Hu et al. 2023, arXiv 2310.10669; Kuditipudi et al. 2023, 2307.15593"
    )
    unbiased: ClassVar[bool] = True
    acts_on: ClassVar[Literal["logits", "distribution"]] = "distribution"
    deterministic: ClassVar[bool] = True
    KIND: ClassVar[int] = 4

    def reweight(self, probs: Probs, block: Words, ids: npt.ArrayLike | None = None) -> Probs:
        """One-hot at the first token, in keyed order, whose cumulative probability exceeds U."""
        order, cumulative = _in_keyed_order(probs, block, ids)
        target = open_uniform(block[..., COIN])[..., None] * cumulative[..., -1:]
        rank = np.argmax(cumulative > target, axis=-1)[..., None]
        return one_hot(np.take_along_axis(order, rank, axis=-1)[..., 0], probs.shape[-1])

    def score(self, block: Words, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """U score: the chance that token number and coin would lie further apart than they do.

        For two independent uniforms on {0..N-1}, N = 2**32, and distance d that chance is
        (N - d)(N - d - 1) / N**2. It is never above a true uniform in law, so the p-value is never
        too small.
        """
        distance = np.abs(field(block[..., FIELD], tokens).astype(np.float64) - block[..., COIN])
        rest = 2.0**32 - distance
        return rest * (rest - 1.0) * 2.0**-64

    def log_sf(self, total: float, n: int) -> float:
        """Upper tail of a sum of n uniforms (Irwin-Hall)."""
        return stats.log_sf_irwin_hall(total, n)

    def draw(self, candidates: Candidates, block: Words, noise: Words, workspace: object) -> int:
        """See `Scheme.draw`."""
        from filigrane.kernels.draw import Workspace, quantile

        assert isinstance(workspace, Workspace)
        v = float(open_uniform(block[COIN : COIN + 1])[0])
        return int(quantile(*candidates, *block[FIELD], v, workspace.weights, workspace.words))

    @property
    def statistic(self) -> Statistic:
        """See `Scheme.statistic`."""
        return Statistic(self.KIND, 0, NO_TABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GammaReweight(Scheme):
    """The half of the probability that comes last in keyed order counts double, the rest zero."""

    name: ClassVar[str] = "gamma"
    reference: ClassVar[str] = "Hu et al. 2023, arXiv 2310.10669"
    unbiased: ClassVar[bool] = True
    acts_on: ClassVar[Literal["logits", "distribution"]] = "distribution"
    deterministic: ClassVar[bool] = False
    KIND: ClassVar[int] = 3

    def reweight(self, probs: Probs, block: Words, ids: npt.ArrayLike | None = None) -> Probs:
        """S(F_i) - S(F_(i-1)) with S(s) = max(2s - 1, 0), F cumulative in keyed order."""
        order, cumulative = _in_keyed_order(probs, block, ids)
        upper = np.maximum(2.0 * cumulative / cumulative[..., -1:] - 1.0, 0.0)
        marked = np.empty_like(probs)
        np.put_along_axis(marked, order, np.diff(upper, axis=-1, prepend=0.0), axis=-1)
        return marked

    def score(self, block: Words, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """U score: the token's keyed number r / 2**32, its place in the keyed order."""
        return field(block[..., FIELD], tokens).astype(np.float64) * 2.0**-32

    def log_sf(self, total: float, n: int) -> float:
        """Upper tail of a sum of n uniforms (Irwin-Hall); r / 2**32 is never above one in law."""
        return stats.log_sf_irwin_hall(total, n)

    def draw(self, candidates: Candidates, block: Words, noise: Words, workspace: object) -> int:
        """See `Scheme.draw`: drawing from the doubled half is a private quantile in (1/2, 1)."""
        from filigrane.kernels.draw import Workspace, quantile

        assert isinstance(workspace, Workspace)
        v = 0.5 + 0.5 * private_uniform(noise)
        return int(quantile(*candidates, *block[FIELD], v, workspace.weights, workspace.words))

    @property
    def statistic(self) -> Statistic:
        """See `Scheme.statistic`."""
        return Statistic(self.KIND, 0, NO_TABLE)
