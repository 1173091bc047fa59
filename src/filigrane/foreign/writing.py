"""Writing with a foreign mark, one text at a time: for round trips and tests, not for serving."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from filigrane.contexts import TokenIds, as_token_ids
from filigrane.embedding import LanguageModel, Sampling
from filigrane.errors import ModelError, SchemeError
from filigrane.foreign.base import Profile, Writable
from filigrane.foreign.keys import ForeignKey


def write(
    lm: LanguageModel,
    prompt: npt.ArrayLike,
    max_new_tokens: int,
    key: ForeignKey,
    profile: Profile,
    *,
    rng: np.random.Generator,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
) -> TokenIds:
    """One text with a tool's mark, (n,) int64 without the prompt.

    prompt: token ids; rng: all private randomness; sampling: temperature and truncation, without
    any by default; stop: ids that end the text. Raises SchemeError for a profile that only reads.
    """
    if not isinstance(profile, Writable):
        name = getattr(profile, "name", type(profile).__name__)
        raise SchemeError(f"{name} only reads; write with the tool itself.")
    if not isinstance(lm, LanguageModel):
        raise ModelError(f"{type(lm).__name__} is not a LanguageModel; wrap it in one.")
    profile.require_key(key)
    rules = sampling or Sampling()
    ids = as_token_ids(prompt)
    state, output = profile.start(), list[int]()
    ends = frozenset(stop)
    if max_new_tokens <= 0:
        return np.empty(0, dtype=np.int64)
    logits, cache = lm.prefill([ids])
    while True:
        token = profile.choose(logits[0], ids, output, key, state=state, rng=rng, sampling=rules)
        output.append(int(token))
        if len(output) >= max_new_tokens or token in ends:
            return np.asarray(output, dtype=np.int64)
        logits, cache = lm.step(np.array([token], dtype=np.int64), cache)
