"""Which positions may be scored against a suspect: the tape, and a ledger of what it drops.

Knows nothing of keys, schemes or suspects. A model that copies from what it can see looks as if it
had learned the mark; these rules are what keeps a clean model clean (Sander et al. 2024, arXiv
2402.14904, Proposition 1, and docs/design/0008-radioactivity.md):

    reading    a window counts only where nothing the suspect, or the writer, could attend to held
               it before                                              `read_positions`
    answering  a window counts unless the request held it             `answered`
    both       a window and what follows it count once in a corpus    `first_rows`
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from filigrane.contexts import TokenIds, as_token_ids
from filigrane.errors import EvidenceError

Ledger: TypeAlias = dict[str, int]
"""Rule -> positions it dropped, in the order in which rules are applied. 'candidates' comes first,
'scored' last, and the numbers between them add up to the difference."""


def add(ledgers: Sequence[Ledger]) -> Ledger:
    """The sum of ledgers, rule by rule; 'scored' stays last."""
    total: Ledger = {}
    for ledger in ledgers:
        for rule, count in ledger.items():
            total[rule] = total.get(rule, 0) + count
    if "scored" in total:
        total["scored"] = total.pop("scored")
    return total


def windows_of(tokens: TokenIds, width: int) -> npt.NDArray[np.uint32]:
    """Every window of a text: tokens (n,) -> (n - width + 1, width) uint32, oldest token first."""
    if tokens.shape[0] < width:
        return np.empty((0, width), dtype=np.uint32)
    view = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint32), width)
    return np.ascontiguousarray(view)


def read_positions(
    tokens: npt.ArrayLike,
    start: int,
    width: int,
    *,
    earlier: Sequence[npt.ArrayLike] = (),
    attention_rule: bool = True,
) -> tuple[npt.NDArray[np.int64], Ledger]:
    """Positions of one document whose prediction may be scored, and what was dropped.

    tokens: (n,) the whole document as the suspect reads it, from the first token on; start: where
    the text to score begins, after prompt and template; width: tokens of a window; earlier: other
    sequences that the writer could attend to (its own prompt, if that was another one).
    Position t stands for the prediction that follows tokens[t]; its window, tokens[t-width+1 .. t],
    lies wholly in tokens[start:] and occurs nowhere before in tokens nor in earlier. The text's own
    next token is never scored: it is green by construction. The last token's window is left out:
    texts end alike, and what follows an end says nothing.
    attention_rule: False keeps windows that occurred before, and with them what the suspect copies:
    to show what the rule is for, never for a p-value. Raises TokenError, EvidenceError.
    """
    ids = as_token_ids(tokens)
    if width < 1 or not 0 <= start <= ids.shape[0]:
        raise EvidenceError(
            f"start={start} and width={width} do not fit a document of {ids.shape[0]} tokens."
        )
    last = max(ids.shape[0] - 1, start)
    n = last - start
    first = start + width - 1
    ledger = {"candidates": n, "incomplete window": min(n, width - 1)}
    seen = {name for text in earlier for name in _names(windows_of(as_token_ids(text), width))}
    kept: list[int] = []
    # The tape runs from token 0 on: a window of the prompt spends the same one in the text.
    for end, name in enumerate(_names(windows_of(ids[:last], width)), start=width - 1):
        if end >= first and not (attention_rule and name in seen):
            kept.append(end)
        seen.add(name)
    complete = max(0, last - first)
    ledger["window in the attended context"] = complete - len(kept)
    ledger["scored"] = len(kept)
    return np.asarray(kept, dtype=np.int64), ledger


def answered(
    prompt: npt.ArrayLike, answer: npt.ArrayLike, width: int, *, prompt_rule: bool = True
) -> tuple[npt.NDArray[np.uint32], Ledger]:
    """Windows of an answer and what followed them, without those that the request held.

    prompt: (p,) everything that was sent, system prompt, earlier turns and template included;
    answer: (a,) generated tokens. Returns rows (n, width + 1) uint32, window then successor, both
    wholly inside the answer; duplicates are still there. prompt_rule: False is for demonstrations.
    """
    rows = windows_of(as_token_ids(answer), width + 1)
    size = as_token_ids(answer).shape[0]
    ledger = {"candidates": size, "incomplete window": size - rows.shape[0]}
    asked = set(_names(windows_of(as_token_ids(prompt), width)))
    if prompt_rule and asked and rows.shape[0]:
        windows = np.ascontiguousarray(rows[:, :-1])
        rows = rows[[name not in asked for name in _names(windows)]]
    ledger["window in the prompt"] = size - ledger["incomplete window"] - rows.shape[0]
    ledger["scored"] = rows.shape[0]
    return rows, ledger


def _names(windows: npt.NDArray[np.uint32]) -> list[bytes]:
    """Every row as something a set can hold."""
    data, size = windows.tobytes(), 4 * windows.shape[1]
    return [data[at : at + size] for at in range(0, len(data), size)]


def first_rows(rows: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Indices, ascending, of the first occurrence of every distinct row: (n, m) -> (k,)."""
    n, m = rows.shape
    if n == 0:
        return np.empty(0, dtype=np.int64)
    from filigrane.kernels.contexts import first_windows

    # Each row becomes a text with one window, the row; a token that is never read closes it.
    texts = np.zeros((n, m + 1), dtype=np.uint32)
    texts[:, :m] = rows
    starts = np.arange(n + 1, dtype=np.int64) * (m + 1)
    positions, _ = first_windows(texts.reshape(-1), starts, m)
    indices: npt.NDArray[np.int64] = positions // (m + 1)
    return indices
