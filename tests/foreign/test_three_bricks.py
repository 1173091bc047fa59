"""maryland and openai: every recorded hash, score, count, p-value and corpus test, and the null."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from filigrane import stats
from filigrane.embedding import Sampling
from filigrane.errors import SchemeError, VocabularyMismatch
from filigrane.foreign import mersenne
from filigrane.foreign.base import Written
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.foreign.three_bricks import (
    ThreeBricks,
    ThreeBricksMaryland,
    ThreeBricksOpenai,
    corpus_mask,
    read_corpus,
    window_seeds,
)
from filigrane.stats import log_sf_binomial, log_uniformity

FOLDER = Path(__file__).parents[2] / "vectors" / "foreign"
VECTORS = json.loads((FOLDER / "three_bricks_radioactive.json").read_text())
PRF_CASES = json.loads((FOLDER / "radioactive_prf.json").read_text())["cases"]
DIGITS = 5e-4  # of log10 p: the tools sum float32 scores


def integer_key(number: int) -> ForeignKey:
    return ForeignKey.from_text(str(number), KeyForm.INTEGER, "k")


def profile_of(record: dict[str, Any], payloads: int = 1) -> ThreeBricks:
    if record["method"] == "openai":
        return ThreeBricksOpenai(
            vocab_size=record["vocab_size"], ngram=record["ngram"], payloads=payloads
        )
    return ThreeBricksMaryland(
        vocab_size=record["vocab_size"],
        ngram=record["ngram"],
        gamma=record["gamma"],
        payloads=payloads,
    )


def near(got: float, expected: float) -> bool:
    return abs(math.log10(got) - math.log10(expected)) < DIGITS


@pytest.mark.parametrize("case", VECTORS["prf_cases"], ids=lambda c: f"{c['ngram']}-{c['seed']}")
def test_hash_lists_and_uniforms(case: dict[str, Any]) -> None:
    key, size = integer_key(case["seed"]), case["vocab_size"]
    maryland = ThreeBricksMaryland(vocab_size=size, ngram=case["ngram"], gamma=case["gamma"])
    openai = ThreeBricksOpenai(vocab_size=size, ngram=case["ngram"])
    window = case["context"]
    assert maryland.seed(window, key) == openai.seed(window, key) == case["manual_seed"]
    green = maryland.green(window, key)
    expected = case["maryland"]
    assert green.sum() == expected["green_count"]
    digest = hashlib.sha256(green.astype(np.uint8).tobytes()).hexdigest()
    assert digest == expected["green_mask_sha256"]
    assert openai.uniforms(window, key)[:8].tolist() == case["openai_r_ids_0_7"]
    for payload in range(4):
        score = maryland.scores([window], [42], key, payload=payload)
        assert score[0] == case["maryland_score_payload0_3_token42"][payload]
        score = openai.scores([window], [42], key, payload=payload)
        assert score[0] == pytest.approx(case["openai_score_payload0_3_token42"][payload], rel=1e-6)


@pytest.mark.parametrize("case", PRF_CASES, ids=lambda c: str(c["vocab"]))
def test_real_vocabularies(case: dict[str, Any]) -> None:
    key, size, window = integer_key(case["key"]), case["vocab"], case["window"]
    maryland = ThreeBricksMaryland(vocab_size=size, ngram=len(window), gamma=0.25)
    openai = ThreeBricksOpenai(vocab_size=size, ngram=len(window))
    assert maryland.seed(window, key) == case["seed"]
    green = np.flatnonzero(maryland.green(window, key))
    assert green.shape[0] == case["green25_size"] and green.sum() == case["green25_sum"]
    assert green[:5].tolist() == case["green25_min5"]
    assert mersenne.perm(case["seed"], size)[:8].tolist() == case["perm_first8"]
    r = openai.uniforms(window, key)
    assert r[:4].tolist() == case["rand_first4"] and r[100] == np.float32(case["rand_at_100"])
    score = openai.scores([window], [100], key)[0]
    assert score == pytest.approx(case["aaronson_score_100"], rel=1e-6)
    every = maryland.scores([window] * 200, np.arange(200), key)
    assert np.flatnonzero(every).tolist() == [t for t in green.tolist() if t < 200]


def test_the_hash_in_two_halves_is_the_hash() -> None:
    rng = np.random.default_rng(4)
    for key in (0, 1, 2**64 - 2, 2**64 - 1, -1, int(rng.integers(2**62, 2**63 - 1))):
        for salt in (35317, 2**31 - 1, 1):
            windows = rng.integers(0, 2**18, (200, 6))
            got = window_seeds(windows, key, salt)
            for row, seed in zip(windows.tolist(), got.tolist(), strict=True):
                expected = key
                for token in row:
                    expected = (expected * salt + token) % (2**64 - 1)
                assert seed == expected


@pytest.mark.parametrize(
    "record", VECTORS["detections"], ids=lambda r: f"{r['method']}-{r['ngram']}-{r['tag']}"
)
def test_detections(record: dict[str, Any]) -> None:
    key, text = integer_key(record["seed"]), Written(tokens=record["tokens"])
    one = profile_of(record).read(text, key)
    four = profile_of(record, payloads=4).read(text, key)
    for rule, expected in record["results"].items():
        assert one.compat[f"num_scored_{rule}"] == expected["num_scored"]
        assert one.compat[f"score_{rule}"] == pytest.approx(expected["score"], rel=1e-5)
        assert near(one.compat[f"p_value_{rule}"], expected["radioactive_p_value"])
        for payload, p in enumerate(expected["p_value_by_payload"]):
            assert near(four.compat[f"p_value_{rule}_payload_{payload}"], p)
        for payload, score in enumerate(expected.get("score_by_payload", [])):
            assert four.compat[f"score_{rule}_payload_{payload}"] == score
    # ours starts one token earlier, counts every draw once, and pays for four payloads
    assert one.n_scored + sum(one.dropped.values()) == one.n_tokens
    if "payload 2" in record["tag"]:
        assert "best payload of 4: 2" in four.warnings[-1]
        assert four.log10_pvalue < -28 and one.log_pvalue > math.log(0.1)
    elif record["tag"] == "watermarked":
        assert near(math.exp(four.log_pvalue), 4 * math.exp(one.log_pvalue))


@pytest.mark.parametrize("record", VECTORS["chunked_detections"], ids=lambda r: r["tag"])
def test_corpus_detections(record: dict[str, Any]) -> None:
    key, profile = integer_key(record["seed"]), profile_of(record)
    prompts = record["prompts"] or [None] * len(record["texts"])
    texts = [
        Written(tokens=tokens, prompt=None if prompt is None else np.array(prompt, dtype=np.int64))
        for tokens, prompt in zip(record["texts"], prompts, strict=True)
    ]
    windows = None if record["filter"] is None else [tuple(w) for w in record["filter"]]
    found = read_corpus(texts, key, profile, windows=windows)
    for rule, expected in record["results"].items():
        mask = corpus_mask(texts, profile, rule, windows)
        assert "".join(str(int(x)) for x in mask) == expected["mask_scored"]
        assert found.compat[f"num_scored_{rule}"] == expected["num_scored"] == mask.sum()
        assert found.compat[f"score_{rule}"] == pytest.approx(expected["score"], rel=1e-5)
        assert near(found.compat[f"p_value_{rule}"], expected["p_value"])
        k = profile.ngram
        rows = np.concatenate(
            [
                np.lib.stride_tricks.sliding_window_view(np.array(tokens[1:]), k + 1)
                for tokens in record["texts"]
            ]
        )[mask]
        scores = profile.scores(rows[:, :-1], rows[:, -1], key)
        running = [
            math.exp(profile.log_sf(float(scores[: i + 1].sum()), i + 1))
            for i in range(49, scores.shape[0], 50)
        ]
        for got, p in zip(running, expected["p_value_every_50th_scored"], strict=True):
            assert near(got, p)
    # ours: no window of the text's own prompt, not even its last one
    assert found.n_scored <= expected["num_scored"] + len(texts)


@pytest.mark.parametrize("record", VECTORS["sampling"], ids=lambda r: str(r["payload"]))
def test_sampling(record: dict[str, Any]) -> None:
    size, rule = record["vocab_size"], record["logits"]
    profile = ThreeBricksOpenai(vocab_size=size, ngram=record["ngram"], payload=record["payload"])
    key, ids = integer_key(record["seed"]), np.arange(size)
    sampling = Sampling(temperature=record["temperature"], top_p=record["top_p"])
    prompt, output = np.array(record["prompt"]), list[int]()
    for pos in range(len(record["tokens"])):
        raw = (((rule["a"] * ids + rule["b"] * pos) % rule["m"]) - rule["c"]) / rule["div"]
        logits = raw.astype(np.float32)
        rng = np.random.default_rng(pos)
        output.append(
            profile.choose(logits, prompt, output, key, state=None, rng=rng, sampling=sampling)
        )
    assert output == record["tokens"]
    assert rng.random() == np.random.default_rng(pos).random()  # the key decides alone


def test_maryland_writes_what_it_reads() -> None:
    rng = np.random.default_rng(5)
    key = integer_key(4242)
    for payload in (0, 3):
        profile = ThreeBricksMaryland(
            vocab_size=500, ngram=2, gamma=0.25, delta=6.0, payload=payload, payloads=4
        )
        output = list[int]()
        for _ in range(120):
            logits = rng.normal(size=500).astype(np.float32)
            output.append(
                profile.choose(
                    logits,
                    np.array([1, 2, 3]),
                    output,
                    key,
                    state=None,
                    rng=rng,
                    sampling=Sampling(temperature=0.8, top_p=0.95),
                )
            )
        found = profile.read(Written(tokens=output, prompt=np.array([1, 2, 3])), key)
        assert found.log10_pvalue < -20 and f": {payload}" in found.warnings[-1]
        assert found.dropped["incomplete context"] == 0
        assert profile.read(Written(tokens=output), integer_key(4243)).log10_pvalue > -5


# ------------------------------------------------------------------------ counting


def test_aliased_windows_count_once() -> None:
    """(a, b) and (a + 1, b - 35317) seed the same generator: one draw, however it is written."""
    profile = ThreeBricksOpenai(vocab_size=50000, ngram=2)
    key = integer_key(77)
    assert profile.seed([10, 40000], key) == profile.seed([11, 40000 - 35317], key)
    found = profile.read(Written(tokens=[10, 40000, 5, 11, 4683, 5]), key)
    assert found.dropped["draw counted before"] == 1 and found.n_scored == 3


def test_ours_begins_with_the_first_complete_window() -> None:
    profile = ThreeBricksMaryland(vocab_size=1000, ngram=2)
    tokens = np.arange(10, 30)
    found = profile.read(Written(tokens=tokens), integer_key(1))
    assert found.n_scored == 18 and found.compat["num_scored_v2"] == 17
    assert found.dropped["incomplete context"] == 2
    within = profile.read(Written(tokens=tokens, prompt=np.array([7, 8])), integer_key(1))
    assert within.n_scored == 20 and dict(within.compat) == dict(found.compat)


def test_own_corpus_rule_drops_the_last_window_of_the_prompt() -> None:
    profile = ThreeBricksMaryland(vocab_size=1000, ngram=2)
    text = Written(tokens=[10, 11, 12, 13, 14, 15], prompt=np.array([12, 13]))
    found = read_corpus([text], integer_key(1), profile)
    assert found.n_scored == 3  # windows (10,11), (11,12), (13,14); not (12,13)
    assert found.compat["num_scored_v1"] == 3  # the tool: (11,12), (12,13), (13,14)
    assert corpus_mask([text], profile, "v1").tolist() == [True, True, True]


def test_empty_and_short() -> None:
    for profile in (ThreeBricksMaryland(vocab_size=100), ThreeBricksOpenai(vocab_size=100)):
        for tokens in ([], [1]):
            found = profile.read(Written(tokens=np.array(tokens, dtype=np.int64)), integer_key(1))
            assert found.log_pvalue == 0.0 and found.n_scored == 0
            assert found.compat["p_value_v2"] == 1.0
        assert read_corpus([], integer_key(1), profile).log_pvalue == 0.0


def test_floor_of_the_tools_is_not_ours() -> None:
    """3000 tokens of the openai mark: the tools stop at 1e-200, we do not."""
    profile = ThreeBricksOpenai(vocab_size=64, ngram=3)
    key, rng, output = integer_key(9), np.random.default_rng(0), [1, 2, 3]
    for _ in range(800):
        output.append(
            profile.choose(
                np.zeros(64, np.float32),
                np.array([], dtype=np.int64),
                output,
                key,
                state=None,
                rng=rng,
                sampling=Sampling(),
            )
        )
    found = profile.read(Written(tokens=output), key)
    assert found.compat["p_value_v2"] == 1e-200
    assert found.log10_pvalue < -300


# ------------------------------------------------------------------------ the null


@pytest.mark.slow
@pytest.mark.parametrize("ngram", [1, 2, 4])
@pytest.mark.parametrize("method", [ThreeBricksMaryland, ThreeBricksOpenai])
def test_uniform_over_keys(method: type[ThreeBricks], ngram: int) -> None:
    profile = method(vocab_size=1001, ngram=ngram)
    rng = np.random.default_rng(20260103)
    tokens = Written(tokens=rng.choice(np.arange(150), 400))
    spread = []
    for number in rng.integers(1, 2**62, 300).tolist():
        found = profile.read(tokens, integer_key(number))
        above = math.exp(found.log_pvalue)
        if isinstance(profile, ThreeBricksMaryland):
            share = profile.list_size / profile.vocab_size
            after = math.exp(log_sf_binomial(int(found.statistic) + 1, found.n_scored, share))
            above = after + rng.random() * (above - after)
        spread.append(above)
    assert log_uniformity(spread) > math.log(1e-4)


@pytest.mark.parametrize(
    ("n", "nominal", "loss"),
    [(2, 1e-2, 1e-3), (10, 1e-5, 0.02), (100, 1e-9, 0.02), (1000, 1e-5, 0.02)],
)
def test_the_lattice_of_openai_scores_is_conservative_and_close(
    n: int, nominal: float, loss: float
) -> None:
    """Share of the nominal rate that is lost because 1 - r is rounded up to k / 2**24.

    Each lattice score is that of an exponential, rounded down: the sum never exceeds the gamma
    variable it is tested as. How often only the latter reaches the threshold, by tilted sampling.
    """
    low, high = 0.0, 50.0 * n
    for _ in range(100):
        middle = (low + high) / 2
        if stats.log_sf_gamma(middle, n) > math.log(nominal):
            low = middle
        else:
            high = middle
    tilt = 1 - n / high
    rng = np.random.default_rng(n)
    exponentials = rng.exponential(1 / (1 - tilt), (2_000_000 // n, n))
    lattice = -np.log(np.ceil(np.exp(-exponentials) * 2.0**24) * 2.0**-24)
    assert (lattice <= exponentials + 1e-15).all()
    total = exponentials.sum(axis=1)
    weight = np.exp(-tilt * total - n * math.log1p(-tilt))
    missed = (total >= high) & (lattice.sum(axis=1) < high)
    assert (weight * missed).mean() / nominal < loss
    assert 0.9 < (weight * (total >= high)).mean() / nominal < 1.1  # the sampling is right


def test_single_precision_moves_the_p_value_by_little() -> None:
    """The tools' float32 scores against ours: within the tolerance of the recorded values."""
    profile = ThreeBricksOpenai(vocab_size=1000, ngram=2)
    for seed in range(20):
        tokens = Written(tokens=np.random.default_rng(seed).integers(0, 1000, 600))
        found = profile.read(tokens, integer_key(seed + 1))
        first = found.compat["score_v2"], found.compat["num_scored_v2"]
        again = math.exp(stats.log_sf_gamma(first[0], int(first[1])))
        assert near(again, found.compat["p_value_v2"])


# ------------------------------------------------------------------------ refusals


def test_refusals() -> None:
    with pytest.raises(SchemeError, match="gamma"):
        ThreeBricksMaryland(vocab_size=1000, gamma=0.0)
    with pytest.raises(SchemeError, match="ngram"):
        ThreeBricksOpenai(vocab_size=1000, ngram=0)
    with pytest.raises(SchemeError, match="payloads"):
        ThreeBricksOpenai(vocab_size=1000, payloads=1001)
    profile = ThreeBricksOpenai(vocab_size=1000)
    with pytest.raises(VocabularyMismatch):
        read_corpus([Written(tokens=[1, 1000])], integer_key(1), profile)
    with pytest.raises(SchemeError, match="v1 or v2"):
        corpus_mask([Written(tokens=[1, 2])], profile, "none")


def test_results_do_not_show_the_key() -> None:
    canary = 987654321987654
    for profile in (ThreeBricksMaryland(vocab_size=1000), ThreeBricksOpenai(vocab_size=1000)):
        found = profile.read(Written(tokens=np.arange(100)), integer_key(canary))
        assert str(canary) not in repr(found) + repr(profile)
    assert any(
        "public default" in w
        for w in profile.read(Written(tokens=np.arange(9)), integer_key(0)).warnings
    )
