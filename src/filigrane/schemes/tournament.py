"""Tournament sampling (SynthID-Text): Dathathri et al. 2024, Nature 634, 818-823."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.errors import SchemeError
from filigrane.prf import FIELD, Words, field
from filigrane.schemes.base import (
    Candidates,
    Probs,
    Scheme,
    Statistic,
    all_ids,
    check_integer,
    private_uniform,
)

MAX_DEPTH: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tournament(Scheme):
    """A knock-out of `depth` rounds; round l prefers tokens whose l-th keyed bit is one.

    depth: rounds, 1 to 32 (each takes one bit of the token's keyed number). scoring:
    'weighted' (rounds count 10 to 1, as in SynthID-Text: early rounds see more entropy) or 'mean'.
    The two-candidate form, which is unbiased ("non-distortionary").
    """

    name: ClassVar[str] = "tournament"
    reference: ClassVar[str] = "Dathathri et al. 2024, Nature 634:818 (SynthID-Text)"
    unbiased: ClassVar[bool] = True
    acts_on: ClassVar[Literal["logits", "distribution"]] = "distribution"
    deterministic: ClassVar[bool] = False
    KIND: ClassVar[int] = 2

    depth: int = 30
    scoring: Literal["weighted", "mean"] = "weighted"

    def __post_init__(self) -> None:
        """Raise SchemeError for parameters outside their range."""
        Scheme.__post_init__(self)
        check_integer(self.name, "depth", self.depth, 1, MAX_DEPTH)
        if self.scoring not in ("weighted", "mean"):
            raise SchemeError(
                f"tournament: scoring must be 'weighted' or 'mean', got {self.scoring!r}."
            )

    @property
    def weights(self) -> tuple[int, ...]:
        """Weight of each round, first round first: linspace(10, 1, depth) times (depth - 1).

        Integers, so that the weighted sum lives on a lattice and its law is exact.
        """
        if self.scoring == "mean" or self.depth == 1:
            return (1,) * self.depth
        return tuple(10 * (self.depth - 1) - 9 * layer for layer in range(self.depth))

    def bits(self, block: Words, tokens: npt.ArrayLike) -> npt.NDArray[np.uint32]:
        """The keyed bits: block (..., 8), tokens (...) -> (..., depth), lowest bit first."""
        numbers = field(block[..., FIELD], tokens)
        layers = np.arange(self.depth, dtype=np.uint32)
        bits: npt.NDArray[np.uint32] = (numbers[..., None] >> layers) & np.uint32(1)
        return bits

    def reweight(self, probs: Probs, block: Words, ids: npt.ArrayLike | None = None) -> Probs:
        """p_w <- p_w (1 + g_l(w) - G_l), G_l = sum_w p_w g_l(w), for l = 1 .. depth."""
        bits = self.bits(block[..., None, :], all_ids(probs, ids))
        for layer in range(self.depth):
            g = bits[..., layer]
            probs = probs * (1.0 + g - (probs * g).sum(axis=-1, keepdims=True))
        return probs

    def score(self, block: Words, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Weighted number of ones among the token's bits, an integer."""
        ones: npt.NDArray[np.float64] = self.bits(block, tokens) @ np.asarray(self.weights, float)
        return ones

    def log_sf(self, total: float, n: int) -> float:
        """Upper tail of sum_l weight_l Binomial(n, 1/2), exact on its lattice."""
        if set(self.weights) == {1}:
            return stats.log_sf_binomial(round(total), n * self.depth, 0.5)
        return stats.log_sf_weighted_bits(round(total), n, self.weights)

    def draw(self, candidates: Candidates, block: Words, noise: Words, workspace: object) -> int:
        """See `Scheme.draw`."""
        from filigrane.kernels.draw import Workspace, tournament

        assert isinstance(workspace, Workspace)
        v = private_uniform(noise)
        scratch = (workspace.weights, workspace.words)
        return int(tournament(*candidates, *block[FIELD], self.depth, v, *scratch))

    @property
    def statistic(self) -> Statistic:
        """See `Scheme.statistic`: the weight of every value of each of the four bytes."""
        return Statistic(self.KIND, 0, _byte_table(self.weights))


@lru_cache(maxsize=64)
def _byte_table(weights: tuple[int, ...]) -> npt.NDArray[np.float64]:
    table = np.zeros((4, 256), dtype=np.float64)
    values = np.arange(256)
    for layer, weight in enumerate(weights):
        table[layer // 8] += weight * ((values >> (layer % 8)) & 1)
    table.flags.writeable = False
    return table.reshape(-1)
