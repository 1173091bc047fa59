import numpy as np
import pytest

import filigrane as fg
from filigrane.errors import FiligraneError
from filigrane.schemes import Scheme
from filigrane.toy import ZipfModel
from keymaker import key_of, keys_from_seed

ALL = [scheme() for scheme in fg.SCHEMES.values()]
by_name = pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
ROOT = key_of(b"\x05" * 32, "root", slots=2)


@by_name
def test_the_right_user_is_named_and_nobody_else(scheme: Scheme) -> None:
    rng = np.random.default_rng(1)
    lm = ZipfModel(500, 1.0)
    marked, unmarked, outsider = fg.embed_batch(
        lm, [[1]] * 3, 250, [ROOT.user(4321), None, ROOT.user(5001)], scheme, rng=rng
    )
    users = ROOT.users(5000)
    found = fg.trace(marked.tokens, users, scheme)
    assert found.named(1e-6) == ("root/4321",)
    assert found.candidates[0].index == 4321
    assert (found.n_candidates, found.n_tests) == (5000, 10_000)
    assert fg.trace(unmarked.tokens, users, scheme).named(1e-3) == ()
    assert fg.trace(outsider.tokens, users, scheme).named(1e-3) == ()


@by_name
def test_trace_agrees_with_detect(scheme: Scheme) -> None:
    rng = np.random.default_rng(2)
    text = fg.embed(ZipfModel(300), [1], 80, ROOT.user(3), scheme, rng=rng).tokens
    alone = fg.trace(text, ROOT.users(range(3, 4)), scheme)
    assert alone.candidates[0].log_pvalue == fg.detect(text, ROOT.user(3), scheme).log_pvalue
    # Every candidate and every sum, against one test at a time.
    many = fg.trace(text, ROOT.users(40), scheme, top=40)
    for candidate in many.candidates:
        result = fg.detect(text, ROOT.user(candidate.index), scheme)
        assert candidate.statistic == pytest.approx(result.statistic, rel=1e-12)
        assert candidate.log_pvalue >= result.log_pvalue
    logs = [candidate.log_pvalue for candidate in many.candidates]
    assert logs == sorted(logs)


def test_independent_keys_and_ranges() -> None:
    keys = keys_from_seed(3, 30)
    rng = np.random.default_rng(3)
    text = fg.embed(ZipfModel(300), [1], 100, keys[17], fg.Gumbel(), rng=rng).tokens
    assert fg.trace(text, keys, fg.Gumbel()).named(1e-6) == ("k17",)
    assert fg.trace(text, keys[:10], fg.Gumbel(), top=3).named(1e-6) == ()


def test_family_wise_error_over_roots() -> None:
    """The smallest adjusted p of a trace among innocents is uniform: no luck by numbers."""
    text = np.random.default_rng(4).integers(0, 1000, 60)
    best = [
        fg.trace(text, key.users(300), fg.Gumbel(), top=1, workers=1).candidates[0].log_pvalue
        for key in keys_from_seed(5, 200)
    ]
    from scipy import stats as scipy_stats

    assert scipy_stats.kstest(np.exp(best), "uniform").pvalue > 1e-3


def test_several_named_users_are_all_corrected() -> None:
    """Two users' texts joined as one claim: both are found, each paying for the others."""
    rng = np.random.default_rng(6)
    scheme = fg.Gumbel()
    texts = fg.embed_batch(
        ZipfModel(2000, 0.8), [[1], [2]], 200, [ROOT.user(10), ROOT.user(20)], scheme, rng=rng
    )
    found = fg.trace(fg.Corpus([text.tokens for text in texts]), ROOT.users(1000), scheme)
    assert set(found.named(1e-6)) == {"root/10", "root/20"}


def test_progress_and_workers() -> None:
    text = np.arange(50)
    seen: list[tuple[int, int]] = []
    one = fg.trace(text, ROOT.users(40_000), fg.Gumbel(), workers=1)
    two = fg.trace(
        text, ROOT.users(40_000), fg.Gumbel(), workers=2, progress=lambda *now: seen.append(now)
    )
    assert one == two
    assert seen[-1] == (40_000, 40_000) and seen == sorted(seen)


def test_interrupt_stops_the_scan() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fg.trace(np.arange(50), ROOT.users(10**7), fg.Gumbel(), progress=stop)


def test_bad_requests() -> None:
    text = np.arange(50)
    with pytest.raises(FiligraneError, match="at least one key"):
        fg.trace(text, [], fg.Gumbel())
    with pytest.raises(FiligraneError, match="same number of slots"):
        fg.trace(text, [ROOT, *keys_from_seed(1, 1)], fg.Gumbel())
    result = fg.trace(text, ROOT.users(5), fg.Gumbel())
    with pytest.raises(TypeError, match="named"):
        bool(result)
    with pytest.raises(ValueError, match="alpha"):
        result.named(0.0)
