"""The k-gram filter: windows that the marked text is known to hold, so that others are not counted.

Knows nothing of keys. Answers of a suspect hold many windows that the marked training text never
had; they carry no trace and dilute the rest (Sander et al. 2024, section 4.3). Supervised: the
windows of the logged text itself; unsupervised: those of fresh text of the same model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from filigrane.contexts import as_token_ids
from filigrane.errors import EvidenceError
from filigrane.radioactivity.rules import windows_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowFilter:
    """Windows and how often each was seen.

    windows: (n, width) uint32, distinct, in lexical order; counts: (n,) int64; documents, tokens:
    what it was built from; vocab_size and tokenizer_sha256: of the tokens, None if not known.
    """

    windows: npt.NDArray[np.uint32]
    counts: npt.NDArray[np.int64]
    documents: int
    tokens: int
    vocab_size: int | None = None
    tokenizer_sha256: str | None = None

    @property
    def width(self) -> int:
        """Tokens per window."""
        return int(self.windows.shape[1])

    def __len__(self) -> int:
        return int(self.windows.shape[0])

    @classmethod
    def build(
        cls,
        documents: Iterable[npt.ArrayLike],
        width: int,
        *,
        min_count: int = 1,
        vocab_size: int | None = None,
        tokenizer_sha256: str | None = None,
    ) -> "WindowFilter":
        """Count the windows of documents, (n_i,) ids each, never across a border.

        Pass answers without chat template: template tokens would be the most frequent entries and
        say nothing. min_count: leave out rarer windows. Raises EvidenceError if none is left.
        """
        parts: list[npt.NDArray[np.uint32]] = []
        size = number = 0
        for document in documents:
            ids = as_token_ids(document, vocab_size)
            parts.append(windows_of(ids, width))
            size, number = size + ids.shape[0], number + 1
        rows = np.concatenate(parts) if parts else np.empty((0, width), np.uint32)
        distinct, counts = np.unique(rows, axis=0, return_counts=True)
        kept = counts >= min_count
        if not kept.any():
            raise EvidenceError(
                f"no window of {width} tokens occurs {min_count} times in {number} documents; "
                "give more text, or a smaller min_count."
            )
        return cls(
            windows=np.ascontiguousarray(distinct[kept]),
            counts=counts[kept].astype(np.int64),
            documents=number,
            tokens=size,
            vocab_size=vocab_size,
            tokenizer_sha256=tokenizer_sha256,
        )

    def holds(self, windows: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Membership: windows (n, width) uint32 -> (n,) bool. Raises EvidenceError for a width."""
        if windows.ndim != 2 or windows.shape[1] != self.width:
            raise EvidenceError(
                f"this filter was made for windows of {self.width} tokens, the scheme has "
                f"{windows.shape[-1]}; build it again with that width."
            )
        mine, theirs = _names(self.windows), _names(windows)
        order = np.sort(mine)
        at = np.minimum(np.searchsorted(order, theirs), order.shape[0] - 1)
        found: npt.NDArray[np.bool_] = order[at] == theirs
        return found


def _names(windows: npt.NDArray[np.uint32]) -> npt.NDArray[Any]:
    """One comparable value per row; big endian, so that bytes are ordered as numbers are."""
    rows = np.ascontiguousarray(windows.astype(">u4"))
    return rows.view(np.dtype((np.bytes_, 4 * windows.shape[1]))).reshape(-1)
