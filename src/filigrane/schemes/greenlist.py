"""Green list: Kirchenbauer et al. 2023 (arXiv 2301.10226), with a list by hash per token."""

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.errors import SchemeError
from filigrane.prf import FIELD, Words, field
from filigrane.schemes.base import (
    NO_TABLE,
    Candidates,
    Probs,
    Scheme,
    Statistic,
    all_ids,
    check_number,
)

MAX_DELTA: Final = 1000.0
"""More nats than any logits differ by, and far from where float32 ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreenList(Scheme):
    """Adds delta to the logits of the green tokens; each token is green with probability gamma.

    gamma: share of green tokens, in (0, 1); delta: bias in nats, > 0. Biased (the text's law
    changes), but it is the one scheme that also marks greedy and beam search. Whether a token is
    green is decided token by token, not by cutting a permutation at gamma * V: the vocabulary size
    never matters, and the count is exactly binomial.
    """

    name: ClassVar[str] = "greenlist"
    reference: ClassVar[str] = "Kirchenbauer et al. 2023, arXiv 2301.10226"
    unbiased: ClassVar[bool] = False
    acts_on: ClassVar[Literal["logits", "distribution"]] = "logits"
    deterministic: ClassVar[bool] = False
    KIND: ClassVar[int] = 1

    gamma: float = 0.25
    delta: float = 2.0

    def __post_init__(self) -> None:
        """Raise SchemeError for parameters outside their range."""
        # Not super(): dataclass(slots=True) makes a new class, which zero-argument super() misses.
        Scheme.__post_init__(self)
        check_number(self.name, "gamma", self.gamma, 0.0, 1.0)
        check_number(self.name, "delta", self.delta, 0.0, MAX_DELTA)
        object.__setattr__(self, "delta", float(self.delta))  # 3 and 3.0: one scheme, one tag
        if not 0 < self.threshold < 2**32:
            raise SchemeError(f"greenlist: gamma={self.gamma} leaves no token or no red token.")

    @property
    def threshold(self) -> int:
        """A token is green iff its keyed number is below this; gamma rounded down to 2**-32."""
        return int(self.gamma * 2**32)

    def is_green(self, block: Words, tokens: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Membership: block (..., 8), tokens (...) -> (...) bool."""
        green: npt.NDArray[np.bool_] = field(block[..., FIELD], tokens) < np.uint32(self.threshold)
        return green

    def reweight(self, probs: Probs, block: Words, ids: npt.ArrayLike | None = None) -> Probs:
        """Tilt: p_w * exp(delta [w green]), renormalised; what the bias does at temperature 1."""
        green = self.is_green(block[..., None, :], all_ids(probs, ids))
        tilted = np.where(green, probs * math.exp(self.delta), probs)
        marked: Probs = tilted / tilted.sum(axis=-1, keepdims=True)
        return marked

    def score(self, block: Words, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """1 for a green token, else 0."""
        return self.is_green(block, tokens).astype(np.float64)

    def log_sf(self, total: float, n: int) -> float:
        """P(Binomial(n, gamma) >= total), exact, with gamma as `threshold` rounds it."""
        return stats.log_sf_binomial(round(total), n, self.threshold / 2**32)

    def draw(self, candidates: Candidates, block: Words, noise: Words, workspace: object) -> int:
        """See `Scheme.draw`; the caller has biased the logits, what is left is a private race."""
        from filigrane.kernels.draw import race

        return int(race(*candidates, *noise))

    @property
    def statistic(self) -> Statistic:
        """See `Scheme.statistic`."""
        return Statistic(self.KIND, self.threshold, NO_TABLE)
