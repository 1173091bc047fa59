"""Contexts of whole claims, as arrays: what readers share.

Knows nothing of keys or tools. A reader says what stands before each text (padding, the end of a
prompt, or nothing) and gets every position with a complete window and the first of each window.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

PADDING: Final = 0xFFFFFFFF
"""No token id: -1 as 32 bits."""

Words = npt.NDArray[np.uint64]
"""Unsigned 32-bit words in 64 bits each, so that products do not overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """All positions of a claim that have a complete window.

    ids: (m,) uint32, leads and texts one after another; positions: (n,) int64 into ids, every
    position with a complete window; first: (n,) bool, whether its window had not occurred before;
    text: (n,) int64, the number of its text; width: tokens per window.
    """

    ids: npt.NDArray[np.uint32]
    positions: npt.NDArray[np.int64]
    first: npt.NDArray[np.bool_]
    text: npt.NDArray[np.int64]
    width: int

    def contexts(self, which: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
        """Windows of the positions chosen by a mask, (k, width), oldest token first."""
        windows: npt.NDArray[np.uint32]
        windows = self.ids[self.positions[which][:, None] + np.arange(-self.width, 0)]
        return windows

    def tokens(self, which: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
        """The tokens at the positions chosen by a mask, (k,)."""
        tokens: npt.NDArray[np.uint32] = self.ids[self.positions[which]]
        return tokens


def windows(
    texts: Sequence[npt.NDArray[np.int64]],
    leads: Sequence[npt.NDArray[np.int64]],
    width: int,
) -> Windows:
    """Windows of texts that follow leads.

    leads: one per text, what stands before it and is not scored, at most `width` ids; PADDING (or
    -1) is allowed in it. A text's positions begin `width` ids after the lead's beginning.
    """
    from filigrane.kernels.contexts import first_windows

    parts = [part for pair in zip(leads, texts, strict=True) for part in pair]
    sizes = [lead.shape[0] + text.shape[0] for lead, text in zip(leads, texts, strict=True)]
    starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64))]).astype(np.int64)
    joined = np.concatenate([np.empty(0, np.int64), *parts])
    ids = (joined & PADDING).astype(np.uint32)
    spans = [np.arange(a + width, b) for a, b in itertools.pairwise(starts.tolist())]
    empty = np.empty(0, dtype=np.int64)
    positions = np.concatenate([empty, *spans]).astype(np.int64)
    text = np.concatenate([empty, *[np.full(s.shape[0], i) for i, s in enumerate(spans)]])
    first = np.zeros(positions.shape[0], dtype=np.bool_)
    if positions.shape[0]:
        fresh, _ = first_windows(ids, starts, width)
        first[np.searchsorted(positions, fresh)] = True
    return Windows(
        ids=ids, positions=positions, first=first, text=text.astype(np.int64), width=width
    )


def first_of(values: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Whether each value (n,), or row (n, k), is the first of its kind."""
    first = np.zeros(values.shape[0], dtype=np.bool_)
    if values.shape[0]:
        first[np.unique(values, axis=0, return_index=True)[1]] = True
    return first
