"""Scores that know the model's laws: their null hypotheses, their bounds, their power."""

import math

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as scipy_stats

import filigrane as fg
from filigrane import stats
from filigrane.errors import LogitsError, SchemeError
from filigrane.kernels.prf import blocks
from filigrane.prf import block, field
from filigrane.schemes import Scheme
from filigrane.speculative.whitebox import (
    BUDGETS,
    clamps,
    detect_llr,
    detect_maximin,
    detect_u,
    u_scores,
)
from keymaker import keys_from_seed

UNBIASED = [fg.Gumbel(), fg.DeltaReweight(), fg.GammaReweight(), fg.Tournament()]
U_SCHEMES = UNBIASED[:3]
by_name = pytest.mark.parametrize("scheme", UNBIASED, ids=lambda scheme: scheme.name)
by_u_name = pytest.mark.parametrize("scheme", U_SCHEMES, ids=lambda scheme: scheme.name)
KEY = keys_from_seed(61, 1)[0]
Pairs = list[tuple[np.ndarray, np.ndarray]]


def random_law(rng: np.random.Generator, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    ids = np.sort(rng.choice(500, size, replace=False)).astype(np.uint32)
    return ids, rng.dirichlet(np.full(size, 0.7))


def written(
    scheme: Scheme | None, n: int, seed: int, unmarked: float = 0.0
) -> tuple[np.ndarray, Pairs]:
    """A text of n tokens and its laws; with a scheme marked, but for a share of positions."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    laws: Pairs = []
    for t in range(n):
        ids, p = random_law(rng)
        laws.append((ids, p))
        if scheme is not None and t >= 4 and rng.random() >= unmarked:
            window = np.array([tokens[-4:]], dtype=np.uint32)
            words = blocks(KEY.prf_keys(scheme.label)[:1], window)[0]
            p = np.maximum(scheme.reweight(p, words, ids), 0.0)
            p = p / p.sum()
        tokens.append(int(rng.choice(ids, p=p)))
    return np.array(tokens), laws


def exceeds(logs: list[float]) -> bool:
    """Whether P(p <= a) <= a is refuted."""
    values = np.array(logs)
    return any(
        scipy_stats.binom.sf(int((values <= math.log(a)).sum()) - 1, values.size, a) < 1e-4
        for a in (0.5, 0.2, 0.05, 0.01)
    )


def test_clamps_are_hubers_least_favourable_pair() -> None:
    rng = np.random.default_rng(1)
    for case in range(60):
        p = rng.dirichlet(np.full(9, 0.5))
        q = rng.dirichlet(np.full(9, 0.5)) if case % 3 else np.eye(9)[case % 9]
        low, high = clamps(p, q / p)
        distance = 0.5 * np.abs(p - q).sum()
        for a, c0, c1 in zip(BUDGETS, low, high, strict=True):
            if a >= distance - 1e-9:
                assert c0 == c1 == 1.0
                continue
            assert c0 < 1.0 < c1
            assert np.maximum(q - c1 * p, 0.0).sum() == pytest.approx(a, abs=1e-12)
            assert np.maximum(c0 * p - q, 0.0).sum() == pytest.approx(a, abs=1e-12)
            robust = p * np.clip(q / p, c0, c1)
            # A law, within a of the marked one: so its ratio to p has mean one under p.
            assert robust.sum() == pytest.approx(1.0, abs=1e-12)
            assert 0.5 * np.abs(robust - q).sum() <= a + 1e-12


def test_clamps_maximise_the_least_mean() -> None:
    """Under every law within the budget the robust score's mean is at least its own divergence."""
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.full(5, 0.3))
    a = 0.15
    (low,), (high,) = clamps(p, q / p, [a])
    score = np.log(np.clip(q / p, low, high))
    least = float((p * np.exp(score)) @ score)
    # The worst law moves a from the largest scores to the smallest: a linear programme.
    bounds = [(0.0, 1.0)] * 5 + [(0.0, None)] * 5
    above = np.block([[np.eye(5), -np.eye(5)], [-np.eye(5), -np.eye(5)]])
    worst = optimize.linprog(
        np.concatenate([score, np.zeros(5)]),
        A_ub=np.vstack([above, np.concatenate([np.zeros(5), np.ones(5)])]),
        b_ub=np.concatenate([q, -q, [2 * a]]),
        A_eq=np.concatenate([np.ones(5), np.zeros(5)])[None],
        b_eq=[1.0],
        bounds=bounds,
    )
    assert worst.fun == pytest.approx(least, abs=1e-9)


def test_one_hot_clamps_in_closed_form() -> None:
    p = np.array([0.2, 0.5, 0.3])
    low, high = clamps(p, np.array([5.0, 0.0, 0.0]))
    for a, c0, c1 in zip(BUDGETS, low, high, strict=True):
        expected = (a / 0.8, (1.0 - a) / 0.2) if a < 0.8 - 1e-9 else (1.0, 1.0)
        assert (c0, c1) == pytest.approx(expected, abs=1e-12)


def test_a_law_of_one_token_scores_nothing() -> None:
    low, high = clamps(np.array([1.0]), np.array([1.0]))
    assert set(low) == set(high) == {1.0}


@by_u_name
def test_u_scores_are_uniform_and_bound_the_exact_tail(scheme: Scheme) -> None:
    text, _ = written(None, 60, 1)
    exact, bound = [], []
    for key in keys_from_seed(71, 150):
        result = detect_u(text, key, scheme)
        bound.append(result.log_pvalue)
        exact.append(math.exp(stats.log_sf_irwin_hall(result.statistic, result.n_scored)))
        assert result.log_pvalue >= math.log(exact[-1])
    assert scipy_stats.kstest(exact, "uniform").pvalue > 1e-4
    assert not exceeds(bound)
    if scheme.name != "gumbel":  # the exact tail of the very same sum
        assert fg.detect(text, KEY, scheme).statistic == pytest.approx(
            detect_u(text, KEY, scheme).statistic, rel=1e-12
        )


def test_u_score_of_the_race_is_one_minus_its_number() -> None:
    words = block(KEY.prf_keys("gumbel/4")[0], np.array([[1, 2, 3, 4]]))
    number = int(field(words[0, :4], 7))
    assert u_scores(words, np.array([7]), fg.Gumbel())[0] == (2**32 - 1 - number) / 2**32


@by_name
def test_llr_has_mean_one_over_keys_for_any_text(scheme: Scheme) -> None:
    """The first null hypothesis: an arbitrary token, a random key."""
    rng = np.random.default_rng(3)
    ids, p = random_law(rng, 5)
    keyed = rng.integers(0, 2**32, (4000, 8), dtype=np.uint32)
    ratios = scheme.reweight(np.tile(p, (4000, 1)), keyed, ids) / p
    error = ratios.std(axis=0) / math.sqrt(len(keyed))
    assert (np.abs(ratios.mean(axis=0) - 1.0) < 4.5 * error).all()


@by_name
def test_llr_and_maximin_hold_their_level_on_unmarked_text(scheme: Scheme) -> None:
    llr, robust = [], []
    for seed in range(25):
        text, laws = written(None, 24, 1000 + seed)
        llr.append(detect_llr(text, laws, KEY, scheme).log_pvalue)
        robust.append(detect_maximin(text, laws, KEY, scheme).log_pvalue)
    assert not exceeds(llr) and not exceeds(robust)
    assert max(robust) <= 0.0 and min(llr) <= 0.0


@pytest.mark.slow
@by_name
def test_maximin_holds_its_level_on_many_unmarked_texts(scheme: Scheme) -> None:
    """Clamped ratios have mean one under the laws, position by position and for a text."""
    logs = [
        detect_maximin(*written(None, 9, 5000 + seed), KEY, scheme, budgets=(0.3,)).statistic
        for seed in range(1200)
    ]
    ratios = np.exp(logs)
    error = 4.5 * ratios.std() / math.sqrt(ratios.size)
    assert ratios.mean() - 1.0 < error
    # A few texts carry most of the mean where ratios are spread wide: too rare to be in a sample.
    assert scheme.name == "tournament" or ratios.mean() - 1.0 > -error
    assert not exceeds([min(0.0, -value) for value in logs])


@by_name
def test_marked_text_is_found(scheme: Scheme) -> None:
    text, laws = written(scheme, 50, 7)
    llr = detect_llr(text, laws, KEY, scheme)
    robust = detect_maximin(text, laws, KEY, scheme)
    assert llr.log10_pvalue < -4.0 and robust.log10_pvalue < -3.0
    assert robust.log_pvalue == pytest.approx(math.log(len(BUDGETS)) - robust.statistic)
    assert llr.log_pvalue == -llr.statistic
    # Budget 0 is the plain ratio, so maximin is at most log 10 behind.
    assert robust.log_pvalue <= llr.log_pvalue + math.log(10) + 1e-9
    if scheme.deterministic:  # one-hot: each token carries all its information
        information = -sum(
            math.log(p[ids == token][0]) for token, (ids, p) in zip(text[4:], laws[4:], strict=True)
        )
        assert llr.statistic == pytest.approx(information, rel=1e-12)
    assert "text drawn from the laws" in robust.method and "random key" in llr.method


@pytest.mark.parametrize("scheme", [fg.Gumbel(), fg.DeltaReweight()], ids=lambda s: s.name)
def test_maximin_survives_what_ruins_the_ratio(scheme: Scheme) -> None:
    text, laws = written(scheme, 80, 8, unmarked=0.15)
    assert detect_llr(text, laws, KEY, scheme).statistic == -math.inf
    assert detect_llr(text, laws, KEY, scheme).log_pvalue == 0.0
    assert detect_maximin(text, laws, KEY, scheme).log10_pvalue < -6.0
    assert detect_maximin(text, laws, KEY, scheme, budgets=(0.0,)).log_pvalue == 0.0


def test_slots_and_excluded_tokens() -> None:
    scheme = fg.GammaReweight()
    key = keys_from_seed(62, 1, slots=3)[0]
    text, laws = written(None, 30, 9)
    result = detect_llr(text, laws, key, scheme)
    assert result.log_pvalue == stats.bonferroni(min(result.slot_log_pvalues), 3)
    assert "Bonferroni over 3 slots" in result.method
    # A token that its law excludes counts nothing, under every key.
    foreign = text.copy()
    foreign[-1] = 900
    shorter = detect_llr(text[:-1], laws[:-1], key, scheme)
    assert detect_llr(foreign, laws, key, scheme).statistic == pytest.approx(shorter.statistic)


def test_errors_say_what_to_do() -> None:
    text, laws = written(None, 20, 10)
    gumbel = fg.Gumbel()
    with pytest.raises(LogitsError, match="19 laws for 20 tokens; pass one"):
        detect_llr(text, laws[:-1], KEY, gumbel)
    broken = [*laws[:10], (laws[10][0], 2.0 * laws[10][1]), *laws[11:]]
    with pytest.raises(LogitsError, match="law 10 must be at least 0 and sum to one"):
        detect_maximin(text, broken, KEY, gumbel)
    with pytest.raises(LogitsError, match="law 10 must be"):
        detect_llr(text, [*laws[:10], (laws[10][0][:-1], laws[10][1]), *laws[11:]], KEY, gumbel)
    with pytest.raises(SchemeError, match="budgets must be numbers"):
        detect_maximin(text, laws, KEY, gumbel, budgets=())
    with pytest.raises(SchemeError, match="changes the law of the text"):
        detect_llr(text, laws, KEY, fg.GreenList())
    with pytest.raises(SchemeError, match="has no U score"):
        detect_u(text, KEY, fg.Tournament())
