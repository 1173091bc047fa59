"""What speculative sampling asks of a model: read several tokens at once, and take some back.

This module knows nothing of frameworks. `adapters.transformers.TransformersModel` is one such
model, `toy.ZipfModel` another; an engine brings its own.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from filigrane.contexts import TokenIds
from filigrane.embedding import LanguageModel, Logits

Mask = npt.NDArray[np.bool_]


class BlockModel(LanguageModel):
    """A language model that reads blocks of tokens and can forget part of what it read last.

    A state holds a batch of texts in columns. Columns read since the last `keep` are the open ones;
    what is before them is settled. A model serves any number of states.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Width of its logits."""

    @property
    def vocabulary(self) -> str | None:
        """Fingerprint of what every id means, None if not known; equal for models that may pair."""
        return None

    @property
    def size(self) -> int | None:
        """Number of parameters, None if not known."""
        return None

    @property
    def reads_trees(self) -> bool:
        """Whether `read` takes parents: drafts that branch."""
        return True

    @abstractmethod
    def open(self, rows: int) -> Any:
        """The state of an empty batch."""

    @abstractmethod
    def read(
        self,
        state: Any,
        tokens: TokenIds,
        valid: Mask,
        *,
        last: int,
        parents: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Append columns: tokens (batch, m) int64, valid (batch, m) -> logits (batch, last, V).

        Logits are those after each of the last columns; where a column is not valid they mean
        nothing. parents: (batch, m), for trees: the open column (counted from the first of them)
        that a token follows, -1 for the settled text; None: each follows the valid one before.
        Raises ModelError if the model cannot read trees and is given one.
        """

    @abstractmethod
    def keep(self, state: Any, kept: Mask) -> None:
        """Settle the open columns: kept (batch, open columns), the others are forgotten.

        The kept columns of a row are one text, in their order.
        """

    @abstractmethod
    def select(self, state: Any, rows: npt.NDArray[np.int64]) -> None:
        """Keep some rows of the batch, in this order."""

    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Logits, Any]:
        """See `LanguageModel.prefill`."""
        state = self.open(len(prompts))
        # A model that can begin from nothing sees one column of padding.
        return self.read(state, *pad_left(prompts, width=1), last=1)[:, 0], state

    def step(self, tokens: TokenIds, state: Any) -> tuple[Logits, Any]:
        """See `LanguageModel.step`."""
        columns = np.asarray(tokens, dtype=np.int64)[:, None]
        valid = np.ones(columns.shape, dtype=np.bool_)
        return self.read(state, columns, valid, last=1)[:, 0], state


def pad_left(rows: Sequence[npt.ArrayLike], width: int = 0) -> tuple[TokenIds, Mask]:
    """Rows of different lengths as columns that end together: ids (batch, m) and which are valid.

    width: at least this many columns.
    """
    lengths = [len(np.atleast_1d(np.asarray(row))) for row in rows]
    m = max([width, *lengths])
    ids = np.zeros((len(rows), m), dtype=np.int64)
    valid = np.zeros((len(rows), m), dtype=np.bool_)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if length:
            ids[number, m - length :] = row
            valid[number, m - length :] = True
    return ids, valid
