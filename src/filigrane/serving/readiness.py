"""Known answers: text marked by this machine under a public test key is what it is everywhere.

A server runs this before it takes requests. What it guards against is not a wrong configuration but
a wrong machine: a compiler, a processor or a library whose arithmetic differs would write marks
that nobody finds, and nothing else would notice.
"""

import hashlib
from collections.abc import Iterable
from typing import Final

import numpy as np

from filigrane.detection import detect
from filigrane.embedding import Logits, Sampling
from filigrane.errors import NotReady
from filigrane.keys import Key
from filigrane.schemes import Scheme, from_tag
from filigrane.serving.drawing import Drawer
from filigrane.serving.orders import Mark
from filigrane.serving.texts import MarkedText, blocks

TEST_KEY: Final = (
    "filigrane-key-1:known-answers:2:aaaqeayeaudaocajbifqydiob4ibceqtcqkrmfyydenbwha5dyprnjcseq"
)
"""A public key, of the bytes 0 to 31. It marks nobody's text."""
LENGTH: Final = 160
VOCAB: Final = 1_000
ANSWERS: Final = {
    "gumbel": "501d69be8a54cec6",
    "greenlist": "35114309aa69202c",
    "tournament": "eff5de21fea74b85",
    "gamma": "1b24da0af53b1f2a",
    "delta": "e639f2548b0155fc",
}
"""Scheme -> the first 16 hex digits of SHA-256 of its text's ids (int64, little endian)."""
_LOG_ALPHA: Final = -13.8
"""log(1e-6): every one of these texts is found far below it."""


def test_logits(position: int) -> Logits:
    """Logits (VOCAB,) float32 that every machine computes alike: small multiples of 1/16."""
    ids = np.arange(VOCAB)
    return (((37 * ids + 17 * position) % 263 - 100) / 16).astype(np.float32)


def known_text(scheme: Scheme) -> list[int]:
    """The text of a scheme under the test key, LENGTH ids, by the path that engines take."""
    text = MarkedText(
        Mark(key=Key.from_text(TEST_KEY), key_id="known-answers", scheme=scheme), seed=1
    )
    drawer, tokens = Drawer(VOCAB), list[int]()
    sampling = Sampling(temperature=0.8, top_k=300, top_p=0.95)
    for position in range(LENGTH):
        text.advance(tokens)
        logits = test_logits(position)
        if text.window is None:
            token = int(np.argmax(logits))
        elif scheme.acts_on == "logits":
            drawer.bias(text, blocks([text])[0], logits)
            token = int(np.argmax(logits))
        else:
            token = drawer.draw(text, blocks([text])[0], logits, sampling)
        tokens.append(token)
    return tokens


def known_answers(schemes: Iterable[Scheme]) -> dict[str, float]:
    """Write and test the known text of each scheme; scheme's name -> log10 p of its text.

    The parameters of the schemes do not matter here, their kinds do. Raises NotReady if a text is
    not the expected one, or is not found.
    """
    found = {}
    key = Key.from_text(TEST_KEY)
    for name in dict.fromkeys(scheme.name for scheme in schemes):
        scheme = from_tag(name)
        tokens = known_text(scheme)
        digest = hashlib.sha256(np.asarray(tokens, dtype="<i8").tobytes()).hexdigest()[:16]
        if digest != ANSWERS[name]:
            raise NotReady(
                f"{name}: the text of the test key is {digest} here, {ANSWERS[name]} elsewhere: "
                "this machine or one of its libraries (numpy, numba) computes something else. "
                "Nothing was started; text marked here would not be found."
            )
        result = detect(tokens, key, scheme)
        if result.log_pvalue > _LOG_ALPHA:
            raise NotReady(f"{name}: the text of the test key is not found; nothing was started.")
        found[name] = result.log10_pvalue
    return found
