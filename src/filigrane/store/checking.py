"""What a version of a key has to pass before it marks: calibration here, a proof from each engine.

Both are tests with exact p-values, so a sound key fails either with a probability that is stated
here and negligible.
"""

import functools
import math
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from filigrane import stats
from filigrane.contexts import Corpus
from filigrane.custody.hierarchy import KeySpec
from filigrane.detection import detect
from filigrane.errors import StateError, TooShort
from filigrane.foreign import ForeignKey, Written
from filigrane.foreign import from_tag as profile_from_tag
from filigrane.keys import Key
from filigrane.schemes import from_tag

__all__ = ["CALIBRATION_TEXTS", "calibrate", "log_pvalue", "require_proof"]

CALIBRATION_TEXTS: Final = 64
_CALIBRATION_TOKENS: Final = 200
_CALIBRATION_ALPHA: Final = 1e-12
"""How often a sound key fails calibration, at most."""
_PROOF_ALPHA: Final = 1e-9
"""What an engine's proof has to reach under the new key."""
_OTHERS_ALPHA: Final = 1e-6
"""What it must not reach under any other one; a sound engine fails with this probability each."""
_PROOF_TOKENS: Final = 100_000


def log_pvalue(key: Key | ForeignKey, spec: KeySpec, *texts: npt.NDArray[np.int64]) -> float:
    """The natural log of the p-value of texts, (n,) ids each, as one claim; 0.0 if too short."""
    if isinstance(key, ForeignKey):
        assert spec.profile is not None
        profile = profile_from_tag(spec.profile)
        return profile.read([Written(tokens=text) for text in texts], key).log_pvalue
    assert spec.scheme is not None
    try:
        return detect(Corpus(texts), key, from_tag(spec.scheme)).log_pvalue
    except TooShort:
        return 0.0


def calibrate(key: Key | ForeignKey, spec: KeySpec) -> None:
    """Raise StateError if the key finds marks in texts that were made without it.

    64 fixed texts of 200 tokens: neither all of them as one claim nor the best of them, paid for by
    Bonferroni, may be less likely than 1e-12 together. Both p-values are exact over keys, so a
    sound key fails with at most this probability.
    """
    vocab_size = 2**15
    if spec.profile is not None:
        vocab_size = getattr(profile_from_tag(spec.profile), "vocab_size", vocab_size)
    texts = _null_texts(int(vocab_size))
    least = stats.bonferroni(min(log_pvalue(key, spec, text) for text in texts), len(texts))
    if min(least, log_pvalue(key, spec, *texts)) < math.log(_CALIBRATION_ALPHA / 2):
        raise StateError(
            "this key failed its calibration: it finds marks in texts that were made without it. "
            "Do not use it; destroy this version and rotate."
        )


def require_proof(
    key: Key | ForeignKey,
    spec: KeySpec,
    others: Iterable[tuple[Key | ForeignKey, KeySpec]],
    proof: npt.NDArray[np.int64],
) -> None:
    """Raise StateError unless a text that an engine wrote carries this key's mark and no other's.

    proof: (n,) ids, written by the engine under the key; some hundred tokens are enough.
    """
    if len(proof) > _PROOF_TOKENS:
        raise StateError(f"a proof has at most {_PROOF_TOKENS} tokens; some hundred are enough.")
    if log_pvalue(key, spec, proof) >= math.log(_PROOF_ALPHA):
        raise StateError(
            "the engine's proof does not carry the mark of this key: it has another key or another "
            "scheme, or the text is too short or too certain. Nothing was acknowledged."
        )
    for other, its in others:
        if log_pvalue(other, its, proof) < math.log(_OTHERS_ALPHA):
            raise StateError(
                f"the engine's proof also carries the mark of {other.name}: it marks with more "
                "than one key. Nothing was acknowledged."
            )


@functools.cache
def _null_texts(vocab_size: int) -> tuple[npt.NDArray[np.int64], ...]:
    rng = np.random.default_rng(20260802)
    ranks = np.arange(1, vocab_size + 1, dtype=np.float64)
    law = 1 / ranks
    law /= law.sum()
    return tuple(
        rng.choice(vocab_size, size=_CALIBRATION_TOKENS, p=law) for _ in range(CALIBRATION_TEXTS)
    )
