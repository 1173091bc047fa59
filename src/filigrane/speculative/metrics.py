"""What a speculative decoder is worth: tokens per target call, time, strength of mark, intervals.

Pure functions over `Row`s, one per text. Nearly every metric is a ratio of two sums over texts, so
it is written as its two terms for one text (`Metric`), and one bootstrap over prompts serves
estimates, differences and ratios alike: methods that wrote from the same (prompt, seed) are
compared on exactly these texts, and a prompt is drawn with all its seeds and all its methods.

This module knows nothing of models, keys, files or plots. It computes no p-value: the exact ones
come with the rows, and the two rates below are the published strength scores, not tests.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from filigrane.errors import RecordError

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

ALPHA: Final = 0.01
"""The false-positive rate at which detection is compared in the literature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One text of one method, reduced to what the metrics need.

    prompt, seed: which text this is; rows of two methods that agree in both are a pair.
    n_tokens: tokens written; n_scored: those that a detector may score.
    sum_u, sum_a: sums over the scored tokens of u (uniform without a mark) and a = -log(1 - u)
    (Exp(1) without a mark); nan where the scheme has no such score.
    log_pvalue: natural log of the exact p-value of the method's own detector; 0 if too short.
    log_likelihood: summed natural log of P(token) under the target's law after warping.
    emitted, proposed, accepted, nodes: (n_blocks,) int64, and seconds: (n_blocks,) float64, as in
    the record of `generate`.
    prefixes: number of tokens -> log_pvalue of the text cut there.
    """

    method: str
    draft_length: int
    prompt: int | str
    seed: int
    n_tokens: int
    n_scored: int
    sum_u: float
    sum_a: float
    log_pvalue: float
    log_likelihood: float
    emitted: Counts
    proposed: Counts
    accepted: Counts
    nodes: Counts
    seconds: Floats
    prefixes: Mapping[int, float] = field(default_factory=dict)


# ---------------------------------------------------------------- strength of a mean score


def rate_u(mean: npt.ArrayLike) -> Floats:
    """Chernoff exponent per scored token of a mean u: max over t >= 0 of t mean - log((e^t - 1)/t).

    n times it bounds -log P(sum of n uniforms >= n mean) from below: the U score of Hu and Huang
    2024. mean: any shape, in [0, 1); 0 up to mean 1/2, nan for nan.
    """
    mean = np.asarray(mean, dtype=np.float64)
    inside = np.where(mean > 0.5, np.minimum(mean, 1.0 - 2.0**-53), 0.75)
    # The maximum is where the tilted mean 1/(1 - e^-t) - 1/t equals the mean; it exceeds 1 - 1/t,
    # which gives the upper end.
    low, high = np.zeros_like(inside), 1.0 / (1.0 - inside)
    for _ in range(64):
        tilt = 0.5 * (low + high)
        below = -1.0 / np.expm1(-tilt) - 1.0 / tilt < inside
        low, high = np.where(below, tilt, low), np.where(below, high, tilt)
    tilt = 0.5 * (low + high)
    # log((e^t - 1)/t) without overflow.
    rate = tilt * inside - (tilt + np.log(-np.expm1(-tilt)) - np.log(tilt))
    return np.where(np.isnan(mean), np.nan, np.where(mean > 0.5, np.maximum(rate, 0.0), 0.0))


def rate_a(mean: npt.ArrayLike) -> Floats:
    """Chernoff exponent per scored token of a mean a: mean - 1 - log(mean), 0 up to mean 1.

    n times it bounds -log P(Gamma(n, 1) >= n mean) from below: the population form of the Aaronson
    score. mean: any shape, >= 0; nan for nan.
    """
    mean = np.asarray(mean, dtype=np.float64)
    above = np.where(mean > 1.0, mean, 1.0)
    return np.where(np.isnan(mean), np.nan, above - 1.0 - np.log(above))


def pooled_rates(rows: Iterable[Row]) -> tuple[float, float]:
    """The U and A rates of the mean score over all texts, per token (skipped ones included).

    The per-text forms `ANLPPT_U` and `ANLPPT_A` also count the luck of single texts: unmarked text
    has rates above 0 there and (nearly) 0 here. nan where nothing was scored.
    """
    chosen = list(rows)
    tokens = sum(row.n_tokens for row in chosen)
    # A text that is too short has no sums.
    chosen = [row for row in chosen if row.n_scored]
    scored = sum(row.n_scored for row in chosen)
    if not scored:
        return math.nan, math.nan
    u = float(rate_u(sum(row.sum_u for row in chosen) / scored))
    a = float(rate_a(sum(row.sum_a for row in chosen) / scored))
    return u * scored / tokens, a * scored / tokens


# ---------------------------------------------------------------- metrics as ratios of sums


@dataclass(frozen=True, slots=True)
class Metric:
    """A ratio of two sums over texts: terms(row) gives one text's share of both."""

    name: str
    unit: str
    terms: Callable[[Row], tuple[float, float]]


def _aatps(row: Row) -> tuple[float, float]:
    return float(row.emitted.sum()), float(row.emitted.shape[0])


def _ptt(row: Row) -> tuple[float, float]:
    if row.seconds.shape[0] < 2:
        return 0.0, 0.0
    # The first block reads the prompt; it is neither in the time nor among the tokens.
    span = float(row.seconds[-1] - row.seconds[0])
    return 1e3 * span, float(row.emitted[1:].sum())


def _call(row: Row) -> tuple[float, float]:
    blocks = row.seconds.shape[0]
    if blocks < 2:
        return 0.0, 0.0
    return 1e3 * float(row.seconds[-1] - row.seconds[0]), float(blocks - 1)


def _logppl(row: Row) -> tuple[float, float]:
    return -row.log_likelihood, float(row.n_tokens)


def _anlppt_u(row: Row) -> tuple[float, float]:
    if not row.n_scored:
        return 0.0, float(row.n_tokens)
    return row.n_scored * float(rate_u(row.sum_u / row.n_scored)), float(row.n_tokens)


def _anlppt_a(row: Row) -> tuple[float, float]:
    if not row.n_scored:
        return 0.0, float(row.n_tokens)
    return row.n_scored * float(rate_a(row.sum_a / row.n_scored)), float(row.n_tokens)


def _anlppt(row: Row) -> tuple[float, float]:
    return -row.log_pvalue, float(row.n_tokens)


def _nodes(row: Row) -> tuple[float, float]:
    return float(row.nodes.sum()), float(row.nodes.shape[0])


AATPS: Final = Metric("AATPS", "tokens per target call", _aatps)
"""Emitted tokens per target call, the corrected or bonus token included: at most K + 1."""

PTT: Final = Metric("PTT", "ms per token", _ptt)
"""Per-token time: sum of (t_last - t_first) over sum of the tokens after the first block."""

CALL: Final = Metric("time per call", "ms per target call", _call)
"""Time of a block, drafts and target call, after the first: what marking adds shows here, while PTT
also holds what it gains or loses in tokens per call."""

LOGPPL: Final = Metric("LOGPPL", "nats per token", _logppl)
"""-mean log P(token) under the target, token weighted; equal across exact methods."""

ANLPPT_U: Final = Metric("ANLPPT-U", "nats per token", _anlppt_u)
"""Average negative log p-value per token, Chernoff form of the U score, text by text."""

ANLPPT_A: Final = Metric("ANLPPT-A", "nats per token", _anlppt_a)
"""The same with the population form of the Aaronson score, text by text."""

ANLPPT: Final = Metric("ANLPPT", "nats per token", _anlppt)
"""The same with the exact tail of the method's own detector: what users see."""

NODES: Final = Metric("nodes", "nodes per block", _nodes)
"""Draft nodes that the target verified per call; the draft length where there is one draft."""


def tpr(length: int | None = None, alpha: float = ALPHA) -> Metric:
    """Share of texts whose exact p-value is at most alpha, whole or cut to `length` tokens.

    Texts that have no p-value at this length (they ended before) are left out.
    """

    def terms(row: Row) -> tuple[float, float]:
        log_pvalue = row.log_pvalue if length is None else row.prefixes.get(length)
        if log_pvalue is None:
            return 0.0, 0.0
        return float(log_pvalue <= math.log(alpha)), 1.0

    where = "" if length is None else f", {length} tokens"
    return Metric(f"TPR at FPR {alpha:g}{where}", "share of texts", terms)


def acceptance(rows: Iterable[Row]) -> tuple[Floats, Counts]:
    """Share of blocks in which draft position i was kept given that it was reached, i = 1..K.

    A position is reached if it was proposed and all before it were kept. Returns the shares (K,),
    nan where it was never reached, and how often it was, (K,); K is the longest draft.
    """
    chosen = list(rows)
    proposed = np.concatenate([row.proposed for row in chosen] or [np.empty(0, np.int64)])
    accepted = np.concatenate([row.accepted for row in chosen] or [np.empty(0, np.int64)])
    position = np.arange(1, int(proposed.max(initial=0)) + 1)[:, None]
    reached = ((proposed >= position) & (accepted >= position - 1)).sum(axis=1)
    kept = ((proposed >= position) & (accepted >= position)).sum(axis=1)
    share = np.where(reached > 0, kept / np.maximum(reached, 1), np.nan)
    return share, reached.astype(np.int64)


# ---------------------------------------------------------------- intervals


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval; the ends are nan where there are too few prompts for one."""

    value: float
    low: float
    high: float


_RESAMPLES: Final = 2000
_LEVEL: Final = 95.0


def estimate(
    rows: Sequence[Row], metric: Metric, rng: np.random.Generator, *, resamples: int = _RESAMPLES
) -> Estimate:
    """A metric and its percentile bootstrap interval over prompts; nan without texts."""
    sums = _by_prompt(rows, metric, _prompts(rows))
    return _interval(_share(sums.sum(axis=0)), _share(_resample(sums, rng, resamples)))


def difference(
    rows: Sequence[Row],
    reference: Sequence[Row],
    metric: Metric,
    rng: np.random.Generator,
    *,
    resamples: int = _RESAMPLES,
) -> Estimate:
    """The metric of `rows` minus that of `reference`, paired by (prompt, seed).

    Raises RecordError if they share no text, or if one of them has a (prompt, seed) twice.
    """
    mine, theirs, value = _compare(rows, reference, metric, rng, resamples)
    return _interval(value[0] - value[1], mine - theirs)


def ratio(
    rows: Sequence[Row],
    reference: Sequence[Row],
    metric: Metric,
    rng: np.random.Generator,
    *,
    resamples: int = _RESAMPLES,
) -> Estimate:
    """The metric of `rows` over that of `reference`, paired by (prompt, seed).

    nan where the reference is 0. Raises RecordError as `difference` does.
    """
    mine, theirs, value = _compare(rows, reference, metric, rng, resamples)
    quotient = _share(np.stack([mine, theirs], axis=-1))
    return _interval(_share(np.array(value)), quotient)


def paired(rows: Sequence[Row], reference: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of both that share (prompt, seed), in the same order. Raises RecordError."""
    mine, theirs = _index(rows), _index(reference)
    common = [key for key in mine if key in theirs]
    if not common:
        raise RecordError(
            "these two methods share no (prompt, seed) and cannot be compared; "
            "write both from the same prompts and seeds."
        )
    return [mine[key] for key in common], [theirs[key] for key in common]


def _index(rows: Sequence[Row]) -> dict[tuple[int | str, int], Row]:
    found = {(row.prompt, row.seed): row for row in rows}
    if len(found) != len(rows):
        raise RecordError(
            "a (prompt, seed) occurs twice for one method; select the rows of one method and one "
            "draft length."
        )
    return found


def _prompts(rows: Sequence[Row]) -> dict[int | str, int]:
    return {prompt: index for index, prompt in enumerate(dict.fromkeys(r.prompt for r in rows))}


def _by_prompt(rows: Sequence[Row], metric: Metric, prompts: Mapping[int | str, int]) -> Floats:
    """Both sums of a metric for each prompt, (n_prompts, 2)."""
    sums = np.zeros((len(prompts), 2))
    for row in rows:
        sums[prompts[row.prompt]] += metric.terms(row)
    return sums


def _resample(sums: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    """Sums of bootstrap samples of prompts, (resamples, 2); empty with fewer than two prompts."""
    size = sums.shape[0]
    if size < 2:
        return np.empty((0, sums.shape[1]))
    drawn = rng.multinomial(size, np.full(size, 1.0 / size), size=resamples)
    return drawn @ sums


def _share(sums: Floats) -> Floats:
    """Numerators over denominators, (..., 2) -> (...); nan where the denominator is 0."""
    below = sums[..., 1]
    return np.where(below != 0.0, sums[..., 0] / np.where(below != 0.0, below, 1.0), np.nan)


def _compare(
    rows: Sequence[Row],
    reference: Sequence[Row],
    metric: Metric,
    rng: np.random.Generator,
    resamples: int,
) -> tuple[Floats, Floats, tuple[float, float]]:
    """The metric of both in each bootstrap sample, and in the texts themselves."""
    first, second = paired(rows, reference)
    prompts = _prompts(first)
    both = np.concatenate(
        [_by_prompt(first, metric, prompts), _by_prompt(second, metric, prompts)], axis=1
    )
    drawn, whole = _resample(both, rng, resamples), both.sum(axis=0)
    return (
        _share(drawn[:, :2]),
        _share(drawn[:, 2:]),
        (float(_share(whole[:2])), float(_share(whole[2:]))),
    )


def _interval(value: float | Floats, drawn: Floats) -> Estimate:
    usable = drawn[np.isfinite(drawn)]
    if not usable.size:
        return Estimate(float(value), math.nan, math.nan)
    tail = (100.0 - _LEVEL) / 2
    low, high = np.percentile(usable, [tail, 100.0 - tail])
    return Estimate(float(value), float(low), float(high))
