"""Alice and Bob in numpy: a writer with a mark, suspects that count n-grams, and one that copies.

For self-tests and calibration over many keys, where a language model would take days. A source with
a Zipf law over `successors` tokens after each token; Alice writes it with a mark; Bob interpolates
counts of what he was given; CopyBob never saw a mark and repeats what followed a window before, as
induction heads do.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from filigrane.contexts import TokenIds
from filigrane.keys import MarkingKey
from filigrane.radioactivity.evidence import Exchange, Reading
from filigrane.radioactivity.rules import Ledger, add, read_positions
from filigrane.schemes.base import Scheme

Texts = npt.NDArray[np.int64]
"""Texts of equal length, shape (n, length)."""

_DISCOUNT: Final = 4.0
"""Pseudo-count of the shorter context, in tokens."""
_TOP: Final = 64


@dataclass(frozen=True, slots=True)
class Source:
    """A Markov law: after token a come `tokens[a]` with probabilities `law`.

    tokens: (V, successors) int64; law: (successors,) float64.
    """

    tokens: npt.NDArray[np.int64]
    law: npt.NDArray[np.float64]

    @classmethod
    def draw(cls, vocab_size: int, rng: np.random.Generator, successors: int = 32) -> "Source":
        """A source of this vocabulary, its successors chosen by rng, their law 1 / rank."""
        tokens = np.stack([rng.permutation(vocab_size)[:successors] for _ in range(vocab_size)])
        law = 1.0 / np.arange(1, successors + 1)
        return cls(tokens.astype(np.int64), law / law.sum())

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.tokens.shape[0])

    def write(
        self,
        n: int,
        length: int,
        rng: np.random.Generator,
        *,
        words: npt.NDArray[np.uint32] | None = None,
        scheme: Scheme | None = None,
    ) -> Texts:
        """n texts, marked under one PRF key, (8,) uint32, by the rule of `contexts`."""
        from filigrane.kernels.prf import blocks

        texts = np.empty((n, length), dtype=np.int64)
        texts[:, 0] = rng.integers(self.vocab_size, size=n)
        width = 0 if scheme is None else scheme.context_width
        seen: set[tuple[int, bytes]] = set()
        for t in range(1, length):
            choices = self.tokens[texts[:, t - 1]]
            probs = np.broadcast_to(self.law, choices.shape).copy()
            if scheme is not None and words is not None and t >= width:
                windows = np.ascontiguousarray(texts[:, t - width : t].astype(np.uint32))
                names = [(row, window.tobytes()) for row, window in enumerate(windows)]
                fresh = np.array([name not in seen for name in names])
                seen.update(names)
                keys = np.broadcast_to(words, (n, 8))
                seeds = blocks(keys, windows)[fresh]
                # Every row has a support of its own, which broadcasts as well as a common one.
                support = choices[fresh].astype(np.uint32)
                probs[fresh] = scheme.reweight(probs[fresh], seeds, support)
            ends = probs.cumsum(axis=1)
            drawn = (ends < rng.random((n, 1)) * ends[:, -1:]).sum(axis=1)
            texts[:, t] = choices[np.arange(n), np.minimum(drawn, choices.shape[1] - 1)]
        return texts


class Counts:
    """Bob: next-token laws from interpolated counts of contexts of 0 to `width` tokens."""

    def __init__(self, vocab_size: int, width: int) -> None:
        self.vocab_size, self.width = vocab_size, width
        self._tables = [
            np.zeros((vocab_size**order, vocab_size), dtype=np.float32)
            for order in range(width + 1)
        ]

    def learn(self, texts: Texts) -> "Counts":
        """Count texts; returns self."""
        for order, table in enumerate(self._tables):
            for t in range(order, texts.shape[1]):
                np.add.at(table, (self._index(texts, t, order), texts[:, t]), 1.0)
        return self

    def copy(self) -> "Counts":
        """The same counts, to go on learning from."""
        twin = Counts(self.vocab_size, self.width)
        twin._tables = [table.copy() for table in self._tables]
        return twin

    def law(self, contexts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Next-token laws after contexts (n, width): (n, V)."""
        n, width = contexts.shape
        probs = np.full((n, self.vocab_size), 1.0 / self.vocab_size)
        for order, table in enumerate(self._tables):
            counts = table[self._index(contexts, width, order)].astype(np.float64)
            total = counts.sum(axis=1, keepdims=True)
            probs = (counts + _DISCOUNT * probs) / (total + _DISCOUNT)
        return probs

    def answer(self, prompts: Texts, length: int, rng: np.random.Generator) -> list[Exchange]:
        """Continue prompts (n, p) by `length` tokens, drawn from the counts."""
        text = prompts
        for _ in range(length):
            ends = self.law(text[:, -self.width :]).cumsum(axis=1)
            drawn = (ends < rng.random((text.shape[0], 1)) * ends[:, -1:]).sum(axis=1)
            drawn = np.minimum(drawn, self.vocab_size - 1)
            text = np.concatenate([text, drawn[:, None]], axis=1)
        p = prompts.shape[1]
        return [Exchange(prompt=row[:p], answer=row[p:]) for row in text]

    def _index(self, texts: npt.NDArray[np.int64], t: int, order: int) -> npt.NDArray[np.int64]:
        index = np.zeros(texts.shape[0], dtype=np.int64)
        for back in range(order, 0, -1):
            index = index * self.vocab_size + texts[:, t - back]
        return index


def read(
    suspect: Counts,
    texts: Texts,
    width: int,
    *,
    base: Counts | None = None,
    attention_rule: bool = True,
    copying: float = 0.0,
) -> Reading:
    """Reading mode on an n-gram suspect; copying: weight of an induction head, for CopyBob."""
    parts: list[Reading] = []
    for number, text in enumerate(texts):
        positions, ledger = read_positions(text, 0, width, attention_rule=attention_rule)
        if positions.size:
            parts.append(_read_one(suspect, base, text, positions, ledger, width, number, copying))
    return Reading.join(parts)


def _read_one(
    suspect: Counts,
    base: Counts | None,
    text: TokenIds,
    positions: npt.NDArray[np.int64],
    ledger: Ledger,
    width: int,
    number: int,
    copying: float,
) -> Reading:
    windows = np.stack([text[t - width + 1 : t + 1] for t in positions])
    law = suspect.law(_contexts(text, positions, suspect.width))
    if copying:
        law = (1.0 - copying) * law
        for row, t in enumerate(positions):
            law[row] = _copied(text[: t + 1], width, law[row], copying)
    other = None if base is None else base.law(_contexts(text, positions, base.width))
    reach = law if other is None else np.maximum(law, np.abs(law - other))
    top = min(_TOP, law.shape[1])
    chosen = np.argpartition(-reach, top - 1, axis=1)[:, :top]
    # The argmax first, as a Reading wants it.
    order = np.argsort(-np.take_along_axis(law, chosen, axis=1), axis=1, kind="stable")
    chosen = np.take_along_axis(chosen, order, axis=1)
    picked = np.take_along_axis(law, chosen, axis=1).astype(np.float32)
    before = None if other is None else np.take_along_axis(other, chosen, axis=1)
    return Reading(
        windows=windows.astype(np.uint32),
        documents=np.full(positions.size, number, dtype=np.int64),
        starts=np.arange(positions.size + 1, dtype=np.int64) * top,
        tokens=chosen.reshape(-1).astype(np.uint32),
        suspect=picked.reshape(-1),
        base=None if before is None else before.reshape(-1).astype(np.float32),
        vocab_size=suspect.vocab_size,
        ledger=add([ledger]),
    )


def _contexts(
    text: TokenIds, positions: npt.NDArray[np.int64], width: int
) -> npt.NDArray[np.int64]:
    padded = np.concatenate([np.zeros(width, dtype=np.int64), text])
    contexts: npt.NDArray[np.int64] = padded[positions[:, None] + 1 + np.arange(width)]
    return contexts


def _copied(
    past: TokenIds, width: int, law: npt.NDArray[np.float64], weight: float
) -> npt.NDArray[np.float64]:
    """Add `weight` to what followed the current window when it last occurred."""
    windows = np.lib.stride_tricks.sliding_window_view(past, width)[:-1]
    before = np.flatnonzero((windows == past[-width:]).all(axis=1))
    if before.size:
        law[past[before[-1] + width]] += weight
        return law
    scaled: npt.NDArray[np.float64] = law / law.sum()
    return scaled


def marked(
    source: Source,
    n: int,
    length: int,
    key: MarkingKey,
    scheme: Scheme,
    rng: np.random.Generator,
) -> Texts:
    """Texts of Alice under the first slot of a key."""
    words = np.asarray(key.prf_keys(scheme.label))[0]
    return source.write(n, length, rng, words=words, scheme=scheme)
