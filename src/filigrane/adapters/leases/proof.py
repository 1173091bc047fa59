"""A text that shows that its writer has a key: written by this machine, by the path of an engine.

The service tests it under the key and under all others of the tenant. Knows nothing of who asks.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from filigrane import foreign
from filigrane.contexts import TokenIds
from filigrane.detection import detect
from filigrane.embedding import Sampling
from filigrane.errors import NotReady
from filigrane.keys import Key, _Secret
from filigrane.schemes import from_tag
from filigrane.serving.drawing import Drawer
from filigrane.serving.orders import Mark
from filigrane.serving.readiness import VOCAB, test_logits
from filigrane.serving.texts import MarkedText, blocks
from filigrane.toy import ZipfModel

__all__ = ["prove"]

LENGTHS: Final = (400, 1600, 6400)
"""Tokens; longer ones for marks of which a token holds little."""
LOG_ALPHA: Final = -25.0
"""What a proof reaches, natural log; the service asks for 1e-9, -20.7."""
_OWN_VOCAB: Final = 1024


def prove(
    id: str, kind: str, mark: str, text: _Secret[str], *, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Ids (n,) that carry the mark of a key, each time others.

    id: of the version; kind, mark: as in a lease ("scheme" or "profile" and its tag); text: the
    key's; rng: what the key does not decide. Raises NotReady if what was written here does not
    carry the mark, SchemeError for a profile that only reads.
    """
    found = 0.0
    for length in LENGTHS:
        if kind == "scheme":
            tokens, found = _by_scheme(id, mark, text, length, rng)
        else:
            tokens, found = _by_profile(mark, text, length, rng)
        if found < LOG_ALPHA:
            return tokens
    raise NotReady(
        f"{id}: a text of {LENGTHS[-1]} tokens written here with {mark} is not found (log p "
        f"{found:.0f}); this engine has not acknowledged the key."
    )


def _by_scheme(
    id: str, mark: str, text: _Secret[str], length: int, rng: np.random.Generator
) -> tuple[TokenIds, float]:
    key, scheme = Key.from_text(text.reveal()), from_tag(mark)
    written = MarkedText(Mark(key=key, key_id=id, scheme=scheme))
    drawer, tokens = Drawer(VOCAB), list[int]()
    sampling = Sampling()
    for position in range(length):
        written.advance(tokens)
        logits = test_logits(position) / np.float32(4)
        if written.window is None:
            tokens.append(int(rng.integers(VOCAB)))
        elif scheme.acts_on == "logits":
            drawer.bias(written, blocks([written])[0], logits)
            tokens.append(int(np.argmax(logits + rng.gumbel(size=VOCAB))))
        else:
            tokens.append(drawer.draw(written, blocks([written])[0], logits, sampling))
    ids = np.asarray(tokens, dtype=np.int64)
    return ids, detect(ids, key, scheme).log_pvalue


def _by_profile(
    mark: str, text: _Secret[str], length: int, rng: np.random.Generator
) -> tuple[TokenIds, float]:
    profile = foreign.from_tag(mark)
    key = foreign.ForeignKey.from_text(text.reveal(), profile.key_form)
    width = profile.vocabulary if profile.needs_vocab else _OWN_VOCAB
    lm = ZipfModel(width, exponent=0.8)
    ids = foreign.write(lm, [1], length, key, profile, rng=rng)
    return ids, profile.read(foreign.Written(tokens=ids), key).log_pvalue
