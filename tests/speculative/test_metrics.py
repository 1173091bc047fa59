"""Metrics on rows whose answer is known: closed forms, counts by hand, coverage of intervals."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from filigrane import stats
from filigrane.errors import RecordError
from filigrane.speculative import metrics
from filigrane.speculative.metrics import (
    AATPS,
    ANLPPT,
    ANLPPT_A,
    ANLPPT_U,
    CALL,
    LOGPPL,
    NODES,
    PTT,
    Row,
    acceptance,
    difference,
    estimate,
    paired,
    pooled_rates,
    rate_a,
    rate_u,
    ratio,
    tpr,
)


def row(prompt: int = 0, seed: int = 0, **changes: Any) -> Row:
    """Three blocks of K = 2: all kept, one kept, none kept; 6 tokens, 4 of them scored."""
    values: dict[str, Any] = {
        "method": "otmc",
        "draft_length": 2,
        "n_tokens": 6,
        "n_scored": 4,
        "sum_u": 3.0,
        "sum_a": 10.0,
        "log_pvalue": -5.0,
        "log_likelihood": -9.0,
        "emitted": np.array([3, 2, 1]),
        "proposed": np.array([2, 2, 2]),
        "accepted": np.array([2, 1, 0]),
        "nodes": np.array([2, 2, 2]),
        "seconds": np.array([1.0, 1.2, 1.5]),
    }
    return Row(prompt=prompt, seed=seed, **values | changes)


def value(metric: metrics.Metric, *rows: Row) -> float:
    return estimate(rows, metric, np.random.default_rng(0)).value


def test_counts_by_hand() -> None:
    one = row()
    two = row(prompt=1, emitted=np.array([1]), seconds=np.array([9.0]), nodes=np.array([5]))
    assert value(AATPS, one) == 2.0 and value(AATPS, one, two) == 7 / 4
    # The first block is neither in the time nor among the tokens; a text of one block adds nothing.
    assert value(PTT, one) == pytest.approx(500 / 3)
    assert value(PTT, one, two) == pytest.approx(500 / 3)
    assert math.isnan(value(PTT, two))
    assert value(CALL, one, two) == pytest.approx(250.0)
    assert value(NODES, one, two) == 11 / 4
    assert value(ANLPPT, one) == pytest.approx(5 / 6)


def test_log_perplexity_is_token_weighted() -> None:
    long, short = row(n_tokens=30, log_likelihood=-30.0), row(n_tokens=10, log_likelihood=-50.0)
    assert value(LOGPPL, long, short) == 2.0


def test_rate_u_is_the_chernoff_exponent() -> None:
    means = np.array([0.3, 0.5, 0.5001, 0.55, 0.644, 0.78, 0.9, 0.99])
    for mean, rate in zip(means, rate_u(means), strict=True):
        expected = optimize.minimize_scalar(
            lambda t, m=mean: np.log(np.expm1(t) / t) - t * m,
            bounds=(1e-9, 600.0),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert rate == pytest.approx(max(0.0, -expected.fun), rel=1e-6, abs=1e-9)
    # Far out the tilt is 1/(1 - mean), which leaves -log(1 - mean) - 1.
    assert float(rate_u(1 - 1e-9)) == pytest.approx(9 * math.log(10) - 1, abs=1e-6)
    assert rate_u([0.0, 0.5]).tolist() == [0.0, 0.0] and math.isnan(rate_u(math.nan))
    assert 30 < float(rate_u(1.0)) < 40  # all that 53 bits can say, and no infinity
    # A bound on the exact tail, and tight in the exponent.
    for n, mean in ((20, 0.7), (200, 0.6)):
        exact = stats.log_sf_irwin_hall(n * mean, n)
        assert exact <= -n * float(rate_u(mean)) < exact + 1.5 + math.log(n)


def test_rate_a_is_the_chernoff_exponent() -> None:
    assert rate_a([0.0, 0.5, 1.0]).tolist() == [0.0, 0.0, 0.0] and math.isnan(rate_a(math.nan))
    # The figures of a published simulation: E[a] 2.651 and 1.841 give .6760 and .2304.
    assert rate_a([2.651, 1.841]) == pytest.approx([0.6760, 0.2304], abs=5e-4)
    assert rate_u([0.7796, 0.6441]) == pytest.approx([0.5245, 0.1280], abs=5e-4)
    for n, mean in ((20, 1.8), (200, 1.3)):
        exact = stats.log_sf_gamma(n * mean, n)
        assert exact <= -n * float(rate_a(mean)) < exact + 1.5 + math.log(n)


def test_skipped_tokens_count_in_the_denominator() -> None:
    assert value(ANLPPT_U, row()) == pytest.approx(4 * float(rate_u(0.75)) / 6)
    assert value(ANLPPT_A, row()) == pytest.approx(4 * float(rate_a(2.5)) / 6)
    short = row(prompt=1, n_tokens=4, n_scored=0, sum_u=math.nan, sum_a=math.nan, log_pvalue=0.0)
    assert value(ANLPPT_U, row(), short) == pytest.approx(4 * float(rate_u(0.75)) / 10)
    assert pooled_rates([row(), short]) == pytest.approx(
        (0.4 * float(rate_u(0.75)), 0.4 * float(rate_a(2.5)))
    )
    assert all(math.isnan(rate) for rate in pooled_rates([short]))


def test_pooled_rates_forget_the_luck_of_single_texts() -> None:
    rng = np.random.default_rng(1)
    drawn = rng.random((100, 200))
    texts = [
        row(prompt=i, n_tokens=200, n_scored=200, sum_u=u.sum(), sum_a=-np.log(u).sum())
        for i, u in enumerate(drawn)
    ]
    u, a = pooled_rates(texts)
    assert 0 <= u < 2e-4 and 0 <= a < 2e-4
    assert value(ANLPPT_U, *texts) > 6e-4 and value(ANLPPT_A, *texts) > 6e-4


def test_a_scheme_without_the_scores_has_no_rates() -> None:
    other = row(sum_u=math.nan, sum_a=math.nan)
    assert math.isnan(value(ANLPPT_U, other)) and math.isnan(value(ANLPPT_A, other))
    assert value(ANLPPT, other) == pytest.approx(5 / 6)


def test_acceptance_by_position() -> None:
    share, reached = acceptance([row()])
    assert share.tolist() == [2 / 3, 1 / 2] and reached.tolist() == [3, 2]
    # A draft that ended early offered no second token; nobody ever reached a third.
    cut = row(proposed=np.array([1, 3]), accepted=np.array([1, 1]))
    share, reached = acceptance([cut])
    assert share[:2].tolist() == [1.0, 0.0] and math.isnan(share[2])
    assert reached.tolist() == [2, 1, 0]
    assert acceptance([])[0].shape == (0,)


def test_iid_acceptance_gives_the_closed_form() -> None:
    rng, alpha, depth = np.random.default_rng(2), 0.6, 4
    kept = (np.cumprod(rng.random((20_000, depth)) < alpha, axis=1)).sum(axis=1)
    text = row(
        proposed=np.full(kept.shape, depth), accepted=kept, emitted=kept + 1, nodes=kept * 0 + depth
    )
    assert value(AATPS, text) == pytest.approx((1 - alpha**5) / (1 - alpha), abs=0.03)
    assert acceptance([text])[0] == pytest.approx([alpha] * depth, abs=0.03)


def test_tpr_at_lengths() -> None:
    edge = math.log(0.01)
    texts = [
        row(prompt=0, log_pvalue=edge, prefixes={8: -1.0, 16: -9.0}),
        row(prompt=1, log_pvalue=edge + 1e-9, prefixes={8: -9.0}),
    ]
    assert value(tpr(), *texts) == 0.5 and value(tpr(alpha=0.1), *texts) == 1.0
    assert value(tpr(8), *texts) == 0.5 and value(tpr(16), *texts) == 1.0
    assert math.isnan(value(tpr(32), *texts))


def test_pairs_are_of_one_prompt_and_seed() -> None:
    mine = [row(prompt=p, seed=s) for p in range(3) for s in range(2)]
    theirs = [row(prompt=p, seed=s, log_pvalue=-2.0) for s in (1, 2) for p in (2, 1)]
    first, second = paired(mine, theirs)
    names = [(r.prompt, r.seed) for r in first]
    assert names == [(r.prompt, r.seed) for r in second] and sorted(names) == [(1, 1), (2, 1)]
    with pytest.raises(RecordError, match="share no"):
        paired(mine, [row(prompt=7)])
    with pytest.raises(RecordError, match="twice"):
        paired([*mine, mine[0]], theirs)


def texts_of_a_study(rng: np.random.Generator, n: int) -> tuple[list[Row], list[Row]]:
    """Two methods whose difference in AATPS is 0.5 for every prompt, with hard and easy prompts."""
    mine, theirs = [], []
    for prompt, level in enumerate(rng.normal(6.0, 2.0, n)):
        for seed in range(2):
            noise = rng.normal(0.0, 0.2, 2)
            calls = np.zeros(4, dtype=np.int64)
            low, high = level + noise[0], level + 0.5 + noise[1]
            mine.append(row(prompt, seed, emitted=calls + high, log_pvalue=-2 * high))
            theirs.append(row(prompt, seed, emitted=calls + low, log_pvalue=-high))
    return mine, theirs


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(3)
    mine, theirs = texts_of_a_study(rng, 40)
    alone = estimate(mine, AATPS, rng)
    both = difference(mine, theirs, AATPS, rng)
    assert both.low < 0.5 < both.high
    assert both.high - both.low < 0.25 * (alone.high - alone.low)
    half = ratio(mine, theirs, ANLPPT, rng)
    assert half.value == pytest.approx(2.0) and half.low == pytest.approx(half.high)


def test_intervals_cover() -> None:
    """95 % intervals hold the truth about 95 times in 100, and are not trivially wide."""
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(120):
        mine, theirs = texts_of_a_study(rng, 30)
        found = difference(mine, theirs, AATPS, rng, resamples=200)
        inside += found.low <= 0.5 <= found.high
    assert 0.86 < inside / 120 < 0.995


def test_intervals_repeat_and_need_two_prompts() -> None:
    mine, theirs = texts_of_a_study(np.random.default_rng(5), 10)
    first, again = (ratio(mine, theirs, AATPS, np.random.default_rng(6)) for _ in range(2))
    assert first == again and first.low < first.value < first.high
    one = estimate(mine[:2], AATPS, np.random.default_rng(0))
    assert one.value > 0 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(estimate([], AATPS, np.random.default_rng(0)).value)
    nothing = [row(prompt=p, seed=s, log_pvalue=0.0) for p in range(10) for s in range(2)]
    assert math.isnan(ratio(mine, nothing, ANLPPT, np.random.default_rng(0)).value)
