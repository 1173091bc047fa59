import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import filigrane as fg
from filigrane import prf
from filigrane.contexts import collect
from filigrane.embedding import bias_logits, truncate
from filigrane.errors import (
    LogitsError,
    SchemeError,
    SecretLeakError,
    UnsupportedDecoding,
    VocabularyMismatch,
)
from filigrane.schemes import Scheme
from filigrane.toy import ZipfModel
from keymaker import keys_from_seed

ALL = [scheme() for scheme in fg.SCHEMES.values()]
by_name = pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
KEYS = keys_from_seed(11, 3, slots=4)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(fg.SCHEMES)),
    st.lists(st.integers(0, 5), max_size=12),
    st.integers(1, 5),
    st.integers(0, 2**32),
)
def test_generator_and_detector_agree_for_any_prompt(
    name: str, prompt: list[int], width: int, seed: int
) -> None:
    """Six tokens and short windows: repetitions abound."""
    scheme = fg.SCHEMES[name](context_width=width)
    rng = np.random.default_rng(seed)
    text = fg.embed(ZipfModel(6, 0.5), prompt, 60, KEYS[0], scheme, rng=rng)
    assert np.flatnonzero(text.marked).tolist() == collect(text.tokens, width).positions.tolist()


@by_name
def test_marked_text_is_detected_and_others_are_not(scheme: Scheme) -> None:
    rng = np.random.default_rng(1)
    lm = ZipfModel(500, 1.2)
    mine, yours, nobodys = fg.embed_batch(
        lm, [[1], [2], [3]], 250, [KEYS[0], KEYS[1], None], scheme, rng=rng
    )
    assert fg.detect(mine.tokens, KEYS[0], scheme).log10_pvalue < -10
    assert fg.detect(yours.tokens, KEYS[1], scheme).log10_pvalue < -10
    for text, key in ((mine, KEYS[1]), (mine, KEYS[2]), (yours, KEYS[0]), (nobodys, KEYS[0])):
        assert fg.detect(text.tokens, key, scheme).log10_pvalue > -3
    assert nobodys.n_marked == 0
    assert mine.key == KEYS[0].name and nobodys.key is None


class FixedNoise:
    """Stands in for a Generator: hands out prepared private words, row by row."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def integers(self, *bounds: int, size: object = None, dtype: object = None) -> object:
        return 0 if size is None else self.words


@by_name
@pytest.mark.parametrize(
    "sampling", [fg.Sampling(), fg.Sampling(temperature=0.7, top_k=20, top_p=0.9)]
)
def test_a_batch_row_is_the_single_row(scheme: Scheme, sampling: fg.Sampling) -> None:
    rng = np.random.default_rng(2)
    keys: Sequence[fg.Key | None] = [KEYS[0], None, KEYS[1], KEYS[0]]
    past = rng.integers(0, 300, (4, 9))
    logits = rng.standard_normal((4, 300)).astype(np.float32) * 3
    words = rng.integers(0, 2**32, (4, 4), dtype=np.uint32)

    def sample(rows: list[int]) -> list[int]:
        noise = FixedNoise(words[rows])
        sampler = fg.MarkedSampler(
            scheme,
            [keys[row] for row in rows],
            sampling=sampling,
            rng=noise,  # type: ignore[arg-type]
        )
        for number, row in enumerate(rows):
            for token in past[row].tolist():
                sampler.push(number, token)
        return sampler.sample(logits[rows]).tolist()

    assert sample([0, 1, 2, 3]) == [sample([row])[0] for row in range(4)]
    assert sample([3, 1, 0]) == [sample([row])[0] for row in (3, 1, 0)]


def test_same_prompt_different_texts() -> None:
    """Unmarked first tokens and slots: a key does not fix the text."""
    rng = np.random.default_rng(3)
    scheme = fg.Gumbel()
    texts = fg.embed_batch(ZipfModel(50, 1.0), [[1]] * 8, 30, [KEYS[0]] * 8, scheme, rng=rng)
    assert len({tuple(text.tokens.tolist()) for text in texts}) == 8


def test_earlier_answers_are_not_marked_again() -> None:
    rng = np.random.default_rng(4)
    scheme = fg.Gumbel(context_width=1)
    lm = ZipfModel(8, 0.5)
    first = fg.embed(lm, [1], 50, KEYS[0], scheme, rng=rng)
    second = fg.embed(lm, [1], 50, KEYS[0], scheme, rng=rng, earlier=[first.tokens])
    joint = collect(fg.Corpus([first.tokens, second.tokens]), 1)
    marked = np.concatenate([first.marked, second.marked])
    assert np.flatnonzero(marked).tolist() == joint.positions.tolist()


def test_greedy_greenlist_is_the_argmax_of_biased_logits() -> None:
    scheme = fg.GreenList(context_width=1, delta=5.0)
    greedy = fg.Sampling(temperature=0.0)
    rng = np.random.default_rng(5)
    text = fg.embed(ZipfModel(300, 1.0), [1], 200, KEYS[0], scheme, rng=rng, sampling=greedy)
    assert fg.detect(text.tokens, KEYS[0], scheme).log_pvalue < -5


@pytest.mark.parametrize("name", ["gumbel", "tournament", "gamma", "delta"])
@pytest.mark.parametrize("sampling", [fg.Sampling(temperature=0.0), fg.Sampling(top_k=1)])
def test_greedy_is_refused_where_nothing_can_be_marked(name: str, sampling: fg.Sampling) -> None:
    scheme = fg.SCHEMES[name]()
    rng = np.random.default_rng(6)
    with pytest.raises(UnsupportedDecoding, match=f"{name} cannot mark greedy"):
        fg.embed(ZipfModel(), [1], 10, KEYS[0], scheme, rng=rng, sampling=sampling)
    fg.embed(ZipfModel(), [1], 10, None, scheme, rng=rng, sampling=sampling)  # unmarked: fine


def test_bias_hits_green_tokens_only() -> None:
    scheme = fg.GreenList(gamma=0.5, delta=1.5)
    block = prf.block(KEYS[0].prf_keys(scheme.label)[0], [1, 2, 3, 4])
    logits = np.zeros(1000, np.float32)
    ids = np.arange(1000, dtype=np.uint32)
    out = bias_logits(scheme, logits, ids, block, np.empty_like(logits))
    assert (out == np.where(scheme.is_green(block, ids), np.float32(1.5), np.float32(0))).all()
    with pytest.raises(SchemeError, match="does not act on logits"):
        bias_logits(fg.Gumbel(), logits, ids, block, out)


@given(
    st.integers(1, 600),
    st.integers(0, 60),
    st.floats(0.05, 1.0),
    st.floats(0.2, 3.0),
    st.integers(0, 2**32),
)
def test_truncation_keeps_what_transformers_keeps(
    size: int, top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal(size) * 4, 3).astype(np.float32)
    kept = truncate(logits, fg.Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    pool = logits.astype(float) / temperature
    if 0 < top_k < size:
        pool = np.where(pool < np.sort(pool)[-top_k], -np.inf, pool)
    probs = np.exp(pool - pool.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    if np.abs(before - top_p).min() < 1e-9:
        return  # on the edge, rounding decides
    mask = np.zeros(size, bool)
    mask[order] = before < top_p
    mask &= np.isfinite(pool)
    assert (np.arange(size) if kept is None else kept).tolist() == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize(
    "spoil", [lambda row: row.fill(np.nan), lambda row: row.fill(-np.inf)], ids=["nan", "nothing"]
)
@pytest.mark.parametrize(
    "sampling", [fg.Sampling(), fg.Sampling(top_k=5), fg.Sampling(top_p=0.5)], ids=repr
)
@by_name
def test_logits_that_cannot_be_drawn_from(
    scheme: Scheme, sampling: fg.Sampling, spoil: object
) -> None:
    sampler = fg.MarkedSampler(
        scheme, [KEYS[0], None], sampling=sampling, rng=np.random.default_rng(7)
    )
    for row in (0, 1):
        for token in (1, 2, 3, 4):
            sampler.push(row, token)
    for bad in (0, 1):
        logits = np.zeros((2, 400), np.float32)
        spoil(logits[bad])  # type: ignore[operator]
        with pytest.raises(LogitsError, match=f"row {bad}"):
            sampler.sample(logits)
    single = np.zeros((2, 400), np.float32)
    for value in (np.nan, -np.nan, np.inf):
        single[0, 333] = value
        with pytest.raises(LogitsError, match="row 0"):
            sampler.sample(single)
    assert len(sampler.histories[0]) == 4, "nothing is remembered of a failed step"


def test_shapes_and_widths_are_checked() -> None:
    sampler = fg.MarkedSampler(fg.Gumbel(), [KEYS[0]], rng=np.random.default_rng(8))
    with pytest.raises(LogitsError, match="must have shape"):
        sampler.sample(np.zeros(10))
    with pytest.raises(LogitsError, match="must have shape"):
        sampler.sample(np.zeros((2, 10)))
    sampler.sample(np.zeros((1, 10)))
    with pytest.raises(VocabularyMismatch, match="earlier steps had 10"):
        sampler.sample(np.zeros((1, 11)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_sampling_is_checked(field: str, value: float) -> None:
    with pytest.raises(UnsupportedDecoding, match=field):
        fg.Sampling(**{field: value})  # type: ignore[arg-type]


def test_rows_stop_on_their_own() -> None:
    rng = np.random.default_rng(9)
    lm = ZipfModel(4, 0.2)
    texts = fg.embed_batch(lm, [[1]] * 6, 40, [KEYS[0]] * 6, fg.Gumbel(), rng=rng, stop=[3])
    for text in texts:
        assert len(text.tokens) == len(text.marked)
        assert 3 not in text.tokens[:-1].tolist()
        assert len(text.tokens) == 40 or text.tokens[-1] == 3
    assert len({len(text.tokens) for text in texts}) > 1
    assert fg.embed(lm, [1], 0, KEYS[0], fg.Gumbel(), rng=rng).tokens.size == 0


def test_a_fixed_slot_adds_up_over_a_corpus() -> None:
    rng = np.random.default_rng(10)
    scheme = fg.Gumbel()
    lm = ZipfModel(300, 1.2)
    texts = [fg.embed(lm, [i], 50, KEYS[0], scheme, rng=rng, slot=3).tokens for i in range(6)]
    result = fg.detect(fg.Corpus(texts), KEYS[0], scheme)
    assert result.slot == 3
    assert result.log10_pvalue < -60
    with pytest.raises(SchemeError, match="has slots 0 to 3, got 4"):
        fg.embed(lm, [1], 50, KEYS[0], scheme, rng=rng, slot=4)


def test_logits_that_overflow_after_division() -> None:
    sampling = fg.Sampling(temperature=1e-6)
    sampler = fg.MarkedSampler(fg.Gumbel(), [None], sampling=sampling, rng=np.random.default_rng(1))
    with pytest.raises(LogitsError, match="temperature"):
        sampler.sample(np.array([[3e38, 1.0]]))
    assert sampler.sample(np.array([[3e30, 1.0]])).tolist() == [0]


def test_a_sampler_keeps_its_keys() -> None:
    sampler = fg.MarkedSampler(fg.Gumbel(), [KEYS[0]], rng=np.random.default_rng(1))
    with pytest.raises(SecretLeakError, match="holds keys"):
        pickle.dumps(sampler)
    assert "secret words" in repr(vars(sampler))


def test_logits_of_other_kinds() -> None:
    sampler = fg.MarkedSampler(fg.Gumbel(), [None], rng=np.random.default_rng(1))
    for dtype in (np.float16, np.float64, np.int32):
        sampler.sample(np.zeros((1, 9), dtype))
    with pytest.raises(LogitsError, match="real numbers"):
        sampler.sample(np.zeros((1, 9), complex))


def test_a_race_among_logits_that_float32_cannot_scale() -> None:
    """Divided by the temperature they are all -inf in single precision, and still ordered."""
    from filigrane.kernels.draw import race

    logits = np.full(700, -1e38, np.float32)
    logits[611] = -0.9e38
    ids = np.arange(700, dtype=np.uint32)
    assert race(logits, ids, 1e6, 1, 2, 3, 4) == 611
