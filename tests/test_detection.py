import math
import pickle
import traceback
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

import filigrane as fg
from filigrane.errors import FiligraneError, TooShort, VocabularyMismatch
from filigrane.schemes import Scheme
from filigrane.toy import ZipfModel
from keymaker import key_of, keys_from_seed

ALL = [scheme() for scheme in fg.SCHEMES.values()]
by_name = pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
KEY = keys_from_seed(21, 1, slots=4)[0]
RNG = np.random.default_rng(0)


def zipf_text(length: int, seed: int) -> np.ndarray:
    """Unmarked text with the repetitions of text: frequent words are very frequent."""
    return np.random.default_rng(seed).zipf(1.4, length) % 5000


def pvalues(scheme: Scheme, text: np.ndarray, count: int, seed: int) -> np.ndarray:
    return np.array([fg.detect(text, key, scheme).pvalue for key in keys_from_seed(seed, count)])


def too_small(pvalues: np.ndarray, level: float) -> bool:
    """Whether P(p <= a) <= a is refuted at some a, with an exact binomial bound per a."""
    alphas = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
    counts = [int((pvalues <= alpha).sum()) for alpha in alphas]
    bounds = [
        float(scipy_stats.binom.sf(count - 1, len(pvalues), alpha))
        for count, alpha in zip(counts, alphas, strict=True)
    ]
    return min(bounds) < level / len(alphas)


@by_name
@pytest.mark.parametrize("length", [30, 400])
def test_pvalues_are_calibrated_over_keys(scheme: Scheme, length: int) -> None:
    found = pvalues(scheme, zipf_text(length, length), 300, seed=length)
    level = 1e-3 / (2 * len(ALL))
    assert not too_small(found, level)
    if (
        scheme.name == "greenlist"
    ):  # discrete: spread p evenly over its step before asking for uniformity
        n = fg.detect(zipf_text(length, length), KEY, scheme).n_scored
        steps = np.array([math.exp(scheme.log_sf(k, n)) for k in range(n + 2)])
        below = np.array(
            [steps[np.flatnonzero(np.isclose(steps, p, rtol=1e-9))[0] + 1] for p in found]
        )
        found = below + np.random.default_rng(0).random(len(found)) * (found - below)
    assert scipy_stats.kstest(found, "uniform").pvalue > level


@by_name
def test_repetition_is_not_evidence(scheme: Scheme) -> None:
    once = zipf_text(60, 5)
    many = np.tile(once, 10)
    single, repeated = (fg.detect(text, KEY, scheme) for text in (once, many))
    # Only the windows across the first seam are new.
    assert repeated.n_scored <= single.n_scored + scheme.context_width
    assert repeated.n_repeated >= 9 * single.n_scored - scheme.context_width
    assert not too_small(pvalues(scheme, many, 300, seed=7), 1e-3 / len(ALL))


@by_name
def test_marked_text_gains_nothing_by_repetition(scheme: Scheme) -> None:
    rng = np.random.default_rng(8)
    text = fg.embed(ZipfModel(500), [1], 120, KEY, scheme, rng=rng).tokens
    once = fg.detect(text, KEY, scheme).log_pvalue
    ten_times = fg.detect(np.tile(text, 10), KEY, scheme).log_pvalue
    corpus = fg.detect(fg.Corpus([text] * 10), KEY, scheme).log_pvalue
    assert corpus == once
    assert ten_times > once - 12  # at most the few windows across a seam, by luck


def test_without_deduplication_the_repetition_test_would_fail() -> None:
    """What the rule is for: the same sum without it is far too significant on repetitive text."""
    scheme = fg.Gumbel()
    text = np.tile(zipf_text(60, 5), 10)
    naive = []
    for key in keys_from_seed(7, 400):
        from filigrane.prf import block

        windows = np.lib.stride_tricks.sliding_window_view(text, 5)
        blocks = block(key.prf_keys(scheme.label)[0], windows[:, :4])
        total = float(scheme.score(blocks, windows[:, 4]).sum())
        naive.append(math.exp(scheme.log_sf(total, len(windows))))
    assert too_small(np.array(naive), 1e-6)


@by_name
def test_near_keys_find_nothing(scheme: Scheme) -> None:
    secret = bytearray(np.random.default_rng(9).bytes(32))
    rng = np.random.default_rng(10)
    right = key_of(bytes(secret))
    text = fg.embed(ZipfModel(500), [1], 200, right, scheme, rng=rng).tokens
    assert fg.detect(text, right, scheme).log10_pvalue < -6
    near = []
    for bit in range(256):
        secret[bit // 8] ^= 1 << bit % 8
        near.append(fg.detect(text, key_of(bytes(secret)), scheme).pvalue)
        secret[bit // 8] ^= 1 << bit % 8
    assert min(near) > 1e-3 / 256 / len(ALL)
    assert not too_small(np.array(near), 1e-3 / len(ALL))


def test_slots_are_tested_and_paid_for() -> None:
    scheme = fg.Gumbel()
    rng = np.random.default_rng(11)
    text = fg.embed(ZipfModel(300), [1], 100, KEY, scheme, rng=rng).tokens
    result = fg.detect(text, KEY, scheme)
    assert len(result.slot_log_pvalues) == 4
    best = min(result.slot_log_pvalues)
    assert result.slot_log_pvalues[result.slot] == best
    assert result.log_pvalue == pytest.approx(best + math.log(4), rel=1e-9)
    # The exactly-one rule against forgery: all other slots look innocent.
    assert sorted(result.slot_log_pvalues)[1] > math.log(1e-4)


def test_width_and_scheme_are_bound_to_the_key() -> None:
    rng = np.random.default_rng(12)
    text = fg.embed(ZipfModel(300), [1], 200, KEY, fg.Gumbel(), rng=rng).tokens
    for other in (fg.Gumbel(context_width=3), fg.GreenList(), fg.Tournament(), fg.GammaReweight()):
        assert fg.detect(text, KEY, other).log10_pvalue > -4


def test_result_is_a_value() -> None:
    result = fg.detect(zipf_text(50, 1), KEY, fg.Gumbel())
    with pytest.raises(TypeError, match=r"compare result\.log_pvalue"):
        bool(result)
    with pytest.raises(AttributeError):
        result.log_pvalue = 0.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(result)) == result
    assert result.scheme == "gumbel:context_width=4" and result.key == KEY.name
    assert result.n_tokens == 50
    assert result.n_scored + result.n_repeated == 46
    assert "filigrane-key" not in repr(result)


def test_evidence_far_below_the_smallest_double() -> None:
    scheme = fg.Gumbel()
    rng = np.random.default_rng(13)
    text = fg.embed(ZipfModel(2000, 0.6), [1], 500, KEY, scheme, rng=rng).tokens
    result = fg.detect(text, KEY, scheme)
    assert result.log10_pvalue < -400 and result.pvalue == 0.0


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(fg.SCHEMES)),
    st.one_of(
        st.lists(st.integers(-3, 2**32 + 3), max_size=40),
        st.lists(st.integers(0, 3), max_size=40),
        st.lists(st.floats(), max_size=5),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.none(),
        st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=3),
    ),
)
def test_any_input_gives_a_result_or_a_named_error(name: str, tokens: object) -> None:
    try:
        result = fg.detect(tokens, KEY, fg.SCHEMES[name]())  # type: ignore[arg-type]
    except FiligraneError as error:
        assert str(error)
    else:
        assert -math.inf < result.log_pvalue <= 0.0
        assert result.n_scored >= 1


def test_too_short_and_foreign_ids() -> None:
    with pytest.raises(
        TooShort, match=r"looks at 4 previous tokens; got 4 tokens\. Pass at least 5"
    ):
        fg.detect([1, 2, 3, 4], KEY, fg.Gumbel())
    with pytest.raises(VocabularyMismatch, match="another tokenizer"):
        fg.detect([1, 2, 3, 4, 60_000], KEY, fg.Gumbel(), vocab_size=49_152)
    with pytest.raises(VocabularyMismatch, match="another tokenizer"):
        fg.detect(fg.Corpus([[1, 2, 3, 4, 60_000]]), KEY, fg.Gumbel(), vocab_size=49_152)


def test_locals_of_a_traceback_show_no_key() -> None:
    keys = keys_from_seed(31, 2)
    words = np.concatenate([np.asarray(key.prf_keys("gumbel/4")).ravel() for key in keys])
    text = zipf_text(60, 1)

    def stop(done: int, total: int) -> None:
        raise RuntimeError

    class Stops(fg.Gumbel):
        def log_sf(self, total: float, n: int) -> float:
            raise RuntimeError

    calls = [
        lambda: fg.trace(text, keys, fg.Gumbel(), progress=stop),
        lambda: fg.trace(text, keys[0].users(9), fg.Gumbel(), progress=stop),
        lambda: fg.detect(text, keys[0], Stops()),
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
        assert not any(str(word) in shown for word in words.tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fg.detect([1] * 9, KEY, "gumbel"), "pass a scheme object"),
        (lambda: fg.detect([1] * 9, KEY, fg.Gumbel), "pass a scheme object"),
        (lambda: fg.detect([1] * 9, KEY.users(3), fg.Gumbel()), "for many keys there is trace"),
        (lambda: fg.trace([1] * 9, KEY, fg.Gumbel()), "for one key there is detect"),
        (lambda: fg.trace([1] * 9, [KEY], fg.Gumbel(), top=0), "at least 1"),
        (lambda: fg.Sampling(top_k=1.5), "top_k must be an integer"),
        (lambda: fg.Sampling(temperature=None), "temperature must be a number"),
        (lambda: fg.embed("m", [1], 9, KEY, fg.Gumbel(), rng=RNG), "wrap it"),
        (lambda: fg.embed(ZipfModel(), "The sea", 9, KEY, fg.Gumbel(), rng=RNG), "tokenizer"),
        (
            lambda: fg.embed_batch(
                ZipfModel(), [[1]] * 2, 9, [KEY] * 2, fg.Gumbel(), rng=RNG, slots=[1]
            ),
            "1 slots for 2 keys",
        ),
        (lambda: fg.from_tag("greenlist:gamma"), "write gamma=VALUE"),
        (lambda: fg.from_tag("gumbel:,"), "no parameter"),
        (lambda: fg.from_tag("gumbel:context_width=\u0664"), "not of type int"),
        (lambda: fg.from_tag("greenlist:gamma=0.2_5"), "not of type float"),
        (lambda: fg.from_tag("GUMBEL"), "Did you mean 'gumbel'"),
    ],
)
def test_common_mistakes_are_answered(call: Callable[[], object], message: str) -> None:
    with pytest.raises(FiligraneError, match=message):
        call()


def test_numpy_numbers_are_numbers() -> None:
    assert fg.Gumbel(context_width=np.int64(3)).tag == "gumbel:context_width=3"  # type: ignore[arg-type]
    assert fg.GreenList(gamma=np.float32(0.5)).tag.startswith("greenlist:context_width=4,gamma=0.5")
