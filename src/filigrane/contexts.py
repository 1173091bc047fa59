"""Which positions of a text carry a mark: the only copy of the rule, for generator and detector.

This module knows nothing of keys, schemes or models. The rule (docs/design/0002-contexts.md):

    A position is marked, and scored, if and only if its `width` preceding tokens all lie in the
    same text and this window has not preceded an earlier position of the same claim.

So the prompt never enters, the first `width` tokens of a text stay unmarked, and a repeated window
is a coin that was already tossed: it is neither marked again nor counted twice. `History` says it
one token at a time for generators; `scored_positions` says it for whole texts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from filigrane.errors import TokenError, TooShort, VocabularyMismatch
from filigrane.prf import MAX_TOKEN_ID

TokenIds = npt.NDArray[np.int64]
"""One text: token ids, shape (n,)."""


def as_token_ids(tokens: npt.ArrayLike, vocab_size: int | None = None) -> TokenIds:
    """Check and convert one text to int64 ids.

    Raises TokenError for anything but a one-dimensional sequence of integers in [0, 2**32 - 2], and
    VocabularyMismatch for ids at or above `vocab_size`.
    """
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise TokenError("tokens must be one flat sequence of ids; got nested lists.") from error
    if ids.size == 0 and ids.ndim == 1:
        return np.empty(0, dtype=np.int64)
    if ids.dtype.kind not in "iu":
        hint = {
            "U": "Encode text with its model's tokenizer first.",
            "S": "Encode text with its model's tokenizer first.",
            "O": "Pass the ids themselves: generated.tokens, or encoding['input_ids'].",
        }.get(ids.dtype.kind, "")
        raise TokenError(
            f"token ids must be integers; got {type(tokens).__name__} of {ids.dtype}. {hint}"
        )
    if ids.ndim != 1:
        raise TokenError(
            f"tokens must be one text, shape (n,); got shape {ids.shape}. "
            "Pass rows one by one, or a Corpus to test several texts as one claim."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > MAX_TOKEN_ID:
        hint = " Remove padding and placeholders (-1, -100) first." if low < 0 else ""
        raise TokenError(f"token ids must lie in [0, {MAX_TOKEN_ID}]; got {low} to {high}.{hint}")
    if vocab_size is not None and high >= vocab_size:
        raise VocabularyMismatch(
            f"token id {high} is outside the vocabulary of {vocab_size}: "
            "were these ids made by another tokenizer?"
        )
    return ids.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Several texts tested as one claim: windows are counted once over all of them, in this order.

    texts: token ids, one array of shape (n_i,) each. Windows never reach across a border.
    """

    texts: tuple[TokenIds, ...]

    def __init__(self, texts: Iterable[npt.ArrayLike], *, vocab_size: int | None = None) -> None:
        object.__setattr__(self, "texts", tuple(as_token_ids(text, vocab_size) for text in texts))


class History:
    """The rule for one growing text, token by token.

    push(token) appends; window() is the current context, or None while it is incomplete; fresh()
    says whether the next position is to be marked. rollback(n) takes back the last n tokens
    together with the windows they had used, for verification of drafts.
    """

    __slots__ = ("_seen", "_tokens", "_used", "width")

    def __init__(self, width: int, earlier: Sequence[npt.ArrayLike] = ()) -> None:
        """Start an empty text. earlier: texts of the same claim whose windows count as used."""
        self.width: Final = width
        self._tokens: list[int] = []
        self._seen: set[tuple[int, ...]] = set()
        self._used: list[tuple[int, ...] | None] = []
        for text in earlier:
            ids = as_token_ids(text).tolist()
            self._seen.update(tuple(ids[t - width : t]) for t in range(width, len(ids)))

    def __len__(self) -> int:
        return len(self._tokens)

    def window(self) -> tuple[int, ...] | None:
        """The `width` last tokens, oldest first, or None if there are fewer."""
        if len(self._tokens) < self.width:
            return None
        return tuple(self._tokens[-self.width :])

    def fresh(self) -> bool:
        """Whether the next position has a complete window that precedes no earlier position."""
        window = self.window()
        return window is not None and window not in self._seen

    def push(self, token: int) -> None:
        """Append the token chosen for the current position; its window is used from now on."""
        window = self.window()
        new = window is not None and window not in self._seen
        if new and window is not None:
            self._seen.add(window)
        self._used.append(window if new else None)
        self._tokens.append(token)

    def rollback(self, count: int, *, spent: bool = False) -> None:
        """Take back the last `count` tokens.

        spent: their windows stay used, because what they seeded has been looked at (block
        verification). A detector does not know of those; where one occurs again it scores a
        position that carries no mark.
        """
        if not 0 <= count <= len(self._tokens):
            raise TokenError(f"cannot take back {count} of {len(self._tokens)} tokens.")
        for _ in range(count):
            self._tokens.pop()
            window = self._used.pop()
            if window is not None and not spent:
                self._seen.discard(window)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a detector may score: the positions whose window is complete and new.

    ids: (n_tokens,) uint32, all texts concatenated; positions: (n_scored,) int64, indices into ids;
    width: tokens per window; n_repeated: positions with a complete window that were dropped because
    the window had been seen before.
    """

    ids: npt.NDArray[np.uint32]
    positions: npt.NDArray[np.int64]
    width: int
    n_repeated: int

    @property
    def n_tokens(self) -> int:
        """Tokens in all texts, scored or not."""
        return int(self.ids.shape[0])

    @property
    def n_scored(self) -> int:
        """Number of scored positions."""
        return int(self.positions.shape[0])

    @property
    def tokens(self) -> npt.NDArray[np.uint32]:
        """The scored tokens, (n_scored,) uint32."""
        return self.ids[self.positions]

    @property
    def windows(self) -> npt.NDArray[np.uint32]:
        """The windows before them, (n_scored, width) uint32, oldest token first."""
        windows: npt.NDArray[np.uint32]
        windows = self.ids[self.positions[:, None] + np.arange(-self.width, 0)]
        return windows


def collect(text: npt.ArrayLike | Corpus, width: int, *, vocab_size: int | None = None) -> Evidence:
    """The scored positions of a text or corpus.

    Raises TokenError and VocabularyMismatch as `as_token_ids` does, and TooShort if no text has
    more than `width` tokens.
    """
    parts = text.texts if isinstance(text, Corpus) else (text,)
    texts = tuple(as_token_ids(part, vocab_size) for part in parts)
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    for number, ids in enumerate(texts):
        starts[number + 1] = starts[number] + ids.shape[0]
    longest = max((ids.shape[0] for ids in texts), default=0)
    if longest <= width:
        raise TooShort(
            f"this scheme looks at {width} previous tokens; got {longest} tokens. "
            f"Pass at least {width + 1} (a useful verdict needs some 50 to 200)."
        )
    joined = (texts[0] if len(texts) == 1 else np.concatenate(texts)).astype(np.uint32)
    from filigrane.kernels.contexts import first_windows

    positions, complete = first_windows(joined, starts, width)
    return Evidence(
        ids=joined,
        positions=positions,
        width=width,
        n_repeated=complete - positions.shape[0],
    )


def scored_positions(text: npt.ArrayLike | Corpus, width: int) -> npt.NDArray[np.int64]:
    """`collect(...).positions` in plain Python, from `History`: the readable twin."""
    texts = text.texts if isinstance(text, Corpus) else (as_token_ids(text),)
    positions: list[int] = []
    offset = 0
    for number, ids in enumerate(texts):
        history = History(width, texts[:number])
        for t, token in enumerate(ids.tolist()):
            if history.fresh():
                positions.append(offset + t)
            history.push(token)
        offset += ids.shape[0]
    return np.asarray(positions, dtype=np.int64)
