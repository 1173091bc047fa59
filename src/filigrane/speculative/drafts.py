"""Where drafts come from: a smaller model, or the text itself.

A drafter says the law of the next token; which token is drafted is the method's business. This
module knows nothing of marks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from filigrane.embedding import Sampling
from filigrane.errors import DraftError, LogitsError
from filigrane.speculative.laws import Law, certain, law_of
from filigrane.speculative.models import BlockModel, pad_left

TEXT = -1
"""The end of the text, as a place that a draft goes on from."""


@dataclass(slots=True)
class Branch:
    """A drafted token of a block: parent is the index of the branch before it, or TEXT.

    column: where a drafter has read it, for its own use.
    """

    token: int
    parent: int
    column: int = -1


class Drafter(ABC):
    """Drafts for a batch of texts: `begin`, then for each block some `extend` and one `settle`."""

    @abstractmethod
    def begin(self, prompts: Sequence[list[int]]) -> None:
        """Start a batch, and forget any other."""

    @abstractmethod
    def extend(
        self, blocks: Sequence[list[Branch]], ends: Sequence[list[int]]
    ) -> list[list[Law | None]]:
        """The laws after some places of each row's block; None where nothing is on offer.

        blocks: all that was drafted so far in each row; ends: indices of branches to go on from
        (at first [TEXT]); none for rows that are not to go on. A branch is an end once at most.
        """

    @abstractmethod
    def settle(
        self,
        texts: Sequence[list[int]],
        blocks: Sequence[list[Branch]],
        paths: Sequence[list[int]],
    ) -> None:
        """The block is over. texts: all rows, with prompts; paths: the branches that stay."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows of the batch, in this order."""


class ModelDrafter(Drafter):
    """Drafts by a model, at the end of the text and of branches; reads each token once.

    sampling: how its laws are made of its logits.
    """

    def __init__(self, model: BlockModel, sampling: Sampling) -> None:
        self.model = model
        self._sampling = sampling
        self._state: Any = None
        self._pending: list[list[int]] = []
        self._settled: list[int] = []
        self._columns = 0

    def begin(self, prompts: Sequence[list[int]]) -> None:
        """See `Drafter.begin`."""
        self._state = self.model.open(len(prompts))
        self._pending = [list(prompt) for prompt in prompts]
        self._settled = [0] * len(prompts)
        self._columns = self._start = 0

    def extend(
        self, blocks: Sequence[list[Branch]], ends: Sequence[list[int]]
    ) -> list[list[Law | None]]:
        """See `Drafter.extend`."""
        # A row that is done with this block is read along at the first depth, so that what it has
        # pending is not forgotten, and as padding later.
        if self._columns == 0:
            tokens, valid = pad_left(self._pending)
            parents = chain(valid)
            self._start = last = tokens.shape[1]
            asked = 1
        else:
            asked = max(map(len, ends))
            tokens = np.zeros((len(ends), asked), dtype=np.int64)
            valid = np.zeros((len(ends), asked), dtype=np.bool_)
            parents = np.full((len(ends), asked), -1, dtype=np.int64)
            last = self._columns
            for row, (block, places) in enumerate(zip(blocks, ends, strict=True)):
                for at, place in enumerate(places):
                    branch = block[place]
                    branch.column = last + at
                    tokens[row, at], valid[row, at] = branch.token, True
                    before = block[branch.parent].column if branch.parent != TEXT else -1
                    parents[row, at] = self._start - 1 if before < 0 else before
            last += asked
        self._columns = last
        straight = asked == 1 and all(
            branch.parent == at - 1 for block in blocks for at, branch in enumerate(block)
        )
        logits = self.model.read(
            self._state, tokens, valid, last=asked, parents=None if straight else parents
        )
        try:
            return [
                [law_of(logits[row, at], self._sampling) for at in range(len(places))]
                for row, places in enumerate(ends)
            ]
        except LogitsError as error:
            raise LogitsError(f"the draft's {error}") from None

    def settle(
        self,
        texts: Sequence[list[int]],
        blocks: Sequence[list[Branch]],
        paths: Sequence[list[int]],
    ) -> None:
        """See `Drafter.settle`."""
        kept = np.zeros((len(texts), self._columns), dtype=np.bool_)
        for row, (block, path) in enumerate(zip(blocks, paths, strict=True)):
            if self._columns:
                count = len(self._pending[row])
                kept[row, self._start - count : self._start] = True
                self._settled[row] += count
            for place in path:
                if block[place].column >= 0:
                    kept[row, block[place].column] = True
                    self._settled[row] += 1
            self._pending[row] = texts[row][self._settled[row] :]
        if self._columns:
            self.model.keep(self._state, kept)
        self._columns = 0

    def select(self, rows: Sequence[int]) -> None:
        """See `Drafter.select`."""
        self.model.select(self._state, np.asarray(rows, dtype=np.int64))
        self._pending = [self._pending[row] for row in rows]
        self._settled = [self._settled[row] for row in rows]


def chain(valid: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Parents of columns that are one text: each follows the one before, the first valid one -1."""
    columns = np.arange(valid.shape[1], dtype=np.int64) - 1
    before = np.concatenate([np.zeros_like(valid[:, :1]), valid[:, :-1]], axis=1)
    return np.where(before, columns, -1)


class NGram(Drafter):
    """Prompt lookup: what followed the last occurrence of the latest tokens, prompt included.

    longest, shortest: how many tokens have to agree, tried in this order. Needs no model; the law
    of a draft is certainty. Saxena 2023 (prompt lookup decoding); Yang et al. 2023, 2304.04487.
    """

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise DraftError(
                f"an n-gram draft needs 1 <= shortest <= longest, got {shortest} and {longest}."
            )
        self._sizes = range(longest, shortest - 1, -1)
        self._texts: list[list[int]] = []
        self._after: list[dict[tuple[int, ...], int]] = []

    def begin(self, prompts: Sequence[list[int]]) -> None:
        """See `Drafter.begin`."""
        self._texts = [[] for _ in prompts]
        self._after = [{} for _ in prompts]
        for row, prompt in enumerate(prompts):
            self._learn(row, prompt)

    def _learn(self, row: int, text: list[int]) -> None:
        """Remember what follows which n-gram; what is latest counts."""
        after = self._after[row]
        for end in range(max(1, len(self._texts[row])), len(text)):
            for size in self._sizes:
                if size <= end:
                    after[tuple(text[end - size : end])] = text[end]
        self._texts[row] = list(text)

    def extend(
        self, blocks: Sequence[list[Branch]], ends: Sequence[list[int]]
    ) -> list[list[Law | None]]:
        """See `Drafter.extend`."""
        return [
            [self._guess(row, block, place) for place in places]
            for row, (block, places) in enumerate(zip(blocks, ends, strict=True))
        ]

    def _guess(self, row: int, block: list[Branch], place: int) -> Law | None:
        drafted: list[int] = []
        while place != TEXT:
            drafted.append(block[place].token)
            place = block[place].parent
        longest = self._sizes[0]
        recent = self._texts[row][-longest:] + drafted[::-1]
        for size in self._sizes:
            token = self._after[row].get(tuple(recent[-size:])) if size <= len(recent) else None
            if token is not None:
                return certain(token)
        return None

    def settle(
        self,
        texts: Sequence[list[int]],
        blocks: Sequence[list[Branch]],
        paths: Sequence[list[int]],
    ) -> None:
        """See `Drafter.settle`."""
        for row, text in enumerate(texts):
            self._learn(row, text)

    def select(self, rows: Sequence[int]) -> None:
        """See `Drafter.select`."""
        self._texts = [self._texts[row] for row in rows]
        self._after = [self._after[row] for row in rows]
