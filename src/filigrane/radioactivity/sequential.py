"""Looking at the evidence as it comes in: e-values, which stay valid however often one looks.

Reject when log_e >= log(1 / alpha), at any time (Ville 1939); exp(-max log_e) is a p-value. Only
for answers, in the order in which they were gathered: there nothing that was asked or scored before
depends on the keyed number of a new (window, token). In reading mode earlier texts were shaped by
the very lists that later ones are scored with. E-values of independent keys multiply.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.errors import EvidenceError
from filigrane.keys import MarkingKey
from filigrane.radioactivity.evidence import Tuples
from filigrane.radioactivity.weighted import ScoreLaw
from filigrane.schemes.base import Scheme
from filigrane.schemes.greenlist import GreenList
from filigrane.schemes.gumbel import Gumbel

_TILTS: Final = 2.0 ** np.arange(-12.0, 1.0)


def log_e_value(total: float, n: int, scheme: Scheme) -> float:
    """Logarithm of the e-value of n scores that add up to total; natural logarithm.

    greenlist: the likelihood ratio of a green share p against gamma, mean over p uniform on
    (gamma, 1). gumbel: of rate lambda against 1, mean over lambda uniform on (0, 1). tournament:
    mean over thirteen tilts of the exact exponential martingale. Raises SchemeError for others.
    """
    law = ScoreLaw.of(scheme)
    if n == 0:
        return 0.0
    if isinstance(scheme, GreenList):
        s, gamma = round(total), law.gamma
        beta = math.lgamma(s + 1) + math.lgamma(n - s + 1) - math.lgamma(n + 2)
        # P(Beta(s + 1, n - s + 1) > gamma) = P(Binomial(n + 1, gamma) <= s).
        above = stats.log1mexp(stats.log_sf_binomial(s + 1, n + 1, gamma))
        null = s * math.log(gamma) + (n - s) * math.log1p(-gamma)
        return beta + above - math.log1p(-gamma) - null
    if isinstance(scheme, Gumbel):
        # e^S int_0^1 lambda^n e^(-lambda S) = e^S n! S^-(n+1) P(Gamma(n + 1) <= S).
        below = stats.log1mexp(stats.log_sf_gamma(total, n + 1))
        return total + math.lgamma(n + 1) - (n + 1) * math.log(total) + below
    tilts, cumulants = _tilted(law)
    logs = tilts * (total - n * law.mean) - n * cumulants
    return stats.logsumexp(logs) - math.log(logs.shape[0])


def _tilted(law: ScoreLaw) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The tilts of the mixture for a tournament, and the cumulant function there."""
    tilts: npt.NDArray[np.float64] = _TILTS / float(np.abs(law.layers).max())
    half = 0.5 * tilts[:, None] * law.layers
    cumulants: npt.NDArray[np.float64] = np.log(np.cosh(half)).sum(axis=1)
    return tilts, cumulants


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EProcess:
    """An e-process over growing evidence: log_e after each of `at` scores, both (looks,)."""

    at: npt.NDArray[np.int64]
    log_e: npt.NDArray[np.float64]

    @property
    def log_pvalue(self) -> float:
        """-max log_e, at most 0: valid at every look and after all of them."""
        return min(0.0, -float(self.log_e.max(initial=0.0)))

    def decided(self, alpha: float) -> int | None:
        """The number of scores after which e first reached 1 / alpha, or None."""
        reached = np.flatnonzero(self.log_e >= -math.log(alpha))
        return int(self.at[reached[0]]) if reached.size else None


def follow(evidence: Tuples, key: MarkingKey, scheme: Scheme, *, looks: int = 100) -> EProcess:
    """The e-process of a count test, at `looks` equally spaced numbers of scores.

    The e-values of a key's slots are averaged, which is valid under any dependence. Raises
    EvidenceError for evidence of reading, another window width or looks < 1.
    """
    from filigrane.kernels.prf import blocks

    if not evidence.name.startswith("answer"):
        raise EvidenceError(
            f"e-values are for answers, not for the {evidence.name} of a reading, whose order "
            "depends on the key; test it once, when all of it is there."
        )
    if evidence.width != scheme.context_width or looks < 1:
        raise EvidenceError(
            f"windows of {evidence.width} tokens for a scheme of {scheme.context_width}, and "
            f"{looks} looks: gather evidence of the scheme's width, and look at least once."
        )
    n = len(evidence)
    at = np.unique(np.linspace(1, n, min(looks, n)).astype(np.int64))
    windows = np.ascontiguousarray(evidence.rows[:, :-1])
    tokens = evidence.rows[:, -1]
    logs = []
    for words in key.prf_keys(scheme.label):
        keys = np.broadcast_to(np.asarray(words), (n, 8))
        sums = np.cumsum(scheme.score(blocks(keys, windows), tokens))
        logs.append([log_e_value(float(sums[m - 1]), int(m), scheme) for m in at])
    slots = np.asarray(logs)
    mean = np.array([stats.logsumexp(column) for column in slots.T]) - math.log(slots.shape[0])
    return EProcess(at=at, log_e=mean)
