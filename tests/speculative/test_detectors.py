"""Detectors of two and three key streams: laws without a mark, power with one, clear errors."""

import math
import traceback

import numpy as np
import pytest
from scipy import stats as scipy_stats

import filigrane as fg
from filigrane import stats
from filigrane.bayes import BayesianScore
from filigrane.contexts import collect
from filigrane.errors import FiligraneError, SchemeError, TooShort, VocabularyMismatch
from filigrane.kernels.prf import blocks
from filigrane.prf import COIN, block, open_uniform
from filigrane.schemes import Scheme
from filigrane.speculative.detectors import (
    detect_keyed_coin,
    detect_two_key,
    detect_two_key_bayes,
)
from keymaker import keys_from_seed

UNBIASED = [fg.Gumbel(), fg.Tournament(), fg.DeltaReweight(), fg.GammaReweight()]
by_name = pytest.mark.parametrize("scheme", UNBIASED, ids=lambda scheme: scheme.name)
KEY = keys_from_seed(41, 1)[0]
TEXT = np.random.default_rng(0).integers(0, 400, 60)
SOME_SCORE = BayesianScore(
    30,
    np.linspace(1.0, -3.0, 30),
    np.tril(np.random.default_rng(1).normal(0.0, 0.3, (30, 30)), -1),
)


def law(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.dirichlet(np.full(size, 0.4))


def blocks_at(key: fg.Key, label: str, window: list[int]) -> np.ndarray:
    return blocks(key.prf_keys(label)[:1], np.array([window], dtype=np.uint32))[0]


def pick(probs: np.ndarray, rng: np.random.Generator) -> int:
    probs = np.maximum(probs, 0.0)  # thirty rounds of a tournament may leave -1e-17
    return int(rng.choice(probs.size, p=probs / probs.sum()))


def written(
    key: fg.Key, scheme: Scheme, n: int, seed: int, *, keyed_coin: bool, vocab: int = 24
) -> tuple[np.ndarray, float]:
    """A text of sections 4.5 and 4.6 at the level of positions, and its share of drafts kept.

    Every position draws fresh laws P and Q, drafts from the marked Q, tests with P/Q and a coin,
    and writes the marked residual when the draft is refused.
    """
    rng = np.random.default_rng(seed)
    tokens, kept = rng.integers(0, vocab, scheme.context_width).tolist(), 0
    for _ in range(n):
        window = tokens[-scheme.context_width :]
        p, other = law(rng, vocab), law(rng, vocab)
        q = 0.6 * p + 0.4 * other
        drafts, target, coins = (
            blocks_at(key, scheme.label + stream, window)
            for stream in ("/draft", "/target", "/coin")
        )
        x = pick(scheme.reweight(q, drafts), rng)
        r = float(open_uniform(coins[COIN : COIN + 1])[0]) if keyed_coin else rng.random()
        if r <= p[x] / q[x]:
            kept += 1
        else:
            rest = np.maximum(p - q, 0.0)
            x = pick(scheme.reweight(rest / rest.sum(), target), rng)
        tokens.append(x)
    return np.array(tokens), kept / n


@pytest.mark.slow
@by_name
def test_two_key_pvalues_are_uniform_over_keys(scheme: Scheme) -> None:
    shares = (0.5, 0.8) if scheme.name in ("gumbel", "tournament") else (0.5,)
    for share in shares:
        found = [
            detect_two_key(TEXT, key, scheme, draft_share=share).pvalue
            for key in keys_from_seed(51, 1000)
        ]
        assert scipy_stats.kstest(found, "uniform").pvalue > 1e-4


@pytest.mark.slow
@by_name
def test_keyed_coin_pvalues_are_uniform_over_keys(scheme: Scheme) -> None:
    found = [
        detect_keyed_coin(TEXT, key, scheme, threshold=0.7).pvalue
        for key in keys_from_seed(52, 1000)
    ]
    assert scipy_stats.kstest(found, "uniform").pvalue > 1e-4


def test_realised_rates_on_simulated_fields() -> None:
    """50,000 texts without a mark: rate at 1e-2 within 0.3 points, and at 1e-3 and 1e-1."""
    rng = np.random.default_rng(5)
    repeats, n, share = 50_000, 12, 0.8
    sums = share * rng.gamma(n, size=repeats) + (1.0 - share) * rng.gamma(n, size=repeats)
    grid = np.linspace(3.0, 33.0, 151)  # p is monotone and smooth: interpolate log p
    logs = np.interp(sums, grid, [stats.log_sf_two_gammas(s, n, share) for s in grid])
    for alpha, slack in ((1e-1, 8e-3), (1e-2, 3e-3), (1e-3, 8e-4)):
        assert abs(float((logs <= math.log(alpha)).mean()) - alpha) < slack
    # Fitted to two moments, a Gamma law is far too sure: what the exact tail is for.
    shape = n / (share**2 + (1.0 - share) ** 2)
    far = 50.0
    fitted = float(scipy_stats.gamma.logsf(far, shape, scale=n / shape))
    assert stats.log_sf_two_gammas(far, n, share) > fitted + 0.5


@by_name
def test_two_key_statistic_is_the_weighted_sum(scheme: Scheme) -> None:
    key = keys_from_seed(53, 1, slots=3)[0]
    result = detect_two_key(TEXT, key, scheme)
    evidence = collect(TEXT, scheme.context_width)
    sums = []
    for slot in range(3):
        parts = [
            scheme.score(
                block(key.prf_keys(scheme.label + stream)[slot], evidence.windows), evidence.tokens
            ).sum()
            for stream in ("/draft", "/target")
        ]
        sums.append(sum(parts) / 2)
    assert result.statistic == pytest.approx(sums[result.slot], rel=1e-12)
    assert result.slot == int(np.argmax(sums))
    assert result.log_pvalue == stats.sidak(min(result.slot_log_pvalues), 3)
    assert "draft share 0.5" in result.method and "Sidak over 3 slots" in result.method


def test_ends_of_the_share_are_one_stream() -> None:
    key = keys_from_seed(54, 1, slots=2)[0]
    for scheme in UNBIASED:
        for share, stream in ((1.0, "/draft"), (0.0, "/target")):
            result = detect_two_key(TEXT, key, scheme, draft_share=share)
            evidence = collect(TEXT, scheme.context_width)
            blocks = block(key.prf_keys(scheme.label + stream)[result.slot], evidence.windows)
            total = float(scheme.score(blocks, evidence.tokens).sum())
            alone = scheme.log_sf(total, evidence.n_scored)
            assert min(result.slot_log_pvalues) == pytest.approx(alone, rel=1e-11)


def test_threshold_ends_are_one_stream() -> None:
    scheme = fg.Gumbel()
    for threshold, share in ((1.0, 1.0), (0.0, 0.0)):
        coin = detect_keyed_coin(TEXT, KEY, scheme, threshold=threshold)
        fused = detect_two_key(TEXT, KEY, scheme, draft_share=share)
        assert coin.statistic == pytest.approx(fused.statistic, rel=1e-12)
        assert coin.log_pvalue == pytest.approx(fused.log_pvalue, rel=1e-11)


@pytest.mark.parametrize("scheme", [fg.Gumbel(), fg.Tournament()], ids=lambda scheme: scheme.name)
def test_marked_texts_are_found(scheme: Scheme) -> None:
    texts = [written(KEY, scheme, 100, seed, keyed_coin=True) for seed in range(3)]
    share = float(np.mean([kept for _, kept in texts]))
    assert 0.5 < share < 0.9
    coin = [detect_keyed_coin(t, KEY, scheme, threshold=share).log10_pvalue for t, _ in texts]
    fused = [detect_two_key(t, KEY, scheme, draft_share=share).log10_pvalue for t, _ in texts]
    half = [detect_two_key(t, KEY, scheme).log10_pvalue for t, _ in texts]
    plain = [fg.detect(t, KEY, scheme).log10_pvalue for t, _ in texts]
    for found in (coin, fused, half):
        assert max(found) < -4.0
    assert min(plain) > -3.0  # the one-key stream was never used
    other = keys_from_seed(42, 1)[0]
    assert all(detect_two_key(t, other, scheme).log10_pvalue > -3.0 for t, _ in texts)


def test_a_share_near_the_truth_helps() -> None:
    scheme = fg.Gumbel()
    texts = [written(KEY, scheme, 100, seed, keyed_coin=False)[0] for seed in range(2)]

    def evidence(share: float) -> float:
        found = [detect_two_key(t, KEY, scheme, draft_share=share).log_pvalue for t in texts]
        return -float(np.sum(found))

    assert evidence(0.75) > evidence(0.5) > evidence(0.1)


def test_bayesian_mixture_is_valid_and_above_the_published_form() -> None:
    scheme = fg.Tournament()
    logs = []
    for key in keys_from_seed(55, 300):
        result = detect_two_key_bayes(TEXT, key, scheme, SOME_SCORE, draft_share=0.7)
        logs.append(result.log_pvalue)
        assert result.log_pvalue == min(0.0, -result.statistic)
    for alpha in (0.5, 0.1, 0.01):
        count = int((np.array(logs) <= math.log(alpha)).sum())
        assert scipy_stats.binom.sf(count - 1, len(logs), alpha) > 1e-4
    text, _ = written(KEY, scheme, 60, 3, keyed_coin=False)
    mixed = detect_two_key_bayes(text, KEY, scheme, SOME_SCORE, draft_share=0.7).statistic
    evidence = collect(text, scheme.context_width)
    parts = [
        SOME_SCORE.log_likelihood_ratio(
            scheme.bits(block(KEY.prf_keys(scheme.label + s)[0], evidence.windows), evidence.tokens)
        ).sum()
        for s in ("/draft", "/target")
    ]
    assert mixed > 0.7 * parts[0] + 0.3 * parts[1]


def test_shares_of_tournaments_are_rounded_and_said() -> None:
    scheme = fg.Tournament(depth=4)
    rough = detect_two_key(TEXT, KEY, scheme, draft_share=0.333)
    assert rough.method.endswith("draft share 0.33")
    assert rough.log_pvalue == detect_two_key(TEXT, KEY, scheme, draft_share=0.33).log_pvalue


def test_errors_say_what_to_do() -> None:
    gumbel = fg.Gumbel()
    with pytest.raises(SchemeError, match="use gumbel, tournament"):
        detect_two_key(TEXT, KEY, fg.GreenList())
    with pytest.raises(SchemeError, match="use gumbel, tournament"):
        detect_keyed_coin(TEXT, KEY, fg.GreenList(), threshold=0.5)
    with pytest.raises(SchemeError, match=r"draft_share must lie in \[0, 1\]"):
        detect_two_key(TEXT, KEY, gumbel, draft_share=1.5)
    with pytest.raises(SchemeError, match=r"draft_share=0\.5"):
        detect_two_key(TEXT, KEY, fg.GammaReweight(), draft_share=0.7)
    with pytest.raises(SchemeError, match="threshold must lie in"):
        detect_keyed_coin(TEXT, KEY, gumbel, threshold=math.nan)
    with pytest.raises(SchemeError, match="belongs to tournament:depth=30"):
        detect_two_key_bayes(TEXT, KEY, fg.Tournament(depth=20), SOME_SCORE)
    with pytest.raises(SchemeError, match="pass a scheme object"):
        detect_two_key(TEXT, KEY, "gumbel")  # type: ignore[arg-type]
    with pytest.raises(FiligraneError, match="tests one key"):
        detect_two_key(TEXT, KEY.users(3), gumbel)  # type: ignore[arg-type]
    with pytest.raises(TooShort):
        detect_keyed_coin([1, 2, 3], KEY, gumbel, threshold=0.5)
    with pytest.raises(VocabularyMismatch):
        detect_two_key(TEXT, KEY, gumbel, vocab_size=10)


def test_locals_of_a_traceback_show_no_key() -> None:
    class Stops(fg.Gumbel):
        def log_sf(self, total: float, n: int) -> float:
            raise RuntimeError

        def score(self, block: np.ndarray, tokens: object) -> np.ndarray:
            raise RuntimeError

    class StopsBits(fg.Tournament):
        def bits(self, block: np.ndarray, tokens: object) -> np.ndarray:
            raise RuntimeError

    calls = [
        lambda: detect_keyed_coin(TEXT, KEY, Stops(), threshold=0.5),
        lambda: detect_two_key_bayes(TEXT, KEY, StopsBits(), SOME_SCORE),
    ]
    words = [
        str(word)
        for label in ("gumbel/4", "tournament/4")
        for stream in ("/draft", "/target", "/coin")
        for word in np.asarray(KEY.prf_keys(label + stream)).ravel().tolist()
    ]
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            assert error.__traceback__ is not None
            inner = error.__traceback__.tb_next  # without this test's own locals
            report = traceback.TracebackException(type(error), error, inner, capture_locals=True)
            shown = "".join(report.format())
        assert "evidence = " in shown  # locals are there
        assert not any(word in shown for word in words)
