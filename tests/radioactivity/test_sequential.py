import dataclasses
import math

import mpmath as mp
import numpy as np
import pytest

from filigrane import GreenList, Gumbel, Tournament
from filigrane.errors import EvidenceError
from filigrane.radioactivity import Tuples, follow, log_e_value
from filigrane.schemes import Scheme
from keymaker import key_of, keys_from_seed

SCHEMES = [GreenList(context_width=1), Gumbel(context_width=1), Tournament(context_width=1)]


@pytest.mark.parametrize(
    ("s", "n"), [(0, 1), (1, 1), (30, 100), (90, 100), (5, 100), (2600, 10000)]
)
def test_green_e_value_is_the_mixture_it_says(s: int, n: int) -> None:
    with mp.workdps(40):
        gamma = mp.mpf(1) / 4

        def ratio(p: mp.mpf) -> mp.mpf:
            return (p / gamma) ** s * ((1 - p) / (1 - gamma)) ** (n - s)

        peak = min(max(mp.mpf(s) / n, gamma), mp.mpf(1))
        points = sorted({gamma, (gamma + peak) / 2, peak, (peak + 1) / 2, mp.mpf(1)})
        expected = mp.log(mp.quad(ratio, points) / (1 - gamma))
    assert log_e_value(s, n, GreenList()) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("total", "n"), [(0.5, 1), (3.0, 1), (100.0, 100), (180.0, 100), (60.0, 100)]
)
def test_gumbel_e_value_is_the_mixture_it_says(total: float, n: int) -> None:
    with mp.workdps(40):
        s = mp.mpf(total)
        expected = mp.log(
            mp.quad(lambda x: x**n * mp.exp((1 - x) * s), [0, min(n / s, 1) / 2, min(n / s, 1), 1])
        )
    assert log_e_value(total, n, Gumbel()) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_e_is_one_on_the_average_of_its_first_score(scheme: Scheme) -> None:
    # A mixture of likelihood ratios (or of exponential martingales): E[e] = 1 under H0.
    if isinstance(scheme, GreenList):
        values = [(1.0, 0.25), (0.0, 0.75)]
        mean = sum(p * math.exp(log_e_value(x, 1, scheme)) for x, p in values)
        assert mean == pytest.approx(1.0, rel=1e-9)
    elif isinstance(scheme, Gumbel):
        # Up to 40: the mean of e is as heavy-tailed as it may be, so this is slow to reach 1.
        with mp.workdps(30):
            mean = mp.quad(
                lambda x: mp.exp(log_e_value(float(x), 1, scheme) - x), [1e-9, 1, 5, 40, 400, 4000]
            )
        assert 0.98 < float(mean) <= 1.0
    else:
        rng = np.random.default_rng(0)
        bits = rng.integers(0, 2, size=(100_000, 30)) @ np.asarray(scheme.weights)
        means = [math.exp(log_e_value(float(x), 1, scheme)) for x in bits[:20_000]]
        assert np.mean(means) == pytest.approx(1.0, abs=0.02)
    assert log_e_value(0.0, 0, scheme) == 0.0


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_looking_often_does_not_reject_too_often(scheme: Scheme) -> None:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 5000, size=(400, 2), dtype=np.uint32)
    evidence = Tuples(rows=rows, name="answer count", ledger={}, n_documents=1)
    decided = [
        follow(evidence, key, scheme, looks=100).decided(0.05) is not None
        for key in keys_from_seed(2, 300)
    ]
    assert np.mean(decided) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_trace_is_decided_early(scheme: Scheme) -> None:
    from filigrane import prf

    key = key_of(b"\x05" * 32, slots=2)
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 50_000, size=(6000, 2), dtype=np.uint32)
    words = np.asarray(key.prf_keys(scheme.label))[1]
    scores = scheme.score(prf.block(words, rows[:, :1]), rows[:, 1])
    chosen = rows[np.sort(np.argsort(-scores)[:3000])]
    evidence = Tuples(rows=chosen, name="answer count", ledger={}, n_documents=1)
    found = follow(evidence, key, scheme, looks=50)
    assert found.at[-1] == 3000 and found.at.shape == found.log_e.shape == (50,)
    at = found.decided(1e-6)
    assert at is not None and at < 1500
    assert found.log_pvalue == -found.log_e.max() < math.log(1e-6)


def test_bad_input() -> None:
    evidence = Tuples(
        rows=np.zeros((1, 2), dtype=np.uint32), name="answer count", ledger={}, n_documents=1
    )
    with pytest.raises(EvidenceError, match="windows of 1 tokens for a scheme of 4"):
        follow(evidence, key_of(b"\x05" * 32), GreenList())
    with pytest.raises(EvidenceError, match="0 looks"):
        follow(evidence, key_of(b"\x05" * 32), GreenList(context_width=1), looks=0)
    read = dataclasses.replace(evidence, name="argmax count")
    with pytest.raises(EvidenceError, match="e-values are for answers"):
        follow(read, key_of(b"\x05" * 32), GreenList(context_width=1))
