"""A pair of models small enough that every law is known, and fast enough for many texts."""

import numpy as np

from filigrane.speculative import BlockModel


class Markov(BlockModel):
    """The next token depends on the last one: table (V, V) of probabilities, row by last token."""

    def __init__(self, table: np.ndarray) -> None:
        with np.errstate(divide="ignore"):
            self._logits = np.log(table).astype(np.float32)

    @property
    def vocab_size(self) -> int:
        return self._logits.shape[0]

    def open(self, rows: int) -> None:
        return None

    def read(self, state, tokens, valid, *, last, parents=None):  # type: ignore[no-untyped-def]
        return self._logits[tokens[:, tokens.shape[1] - last :]]

    def keep(self, state, kept) -> None:  # type: ignore[no-untyped-def]
        pass

    def select(self, state, rows) -> None:  # type: ignore[no-untyped-def]
        pass


def pair(vocab_size: int, seed: int = 0, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Tables of a target and a draft that differ a good deal: (V, V) each."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(vocab_size, sharpness), size=vocab_size)
    q = 0.5 * p + 0.5 * rng.dirichlet(np.full(vocab_size, sharpness), size=vocab_size)
    return p, q


def law_of_texts(p: np.ndarray, first: int, length: int) -> np.ndarray:
    """Joint law of `length` tokens after `first`: (V,) * length, flat, by base-V number."""
    joint = p[first]
    for _ in range(length - 1):
        last = np.arange(joint.shape[0]) % p.shape[0]
        joint = (joint[:, None] * p[last]).reshape(-1)
    return joint
