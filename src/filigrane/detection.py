"""Testing a text for one key's mark, with an exact p-value.

This module knows nothing of models: it needs token ids, a key and a scheme. What the p-value
claims: if text and key are independent, a value this small comes up with at most this probability
over the choice of the key, whatever the text (SECURITY.md says what that does not prove).
"""

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import Corpus, Evidence, collect
from filigrane.errors import FiligraneError
from filigrane.keys import MarkingKey
from filigrane.schemes.base import Scheme, require_scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionResult:
    """What a test found; a value to print, keep and dispute. It has no truth value: compare
    `log_pvalue` with your own alpha.

    statistic: summed score of the best slot; log_pvalue: natural log, corrected for the slots that
    were tried; n_scored, n_tokens, n_repeated: positions scored, tokens given, positions dropped
    because their window had occurred before; scheme: tag; key: name; slot: best slot;
    slot_log_pvalues: uncorrected, one per slot; method: how the tail was computed.
    """

    statistic: float
    log_pvalue: float
    n_scored: int
    n_tokens: int
    n_repeated: int
    scheme: str
    key: str
    slot: int
    slot_log_pvalues: tuple[float, ...]
    method: str

    @property
    def pvalue(self) -> float:
        """exp(log_pvalue); underflows to 0.0 below about 1e-308, log_pvalue does not."""
        return math.exp(self.log_pvalue)

    @property
    def log10_pvalue(self) -> float:
        """log_pvalue in decimal digits."""
        return self.log_pvalue / math.log(10)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a DetectionResult is not true or false; "
            "compare result.log_pvalue with math.log(alpha)."
        )


def scanned(evidence: Evidence, scheme: Scheme) -> tuple[Any, ...]:
    """What every function of `kernels.scan` takes between the keys and its output: ids, positions,
    width, and the scheme's statistic.
    """
    kind, threshold, table = scheme.statistic
    return (
        evidence.ids,
        evidence.positions,
        evidence.width,
        kind,
        np.uint32(threshold),
        table,
    )


def totals(evidence: Evidence, keys: npt.NDArray[np.uint32], scheme: Scheme) -> list[float]:
    """Summed score of the evidence under each key: keys (k, 8) uint32 -> k floats."""
    from filigrane.kernels.scan import over_positions

    out = np.empty(keys.shape[0])
    # Numba knows ndarray by heart and has to look up what a subclass is, each time anew.
    over_positions(keys.view(np.ndarray), *scanned(evidence, scheme), out)
    sums: list[float] = out.tolist()
    return sums


def detect(
    tokens: npt.ArrayLike | Corpus,
    key: MarkingKey,
    scheme: Scheme,
    *,
    vocab_size: int | None = None,
) -> DetectionResult:
    """Was this text written under this key?

    tokens: (n,) ids of one text without its prompt, or a Corpus of texts to test as one claim;
    vocab_size: refuse ids at or above it. Every slot of the key is tested and paid for (Sidak:
    slots are independent keys). Raises TooShort, TokenError or
    VocabularyMismatch, and FiligraneError for what is not a key or a scheme.
    """
    require_scheme(scheme)
    if not isinstance(key, MarkingKey):
        raise FiligraneError(
            f"detect tests one key: pass a Key or key.user(i), not {type(key).__name__}; "
            "for many keys there is trace."
        )
    evidence = collect(tokens, scheme.context_width, vocab_size=vocab_size)
    sums = totals(evidence, key.prf_keys(scheme.label), scheme)
    logs = tuple(scheme.log_sf(total, evidence.n_scored) for total in sums)
    best = int(np.argmin(logs))
    return DetectionResult(
        statistic=sums[best],
        log_pvalue=stats.sidak(logs[best], len(logs)),
        n_scored=evidence.n_scored,
        n_tokens=evidence.n_tokens,
        n_repeated=evidence.n_repeated,
        scheme=scheme.tag,
        key=key.name,
        slot=best,
        slot_log_pvalues=logs,
        method=f"exact tail, Sidak over {len(logs)} slots" if len(logs) > 1 else "exact tail",
    )
