"""The baseline without a watermark: does the suspect know the logged texts better than fresh ones?

Knows nothing of keys or models: losses come in. Membership by loss, calibrated with zlib (Carlini
et al. 2021, arXiv 2012.07805), and a two-sample test over all pieces (Sander et al. 2024, section
5.1). Needs the suspect's losses and the very texts: open and supervised only.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.errors import EvidenceError

PIECE = 256
"""Tokens of a piece, as published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineResult:
    """Two samples of calibrated losses. It has no truth value: compare `log_pvalue`.

    log_pvalue: natural log, exact two-sample Kolmogorov-Smirnov, two-sided; distance; n_logged,
    n_fresh: pieces; median_logged, median_fresh: of loss over compressed size, in nats per byte: a
    suspect that knows the logs has the smaller one there.
    """

    log_pvalue: float
    distance: float
    n_logged: int
    n_fresh: int
    median_logged: float
    median_fresh: float
    method: str = "two-sample Kolmogorov-Smirnov, exact"
    hypothesis: str = "Logged and fresh texts have one law of loss over compressed size."

    def __bool__(self) -> NoReturn:
        raise TypeError("a BaselineResult is not true or false; compare result.log_pvalue.")


def calibrated(losses: Sequence[float], texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Loss of each piece, in nats summed over its tokens, by bytes of its text under zlib."""
    if len(losses) != len(texts):
        raise EvidenceError(f"{len(losses)} losses for {len(texts)} texts; pass one each.")
    sizes = np.array([len(zlib.compress(text.encode("utf-8"), 9)) for text in texts], dtype=float)
    ratios: npt.NDArray[np.float64] = np.asarray(losses, dtype=np.float64) / sizes
    return ratios


def baseline(logged: npt.ArrayLike, fresh: npt.ArrayLike) -> BaselineResult:
    """Compare calibrated losses of logged texts with those of fresh texts of the same model.

    logged: (n,), fresh: (m,) of `calibrated`, from texts of the same kind (same prompts' law, same
    length): whatever else differs between them is found too. Raises EvidenceError for samples that
    are empty or not finite.
    """
    one = np.asarray(logged, dtype=np.float64).reshape(-1)
    two = np.asarray(fresh, dtype=np.float64).reshape(-1)
    try:
        distance, log_pvalue = stats.kolmogorov_smirnov(one, two)
    except ValueError as error:
        raise EvidenceError(f"the baseline needs two samples of losses: {error}.") from error
    return BaselineResult(
        log_pvalue=log_pvalue,
        distance=distance,
        n_logged=one.size,
        n_fresh=two.size,
        median_logged=float(np.median(one)),
        median_fresh=float(np.median(two)),
    )
