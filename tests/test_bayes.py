"""The trained score of tournaments: what fitting finds, and p-values that hold whatever comes."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

import filigrane as fg
from filigrane import bayes, stats
from filigrane.bayes import BayesianScore, detect_bayes, importance_log_pvalues, keyed_bits
from filigrane.errors import FiligraneError, RecordError, SchemeError, TooShort
from filigrane.prf import block
from filigrane.toy import ZipfModel
from keymaker import keys_from_seed

KEY = keys_from_seed(81, 1)[0]
SCHEME = fg.Tournament()
TEXT = np.random.default_rng(0).integers(0, 400, 40)


def some_score(depth: int = 30, seed: int = 1) -> BayesianScore:
    rng = np.random.default_rng(seed)
    delta = np.tril(rng.normal(0.0, 0.4, (depth, depth)), -1)
    return BayesianScore(depth, np.linspace(1.5, -2.5, depth), delta)


def drawn(score: BayesianScore, n: int, seed: int) -> np.ndarray:
    """Bits of n marked positions under the score's own model."""
    rng = np.random.default_rng(seed)
    bits = np.zeros((n, score.depth))
    for layer in range(score.depth):
        psi = score.probabilities(bits)[:, layer]
        bits[:, layer] = rng.random(n) < 0.5 + 0.25 * psi
    return bits


def marked(seed: int, n: int = 120) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return fg.embed(ZipfModel(200), [1], n, KEY, SCHEME, rng=rng).tokens


def test_ratio_by_hand() -> None:
    score = BayesianScore(2, np.array([0.0, 1.0]), np.array([[0.0, 0.0], [2.0, 0.0]]))

    def psi(x: float) -> float:
        return 1.0 / (1.0 + math.exp(-x))

    for first in (0, 1):
        for second in (0, 1):
            expected = math.log(1 + (2 * first - 1) * psi(0.0) / 2) + math.log(
                1 + (2 * second - 1) * psi(1.0 + 2.0 * first) / 2
            )
            got = score.log_likelihood_ratio([[first, second]])
            assert got.shape == (1,) and got[0] == pytest.approx(expected, rel=1e-13)


def test_the_ratio_has_mean_one_under_fair_bits() -> None:
    score = some_score(8)
    every = (np.arange(256)[:, None] >> np.arange(8)) & 1
    assert np.exp(score.log_likelihood_ratio(every)).mean() == pytest.approx(1.0, abs=1e-14)


def test_fit_finds_the_model_that_drew_the_bits() -> None:
    truth = BayesianScore(4, [1.0, 0.0, -0.5, 0.5], np.tril(np.full((4, 4), 0.8), -1))
    found = BayesianScore.fit(drawn(truth, 60_000, 2), penalty=1e-3)
    every = (np.arange(16)[:, None] >> np.arange(4)) & 1
    assert np.abs(found.probabilities(every) - truth.probabilities(every)).max() < 0.08
    held_out = drawn(truth, 20_000, 3)
    gain = (truth.log_likelihood_ratio(held_out) - found.log_likelihood_ratio(held_out)).mean()
    assert abs(gain) < 5e-4


def test_fit_is_a_maximum() -> None:
    """No small change of a parameter raises the penalised likelihood by what the fit leaves."""
    bits = drawn(some_score(5), 3000, 4)
    found = BayesianScore.fit(bits, penalty=2.0)

    def objective(score: BayesianScore) -> float:
        size = (score.beta**2).sum() + (score.delta**2).sum()
        return float(score.log_likelihood_ratio(bits).sum() - size)

    top = objective(found)
    for layer in range(5):
        for step in (0.2, -0.2):
            beta = found.beta.copy()
            beta[layer] += step
            assert objective(BayesianScore(5, beta, found.delta)) < top + 0.01


@pytest.mark.slow
def test_fit_takes_seconds() -> None:
    bits = drawn(some_score(), 20_000, 5)
    start = time.perf_counter()
    BayesianScore.fit(bits)
    assert time.perf_counter() - start < 30.0  # usually 2


def test_markov_bound_holds_over_keys() -> None:
    logs = np.array(
        [detect_bayes(TEXT, k, SCHEME, some_score()).log_pvalue for k in keys_from_seed(82, 500)]
    )
    for alpha in (0.5, 0.1, 0.02):
        count = int((logs <= math.log(alpha)).sum())
        assert scipy_stats.binom.sf(count - 1, logs.size, alpha) > 1e-4


def test_importance_pvalues_hold_their_level() -> None:
    """Fair bits: P(p <= a) <= a at every size, also far below 1/N; and not by being useless."""
    rng = np.random.default_rng(6)
    score, n, repeats = some_score(6), 5, 800
    logs = []
    for _ in range(repeats):
        bits = rng.integers(0, 2, (n, 6))
        total = float(score.log_likelihood_ratio(bits).sum())
        mixed = bayes._mixed_log_ratio(score, bits)
        logs += importance_log_pvalues([total], [mixed], score, n, 40, rng)
    found = np.exp(logs)
    for alpha in (0.5, 0.2, 0.1, 0.05, 0.01, 0.002):
        count = int((found <= alpha).sum())
        assert scipy_stats.binom.sf(count - 1, repeats, alpha) > 1e-4
    assert (found <= 0.1).mean() > 0.05


@pytest.mark.slow
def test_importance_rates_at_one_percent() -> None:
    rng = np.random.default_rng(7)
    score, n, repeats = some_score(10), 8, 12_000
    logs = []
    for _ in range(repeats // 20):
        bits = rng.integers(0, 2, (20, n, 10))
        totals = score.log_likelihood_ratio(bits).sum(axis=1).tolist()
        mixed = [bayes._mixed_log_ratio(score, b) for b in bits]
        logs += importance_log_pvalues(totals, mixed, score, n, 400, rng)
    found = np.exp(logs)
    assert abs((found <= 0.01).mean() - 0.01) < 0.003
    assert scipy_stats.kstest(found, "uniform").statistic < 0.05


def test_importance_pvalues_are_the_tail() -> None:
    """Against all 2**10 outcomes."""
    score, n = some_score(5), 2
    every = (np.arange(1024)[:, None] >> np.arange(10)) & 1
    totals = score.log_likelihood_ratio(every.reshape(1024, 2, 5)).sum(axis=1)
    rng = np.random.default_rng(8)
    for rank in (1, 20, 200, 600):
        at = int(np.argsort(-totals)[rank - 1])
        exact = math.log((totals >= totals[at] - 1e-9).mean())
        mixed = bayes._mixed_log_ratio(score, every[at].reshape(2, 5))
        (got,) = importance_log_pvalues([float(totals[at])], [mixed], score, n, 20_000, rng)
        assert got == pytest.approx(exact, abs=0.1)


def test_the_observation_weighs_in() -> None:
    """Far beyond all simulated texts p is the observation's own weight over N + 1, never zero."""
    score, rng = some_score(12), np.random.default_rng(10)
    bits = np.ones((40, 12))
    total = float(score.log_likelihood_ratio(bits).sum())
    mixed = bayes._mixed_log_ratio(score, bits)
    assert total - math.log(5) <= mixed < total
    (got,) = importance_log_pvalues([total], [mixed], score, 40, 30, rng)
    assert got == pytest.approx(-mixed - math.log(31), rel=1e-12)


def test_marked_text_is_found_and_sharper_than_the_bound() -> None:
    train = np.concatenate([keyed_bits(marked(seed), KEY, SCHEME) for seed in range(8)])
    score = BayesianScore.fit(train, penalty=3.0)
    rng = np.random.default_rng(9)
    for seed in (100, 101):
        text = marked(seed, 80)
        bound = detect_bayes(text, KEY, SCHEME, score)
        sharp = detect_bayes(text, KEY, SCHEME, score, n_simulations=400, rng=rng)
        assert bound.log10_pvalue < -2.0
        assert sharp.log_pvalue < bound.log_pvalue - 1.0
        assert sharp.statistic == bound.statistic
        assert "Markov" in bound.method and "400 simulated texts" in sharp.method
        bits = keyed_bits(text, KEY, SCHEME)
        assert bound.statistic == pytest.approx(score.log_likelihood_ratio(bits).sum())
        other = keys_from_seed(83, 1)[0]
        assert detect_bayes(text, other, SCHEME, score).log10_pvalue > -3.0


def test_keyed_bits_are_those_of_the_scheme() -> None:
    key = keys_from_seed(84, 1, slots=2)[0]
    evidence = fg.contexts.collect(TEXT, 4)
    for slot in (0, 1):
        words = block(key.prf_keys(SCHEME.label)[slot], evidence.windows)
        expected = SCHEME.bits(words, evidence.tokens)
        assert np.array_equal(keyed_bits(TEXT, key, SCHEME, slot=slot), expected)


def test_slots_pay_bonferroni() -> None:
    key = keys_from_seed(85, 1, slots=4)[0]
    result = detect_bayes(TEXT, key, SCHEME, some_score())
    assert result.log_pvalue == stats.bonferroni(min(result.slot_log_pvalues), 4)
    assert "Bonferroni over 4 slots" in result.method


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    score = some_score()
    score.save(path)
    again = BayesianScore.load(path)
    assert again.depth == 30
    assert np.array_equal(again.beta, score.beta) and np.array_equal(again.delta, score.delta)
    good = json.loads(path.read_text())
    for change in (
        {"format": "other"},
        {"depth": 29},
        {"depth": "30"},
        {"beta": good["beta"][:-1]},
        {"beta": [math.nan] * 30},
        {"delta": [[]] * 30},
        {"delta": 3},
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(RecordError, match="holds no Bayesian score"):
            BayesianScore.load(path)
    path.write_text("{")
    with pytest.raises(RecordError, match="write one with save"):
        BayesianScore.load(path)
    with pytest.raises(RecordError):
        BayesianScore.load(tmp_path / "missing.json")


def test_errors_say_what_to_do() -> None:
    score = some_score()
    with pytest.raises(SchemeError, match="strictly lower triangular"):
        BayesianScore(2, [0.0, 0.0], [[0.0, 1.0], [0.0, 0.0]])
    with pytest.raises(SchemeError, match="shape"):
        BayesianScore(3, [0.0, 0.0], np.zeros((3, 3)))
    with pytest.raises(SchemeError, match="see keyed_bits"):
        BayesianScore.fit([1, 0, 1])
    with pytest.raises(SchemeError, match="0 or 1"):
        BayesianScore.fit([[2, 0]])
    with pytest.raises(SchemeError, match="penalty must be above 0"):
        BayesianScore.fit([[1, 0]], penalty=0.0)
    with pytest.raises(SchemeError, match="fit one on bits of that scheme"):
        detect_bayes(TEXT, KEY, fg.Tournament(depth=20), score)
    with pytest.raises(SchemeError, match="fit one on bits of that scheme"):
        detect_bayes(TEXT, KEY, fg.Gumbel(), score)  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="only a tournament"):
        keyed_bits(TEXT, KEY, fg.Gumbel())  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="slot 1"):
        keyed_bits(TEXT, KEY, SCHEME, slot=1)
    with pytest.raises(FiligraneError, match="rng=numpy"):
        detect_bayes(TEXT, KEY, SCHEME, score, n_simulations=10)
    with pytest.raises(FiligraneError, match="tests one key"):
        detect_bayes(TEXT, KEY.users(2), SCHEME, score)  # type: ignore[arg-type]
    with pytest.raises(TooShort):
        detect_bayes([1, 2], KEY, SCHEME, score)
