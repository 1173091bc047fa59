"""One text being written by an engine that draws tokens itself: what is marked, and with what.

An engine that batches continuously moves, preempts and resumes requests between steps. All of a
text's state is therefore here, in one object: the key words of its slot, its history (the rule of
`contexts`), and private randomness that does not depend on which step draws what.
"""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Final, Never

import numpy as np

from filigrane import prf
from filigrane.contexts import History, collect
from filigrane.detection import totals
from filigrane.errors import SecretLeakError, TokenError
from filigrane.keys import SecretWords
from filigrane.serving.orders import Mark

_SLOT: Final = prf.MAX_TOKEN_ID
"""Stands for the draw of the slot where positions stand; no text is as long."""


class MarkedText:
    """The state of one marked text.

    mark: key and scheme. seed: the client's; makes the text reproducible, the slot and all private
    randomness then follow from key and seed, and the client learns neither. nonce: instead of fresh
    randomness, for engines whose processes must all draw alike; never to be used twice. written:
    what the text has already, if it is resumed (preempted, for example); it then says itself which
    slot it is marked with.
    """

    __slots__ = ("_history", "_noise_key", "_words", "key_id", "scheme")

    def __init__(
        self,
        mark: Mark,
        *,
        seed: int | None = None,
        nonce: str | None = None,
        written: Sequence[int] = (),
    ) -> None:
        self.scheme = mark.scheme
        self.key_id = mark.key_id
        words = mark.key.prf_keys(mark.scheme.label)
        if seed is not None:
            source = f"seed {seed}".encode()
        else:
            source = secrets.token_bytes(32) if nonce is None else f"nonce {nonce}".encode()
        # Hashed under the key: whoever knows the seed or the nonce must not learn the slot.
        digest = hashlib.blake2b(np.asarray(words).tobytes() + source, digest_size=32).digest()
        self._noise_key: prf.Words = (
            np.frombuffer(digest, "<u4").astype(np.uint32).view(SecretWords)
        )
        slot = int(prf.block(self._noise_key, [_SLOT])[0]) % mark.key.slots
        width = mark.scheme.context_width
        if seed is None and len(written) > width:
            evidence = collect(list(written), width)
            slot = int(np.argmax(totals(evidence, np.asarray(words), mark.scheme)))
        self._words: prf.Words = words[slot].copy().view(SecretWords)
        self._history = History(width)
        self.advance(written)

    def __repr__(self) -> str:
        return f"<MarkedText {self.key_id} {self.scheme.tag} {len(self)} tokens>"

    def __reduce_ex__(self, protocol: object) -> Never:
        raise SecretLeakError("a MarkedText holds key words and cannot be pickled.")

    def __len__(self) -> int:
        """Tokens written so far."""
        return len(self._history)

    def advance(self, tokens: Sequence[int]) -> None:
        """Bring the text to what has been written: tokens are all of its ids, from the first.

        Only those beyond what is known are read, so this may be called at every step. Raises
        TokenError if there are fewer than before, or a placeholder (-1) among the new ones: a
        window that holds one must not be hashed.
        """
        known = len(self._history)
        if len(tokens) < known:
            raise TokenError(
                f"{len(tokens)} tokens after {known}: the text went back; call back_to first."
            )
        for token in tokens[known:]:
            if token < 0:
                raise TokenError(
                    f"the engine shows token id {token}, a placeholder for one that is still being "
                    "computed (asynchronous scheduling); nothing can be marked after it."
                )
            self._history.push(token)

    def back_to(self, length: int) -> None:
        """Take back what was written beyond `length` tokens."""
        self._history.rollback(len(self._history) - length)

    @property
    def window(self) -> tuple[int, ...] | None:
        """The window of the next position if that is to be marked, else None."""
        return self._history.window() if self._history.fresh() else None

    @property
    def key_words(self) -> prf.Words:
        """The key of the text's slot, (8,) uint32. Secret."""
        return self._words

    @property
    def noise_key(self) -> prf.Words:
        """The key of the text's private randomness, (8,) uint32. Secret."""
        return self._noise_key

    def noise(self, position: int | None = None) -> prf.Words:
        """Private randomness of a position (the next by default), (4,) uint32.

        The first four words of `prf.block(noise_key, [position])`.
        """
        from filigrane.kernels.prf import blocks as compute

        at = len(self._history) if position is None else position
        return compute(np.asarray(self._noise_key)[None], np.array([[at]], np.uint32))[0, :4]


def blocks(texts: Sequence[MarkedText]) -> prf.Words:
    """PRF blocks of the next positions of texts, all of which have a window, (n, 8) uint32."""
    from filigrane.kernels.prf import blocks as compute

    out: prf.Words = np.zeros((len(texts), prf.BLOCK_WORDS), dtype=np.uint32)
    widths = [text.scheme.context_width for text in texts]
    for width in set(widths):
        rows = [row for row, own in enumerate(widths) if own == width]
        windows = np.array([texts[row].window for row in rows], dtype=np.uint32)
        keys = np.stack([np.asarray(texts[row].key_words) for row in rows])
        out[rows] = compute(keys, windows)
    return out
