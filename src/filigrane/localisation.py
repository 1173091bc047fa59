"""Where in a text is the mark? Spans of tokens, each with an exact p-value.

A text is often marked in part: a pasted paragraph, an edited answer. This module cuts the scored
positions into windows and tests each, as `detection` tests a whole text. Like that module it knows
nothing of models or of characters. Two things make its spans evidence and not impressions:

* The windows are fixed before anything is looked at: lengths 16, 32, 64, ..., each moved on by half
  its length, and the text as a whole. Nothing that depends on the scores decides what is tested.
* Windows overlap and slots are many, so every p-value pays for all windows times all slots by
  Bonferroni's inequality, which needs no independence. If text and key are independent, the chance
  over the key that any span at all is reported is at most alpha.

A span's p-value is that of one whole window. Where exactly the span begins and ends inside the
windows that were significant is an estimate (the piece with the largest sum above the middle
between unmarked and marked scores), and carries no guarantee of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from filigrane.contexts import Evidence, collect
from filigrane.detection import scanned
from filigrane.errors import FiligraneError
from filigrane.keys import MarkingKey
from filigrane.schemes.base import Scheme, require_scheme

__all__ = ["Localisation", "Span", "localise", "window_grid"]

FIRST_LENGTH: Final = 16
"""Scored positions in the shortest windows; fewer cannot be significant at any alpha of use."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A piece of a text that carries the mark: tokens start to stop - 1.

    log_pvalue: natural log, of its most telling window, corrected for all windows and slots that
    were tried; n_scored: scored positions between start and stop.
    """

    start: int
    stop: int
    log_pvalue: float
    n_scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Localisation:
    """Where a mark was found; it has no truth value: look at `spans`.

    spans: disjoint, in the order of the text; evidence: (n_tokens,) float64, how surprising each
    token is without a mark, in nats (-log p of its own score; 1 on average at most), NaN where
    nothing is scored; n_windows: windows tried; n_tests: windows times slots, rounded up to a power
    of two, the number that was corrected for; method: how, in words.
    """

    spans: tuple[Span, ...]
    evidence: Floats
    n_windows: int
    n_tests: int
    method: str

    def __bool__(self) -> NoReturn:
        raise TypeError("a Localisation is not true or false; look at its spans.")


@dataclass(frozen=True, slots=True)
class _Shape:
    """A scheme's score of one unmarked position: mean, greatest value, whether an integer."""

    mean: float
    top: float
    lattice: bool


@dataclass(frozen=True, slots=True)
class _Windows:
    """All windows of one length over one slot: number i is [i step, i step + length)."""

    length: int
    step: int
    sums: Floats


@dataclass(frozen=True, slots=True)
class _Piece:
    """Significant windows that touch: scored positions start to stop - 1, and their best window."""

    start: int
    stop: int
    total: float
    length: int
    slot: int


def window_grid(n_scored: int) -> tuple[tuple[int, int, int], ...]:
    """(length, step, count) of the windows over so many scored positions, shortest first.

    Window i of a row is the half-open range [i step, i step + length). The last row is the whole
    text unless a row before it has that window. Raises ValueError for n_scored < 1.
    """
    if n_scored < 1:
        raise ValueError(f"{n_scored} scored positions have no windows; pass 1 or more.")
    rows = []
    length = FIRST_LENGTH
    while length <= n_scored:
        step = length // 2
        rows.append((length, step, (n_scored - length) // step + 1))
        length *= 2
    if not rows or rows[-1][0] != n_scored:
        rows.append((n_scored, n_scored, 1))
    return tuple(rows)


def localise(
    tokens: npt.ArrayLike,
    key: MarkingKey,
    scheme: Scheme,
    *,
    alpha: float = 1e-6,
    vocab_size: int | None = None,
) -> Localisation:
    """Which spans of this text were written under this key?

    tokens: (n,) ids of one text without its prompt; alpha: the chance, over keys that have nothing
    to do with the text, of reporting any span; vocab_size: refuse ids at or above it. Raises
    ValueError for an alpha outside (0, 1), TooShort, TokenError or VocabularyMismatch, and
    FiligraneError for what is not a key or a scheme.
    """
    require_scheme(scheme)
    if not isinstance(key, MarkingKey):
        raise FiligraneError(
            f"localise tests one key: pass a Key or key.user(i), not {type(key).__name__}."
        )
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be inside (0, 1), got {alpha}.")
    evidence = collect(tokens, scheme.context_width, vocab_size=vocab_size)
    scores = _scores(evidence, key, scheme)
    grid = window_grid(evidence.n_scored)
    n_windows = sum(count for _, _, count in grid)
    # Rounded up, so that the thresholds of one text serve the next: at most log 2 too careful.
    n_tests = 1 << (n_windows * key.slots - 1).bit_length()
    level = math.log(alpha) - math.log(n_tests)
    sums = [_sums(row, grid) for row in scores]
    least = [
        _threshold(scheme, length, level)
        if step < length
        else _least(scheme, [float(rows[-1].sums[0]) for rows in sums], length, level)
        for length, step, _ in grid
    ]
    mean = _shape(scheme).mean
    pieces = [
        piece
        for slot, (row, rows) in enumerate(zip(scores, sums, strict=True))
        for piece in _pieces(slot, row, rows, least, mean)
    ]
    spans, best = _disjoint(pieces, scores, evidence.positions, scheme, n_tests)
    surprise = np.full(evidence.n_tokens, np.nan)
    surprise[evidence.positions] = _surprise(scores, best, scheme)
    return Localisation(
        spans=spans,
        evidence=surprise,
        n_windows=n_windows,
        n_tests=n_tests,
        method=f"exact tail per window, Bonferroni over {n_windows} windows x {key.slots} slots",
    )


def _scores(evidence: Evidence, key: MarkingKey, scheme: Scheme) -> Floats:
    """The score of every position under every slot, (slots, n_scored)."""
    from filigrane.kernels.scan import each_position

    words = key.prf_keys(scheme.label)
    scores = np.empty((words.shape[0], evidence.n_scored))
    each_position(words.view(np.ndarray), *scanned(evidence, scheme), scores)
    return scores


@lru_cache(maxsize=64)
def _shape(scheme: Scheme) -> _Shape:
    from filigrane.kernels.scan import GREEN, GUMBEL, TABLE

    kind, threshold, table = scheme.statistic
    if kind == GUMBEL:
        return _Shape(1.0, 32.0 * math.log(2.0), False)
    if kind == GREEN:
        return _Shape(threshold / 2**32, 1.0, True)
    if kind == TABLE:
        top = float(table.reshape(4, 256).max(axis=1).sum())
        return _Shape(0.5 * top, top, True)
    return _Shape(0.5, 1.0, False)


def _sums(row: Floats, grid: tuple[tuple[int, int, int], ...]) -> list[_Windows]:
    """The windows' sums by halves: each is two pieces of the row of half its length."""
    half = FIRST_LENGTH // 2
    halves = row[: row.size // half * half].reshape(-1, half).sum(axis=1)
    found = []
    for length, step, count in grid:
        if step == length:  # the whole text, of a length that is no power of two
            sums = np.array([row.sum()])
        else:
            sums = halves[:-1] + halves[1:]
            even = halves.size // 2 * 2
            halves = halves[0:even:2] + halves[1:even:2]
        found.append(_Windows(length, step, sums[:count]))
    return found


@lru_cache(maxsize=4096)
def _threshold(scheme: Scheme, length: int, level: float) -> float:
    """The least sum over so many positions with log p <= level, inf if there is none.

    Exact for integer scores; for others from above, to one part in 10**9.
    """
    shape = _shape(scheme)
    low, high = 0.0, math.ceil(shape.top * length) if not shape.lattice else shape.top * length
    below, above = 0.0, scheme.log_sf(high, length)
    if above > level:
        return math.inf
    # The root of -log p grows almost in a straight line, as it does for a normal law: regula falsi
    # (the Illinois rule) in that scale, from the mean.
    goal = math.sqrt(-level)
    left, right = -goal, math.sqrt(min(-above, 1e300)) - goal
    guess, last = shape.mean * length, 0
    tolerance = 1.0 if shape.lattice else 1e-9 * high
    while high - low > tolerance:
        if shape.lattice:
            guess = min(max(float(math.floor(guess)), low + 1.0), high - 1.0)
        else:
            guess = min(max(guess, low + 0.5 * tolerance), high - 0.5 * tolerance)
        below = scheme.log_sf(guess, length)
        height = math.sqrt(min(-below, 1e300)) - goal
        if below > level:
            low, left, side = guess, height, -1
        else:
            high, right, side = guess, height, 1
        if side == last:
            left, right = (left, 0.5 * right) if side < 0 else (0.5 * left, right)
        last = side
        guess = low - left * (high - low) / (right - left) if right > left else 0.5 * (low + high)
    return high


def _least(scheme: Scheme, totals: list[float], length: int, level: float) -> float:
    """The least of the totals with log p <= level, inf if there is none.

    For the one length that no other text shares: a few tails are cheaper than a threshold.
    """
    least = math.inf
    for total in sorted(totals, reverse=True):
        if scheme.log_sf(total, length) > level:
            break
        least = total
    return least


def _pieces(
    slot: int, row: Floats, rows: list[_Windows], least: list[float], mean: float
) -> list[_Piece]:
    """The pieces of one slot: smallest significant windows, joined where they touch.

    least: the smallest significant sum of each length. Smallest windows: those that hold no shorter
    significant one, so that a marked paragraph does not claim the page around it (minimal
    intervals, Dumbgen and Walther 2008).
    """
    hits: list[tuple[_Windows, npt.NDArray[np.int64]]] = []
    for windows, threshold in zip(rows, least, strict=True):
        index = np.flatnonzero(windows.sums >= threshold)
        if index.size:
            hits.append((windows, index))
    if not hits:
        return []
    minimal = _minimal(hits, row.size)
    edges = np.concatenate(([0.0], np.cumsum(row)))
    pieces = []
    for start, stop in _joined(minimal, edges, mean):
        # The window to be reported stands furthest above the mean, in standard deviations (their
        # common factor does not matter). Any choice among tested windows is paid for.
        best = max(_inside(hits, start, stop), key=lambda w: (w[0] - mean * w[1]) / math.sqrt(w[1]))
        pieces.append(_Piece(start, stop, *best, slot))
    return pieces


def _minimal(
    hits: list[tuple[_Windows, npt.NDArray[np.int64]]], n_scored: int
) -> npt.NDArray[np.int64]:
    """Significant windows that hold no shorter one, (m, 2) int64, sorted by start."""
    # earliest[s]: the first stop among shorter significant windows that start at s or later.
    earliest = np.full(n_scored + 1, n_scored + 1, dtype=np.int64)
    kept = []
    for windows, index in hits:
        starts = index * windows.step
        stops = starts + windows.length
        holds = earliest[starts] <= stops
        kept.append(np.stack((starts[~holds], stops[~holds]), axis=1))
        earliest[starts] = np.minimum(earliest[starts], stops)
        earliest = np.minimum.accumulate(earliest[::-1])[::-1]
    every = np.concatenate(kept)
    return every[np.argsort(every[:, 0], kind="stable")]


def _joined(
    minimal: npt.NDArray[np.int64], edges: Floats, mean: float
) -> Iterator[tuple[int, int]]:
    """Windows joined where they touch, or where what lies between them looks marked as well.

    edges: (n_scored + 1,) sums of scores from the beginning; mean: of an unmarked score.
    """
    start, stop = (int(x) for x in minimal[0])
    for next_start, next_stop in minimal[1:].tolist():
        gap = next_start - stop
        if gap >= FIRST_LENGTH:
            inside = edges[stop] - edges[start] + edges[next_stop] - edges[next_start]
            marked = inside / (stop - start + next_stop - next_start)
            if (edges[next_start] - edges[stop]) / gap < 0.5 * (mean + marked):
                yield start, stop
                start, stop = next_start, next_stop
                continue
        stop = max(stop, next_stop)
    yield start, stop


def _inside(
    hits: list[tuple[_Windows, npt.NDArray[np.int64]]], start: int, stop: int
) -> Iterator[tuple[float, int]]:
    """(sum, length) of the strongest significant window of each length inside [start, stop)."""
    for windows, index in hits:
        first = np.searchsorted(index, -(-start // windows.step))
        last = np.searchsorted(index, (stop - windows.length) // windows.step, side="right")
        if first < last:
            yield float(windows.sums[index[first:last]].max()), windows.length


def _disjoint(
    pieces: list[_Piece],
    scores: Floats,
    positions: npt.NDArray[np.int64],
    scheme: Scheme,
    n_tests: int,
) -> tuple[tuple[Span, ...], npt.NDArray[np.int64]]:
    """The spans, strongest first where two would overlap; and the slot shown at each position."""
    mean = _shape(scheme).mean
    price = math.log(n_tests)
    found = sorted(
        (min(0.0, scheme.log_sf(piece.total, piece.length) + price), piece.start, piece.slot, piece)
        for piece in pieces
    )
    strongest = found[0][2] if found else int(np.argmax(scores.sum(axis=1)))
    shown = np.full(positions.size, strongest)
    taken = np.zeros(positions.size, dtype=bool)
    spans = []
    for log_pvalue, _, slot, piece in found:
        drift = 0.5 * (mean + piece.total / piece.length)
        reach = piece.length // 2
        low, high = max(0, piece.start - reach), min(positions.size, piece.stop + reach)
        first, last = _largest_sum(scores[slot, low:high] - drift)
        first, last = first + low, last + low
        if taken[first:last].any():
            continue
        taken[first:last] = True
        shown[first:last] = slot
        spans.append(
            Span(
                start=int(positions[first]),
                stop=int(positions[last - 1]) + 1,
                log_pvalue=log_pvalue,
                n_scored=last - first,
            )
        )
    return tuple(sorted(spans, key=lambda span: span.start)), shown


def _largest_sum(values: Floats) -> tuple[int, int]:
    """The half-open range of the largest sum, never empty: (n,) -> (first, last)."""
    ends = np.cumsum(values)
    before = np.concatenate(([0.0], ends[:-1]))
    last = int(np.argmax(ends - np.minimum.accumulate(before)))
    return int(np.argmin(before[: last + 1])), last + 1


def _surprise(scores: Floats, slots: npt.NDArray[np.int64], scheme: Scheme) -> Floats:
    """-log P(score of one unmarked position >= this one), in the slot shown: (n_scored,)."""
    from filigrane.kernels.scan import GUMBEL

    chosen: Floats = scores[slots, np.arange(slots.size)]
    if _shape(scheme).lattice:
        return _surprise_table(scheme)[chosen.astype(np.int64)]
    if scheme.statistic.kind == GUMBEL:
        return chosen
    # A uniform score; the lattice of 2**-32 keeps it below one.
    surprise: Floats = -np.log1p(-np.minimum(chosen, 1.0 - 2.0**-33))
    return surprise


@lru_cache(maxsize=16)
def _surprise_table(scheme: Scheme) -> Floats:
    """For integer scores: the surprise of 0, 1, ..., the greatest."""
    top = round(_shape(scheme).top)
    return np.array([-scheme.log_sf(float(score), 1) for score in range(top + 1)])
