"""A text cut into pieces, each with a strength of evidence, for the page that shows it.

Evidence is only shown inside the spans that were found: outside of them single tokens differ by
chance, and colouring chance would mislead. Strength counts from 1 to 4, word by word, against the
average of the span: over a few neighbours, since one token says little.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Piece", "Stretch", "cut"]

_NEIGHBOURS: Final = 7
"""Tokens that are averaged, odd."""
_STEPS: Final = (0.5, 1.0, 1.5)
"""Shares of the span's average at which strength grows."""
# Scripts without spaces have long words; some end after so many characters.
_WORD: Final = re.compile(r"\s+\S{0,24}|\S{1,24}\s?")
MAX_CHARACTERS: Final = 60_000
"""Longer texts are shown as their spans alone, with some text around each."""
_AROUND: Final = 200


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one strength: 1 to 4 inside a span, 0 outside."""

    text: str
    strength: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Text between two borders of spans. number: of the span, from 1, or 0 between spans; skipped:
    characters that were left out of the middle.
    """

    number: int
    pieces: tuple[Piece, ...]
    skipped: int = 0


def cut(
    text: str,
    spans: Sequence[tuple[int, int]],
    evidence: npt.NDArray[np.float64],
    offsets: npt.NDArray[np.int64],
) -> tuple[Stretch, ...]:
    """The whole text, in order, as stretches.

    spans: disjoint (start, stop) in characters, ascending; evidence: (n,) nats per token, NaN where
    not scored; offsets: (n, 2) characters of each token.
    """
    short = len(text) > MAX_CHARACTERS
    found = []
    last = 0
    for number, (start, stop) in enumerate(spans, 1):
        start = max(start, last)
        if start > last:
            found.append(_between(text[last:start], short))
            last = start
        if stop > start:
            found.append(Stretch(number, _pieces(text, start, stop, evidence, offsets)))
            last = stop
    if last < len(text):
        found.append(_between(text[last:], short))
    return tuple(found)


def _between(text: str, short: bool) -> Stretch:
    if not short or len(text) <= 2 * _AROUND:
        return Stretch(0, (Piece(text, 0),))
    head, tail = Piece(text[:_AROUND], 0), Piece(text[-_AROUND:], 0)
    return Stretch(0, (head, tail), skipped=len(text) - 2 * _AROUND)


def _pieces(
    text: str,
    start: int,
    stop: int,
    evidence: npt.NDArray[np.float64],
    offsets: npt.NDArray[np.int64],
) -> tuple[Piece, ...]:
    inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= stop))
    if inside.size == 0 or np.isnan(evidence[inside]).all():
        return (Piece(text[start:stop], 2),)
    values = evidence[inside]
    average = float(np.nanmean(values))
    scored = ~np.isnan(values)
    window = np.ones(_NEIGHBOURS)
    sums = np.convolve(np.where(scored, values, 0.0), window, "same")[: values.size]
    numbers = np.convolve(scored.astype(float), window, "same")[: values.size]
    smooth = np.where(numbers > 0, sums / np.maximum(numbers, 1.0), average)
    steps = np.array(_STEPS) * max(average, 1e-12)
    # By character: tokens may share one, and white space between tokens belongs to none.
    level = np.full(stop - start, np.nan)
    for (first, after), value in zip(offsets[inside] - start, smooth, strict=True):
        level[first:after] = np.fmax(level[first:after], value)
    pieces: list[Piece] = []
    for word in _WORD.finditer(text, start, stop):
        values = level[word.start() - start : word.end() - start]
        value = average if np.isnan(values).all() else float(np.nanmean(values))
        strength = 1 + int(np.searchsorted(steps, value, side="right"))
        if pieces and pieces[-1].strength == strength:
            pieces[-1] = Piece(pieces[-1].text + word.group(), strength)
        else:
            pieces.append(Piece(word.group(), strength))
    return tuple(pieces)
