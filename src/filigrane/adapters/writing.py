"""Texts that one model writes together, each with its own key, scheme, decoding and end.

For engines that run the model themselves, step by step: the small server and the Python backend of
Triton. Rows share nothing but the model's forward passes, so schemes and settings mix freely in a
batch; a row that has ended leaves it. Knows nothing of sockets, tokenizers or requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from filigrane import prf
from filigrane.contexts import TokenIds
from filigrane.embedding import Logits, Sampling, truncate
from filigrane.errors import LogitsError
from filigrane.serving.drawing import Drawer
from filigrane.serving.orders import Mark, Unmarked
from filigrane.serving.texts import MarkedText, blocks
from filigrane.speculative.models import BlockModel

Reason = Literal["stop", "length", "cancelled", "error"]
"""Why a text has ended."""

_ANSWERS_APART: Final = 2**64
"""Seeds of the answers to one request lie this far apart: clients' seeds are smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One text to write.

    prompt: (n,) token ids; mark: what `serving.decide` said; seed: makes the text reproducible;
    number: which of several answers to one request it is, so that equal seeds give unequal answers;
    stop: ids that end the text (and belong to it).
    """

    prompt: TokenIds
    max_tokens: int
    sampling: Sampling
    mark: Mark | Unmarked
    seed: int | None = None
    number: int = 0
    stop: frozenset[int] = field(default_factory=frozenset)


class Text:
    """A text being written: its tokens so far, how many of them are marked, why it has ended.

    ended: None while it is being written; whoever sets it ends the text at the next step.
    """

    __slots__ = ("_marked", "_rng", "ended", "error", "n_marked", "order", "tokens")

    def __init__(self, order: Order) -> None:
        self.order = order
        self.tokens: list[int] = []
        self.n_marked = 0
        self.ended: Reason | None = None
        self.error: LogitsError | None = None
        seed = None if order.seed is None else order.seed + order.number * _ANSWERS_APART
        self._marked: MarkedText | None = None
        self._rng: np.random.Generator | None = None
        if isinstance(order.mark, Mark):
            self._marked = MarkedText(order.mark, seed=seed)
        else:
            # numpy takes no negative seeds, clients may send them.
            self._rng = np.random.default_rng(None if seed is None else seed % 2**128)

    def __repr__(self) -> str:
        return f"<Text {len(self.tokens)} tokens, {self.n_marked} marked, {self.ended or 'open'}>"

    @property
    def due(self) -> MarkedText | None:
        """The text's mark if its next position is to carry it, else None."""
        marked = self._marked
        return marked if marked is not None and marked.window is not None else None

    def extend(self, logits: Logits, block: prf.Words | None, drawer: Drawer) -> None:
        """Draw the next token from one row, (V,) float32, which may be changed; end if it ends.

        block: of the position if it is due for the mark.
        """
        order = self.order
        try:
            token = self._draw(logits, block, drawer)
        except LogitsError as error:
            self.ended, self.error = "error", error
            return
        self.n_marked += block is not None
        self.tokens.append(token)
        if self._marked is not None:
            self._marked.advance(self.tokens)
        if token in order.stop:
            self.ended = "stop"
        elif len(self.tokens) >= order.max_tokens:
            self.ended = "length"

    def _draw(self, logits: Logits, block: prf.Words | None, drawer: Drawer) -> int:
        from filigrane.kernels.draw import drawable, race

        sampling, marked = self.order.sampling, self._marked
        if not drawable(logits):
            raise LogitsError(
                "the model's logits hold NaN or +inf, or nothing above -inf; no token can be "
                "drawn. Check its dtype."
            )
        if block is not None and marked is not None:
            if marked.scheme.acts_on == "distribution":
                return drawer.draw(marked, block, logits, sampling)
            drawer.bias(marked, block, logits)
        if sampling.greedy:
            return int(np.argmax(logits))
        kept = truncate(logits, sampling)
        pool = logits if kept is None else logits[kept]
        ids = np.arange(pool.shape[0], dtype=np.uint32)
        index = int(race(pool, ids, 1.0 / sampling.temperature, *self._noise()))
        if index < 0:
            raise LogitsError("the logits overflow when divided by the temperature.")
        return index if kept is None else int(kept[index])

    def _noise(self) -> Any:
        if self._marked is not None:
            return self._marked.noise()
        assert self._rng is not None
        return self._rng.integers(0, 2**32, size=4, dtype=np.uint32)


class Batch:
    """Texts that began together and are written in one forward pass per step."""

    __slots__ = ("_begun", "_drawer", "_lm", "_state", "running", "texts")

    def __init__(self, lm: BlockModel, texts: Sequence[Text], drawer: Drawer) -> None:
        """texts: new ones, whose prompts hold at least one token each."""
        self.texts = tuple(texts)
        self.running = list(texts)
        self._lm = lm
        self._drawer = drawer
        self._begun = False
        self._state: Any = None

    def step(self) -> None:
        """Leave out the texts that have ended, and write one more token of each of the others.

        Raises what the model raises (TokenError for prompts that are not for it).
        """
        alive = [row for row, text in enumerate(self.running) if text.ended is None]
        left = len(alive) < len(self.running)
        self.running = [self.running[row] for row in alive]
        if not self.running:
            self._state = None
            return
        if not self._begun:
            self._begun = True
            prompts = [text.order.prompt for text in self.running]
            logits, self._state = self._lm.prefill(prompts)
        else:
            if left:
                self._lm.select(self._state, np.array(alive, dtype=np.int64))
            last = np.array([text.tokens[-1] for text in self.running], dtype=np.int64)
            logits, self._state = self._lm.step(last, self._state)
        # A row is biased in place.
        logits = np.require(logits, requirements=["C", "W"])
        due = [text.due for text in self.running]
        marked = [text for text in due if text is not None]
        words = iter(blocks(marked) if marked else ())
        for text, row, mark in zip(self.running, logits, due, strict=True):
            text.extend(row, None if mark is None else next(words), self._drawer)

    @property
    def done(self) -> bool:
        """Whether every text has ended."""
        return all(text.ended is not None for text in self.running)


def finish(batch: Batch) -> None:
    """Write on until every text of a batch has ended."""
    while not batch.done:
        batch.step()
