"""SynthID-Text's two forms: recorded values, round trips, exact tails, aliases."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hardtexts import HARD_TEXTS, log_valid

from filigrane import stats
from filigrane.embedding import Sampling
from filigrane.errors import SchemeError
from filigrane.foreign import Bayesian, KeyForm, SynthIDHead, SynthIDHf, Written, from_tag
from foreignkit import (
    CHANCE,
    close,
    key_of,
    log_uniform,
    logits_of,
    numbers,
    random_keys,
    vectors,
    written,
)

DATA = vectors("synthid")
FACTS = vectors("equivalences")["facts"]
KEY = key_of(DATA["keys"], KeyForm.INTEGERS)
FORMS = {"hf": SynthIDHf, "deepmind_head": SynthIDHead}


def signed(value: Any) -> int:
    return int(np.asarray(value, dtype=np.uint64).view(np.int64))


@pytest.mark.parametrize("form", FORMS)
def test_g_values(form: str) -> None:
    profile = FORMS[form]()
    for case in DATA[f"{form}_g_values"]:
        bits = profile.g_values(case["context"], case["token_ids"], KEY)
        assert ["".join(map(str, row)) for row in bits.tolist()] == case["g_values"]
        context = profile.context_hashes(np.array(case["context"]), DATA["keys"])
        assert signed(context) == case["context_hash_int64"]
        ngrams = profile.ngram_hashes(context, np.array(case["token_ids"]))
        layer = (ngrams + np.uint64(DATA["keys"][0])) * np.uint64(6364136223846793005)
        assert (layer + np.uint64(1)).view(np.int64).tolist() == case["ngram_key_layer0_int64"]
        if form == "deepmind_head":
            assert profile.initial(DATA["keys"]) == case["hash_iv"]


@pytest.mark.parametrize("case", DATA["sequences"], ids=lambda c: f"{c['prf']}-{c['tag'][:12]}")
def test_sequences(case: Any) -> None:
    profile = FORMS[case["prf"]](
        ngram_len=case["ngram_len"], context_history_size=case["context_history_size"]
    )
    text = Written(tokens=case["tokens"])
    result = profile.read(text, KEY)
    assert result.compat["num_scored_positions"] == case["num_scored_positions"]
    assert result.compat["g_sum"] == case["g_sum_scored"]
    assert close(result.compat["mean_score"], case["mean_score"], 1e-9)
    assert close(result.compat["weighted_mean_score"], case["weighted_mean_score"], 1e-9)
    scored = profile._scored((text,), DATA["keys"])
    assert "".join(map(str, scored.mask.astype(int))) == case["context_repetition_mask"]
    assert scored.bits[scored.mask].sum(axis=0).tolist() == case["g_sums_per_layer"]
    assert "".join(map(str, scored.bits[0])) == case["first_ngram_g"]
    assert result.n_scored + sum(result.dropped.values()) == result.n_tokens
    if result.n_scored == case["num_scored_positions"]:
        assert close(result.statistic, case["weighted_mean_score"], 1e-9)
        plain = FORMS[case["prf"]](scoring="mean", ngram_len=case["ngram_len"]).read(text, KEY)
        bits = result.n_scored * len(DATA["keys"])
        wanted = stats.log_sf_binomial(case["g_sum_scored"], bits, 0.5)
        assert close(plain.log_pvalue, wanted, 1e-12)


@pytest.mark.parametrize(
    "case", DATA["processor_traces"], ids=lambda c: f"{c['prf']}{len(c['keys'])}"
)
def test_processor_traces(case: Any) -> None:
    options = {} if case["prf"] == "hf" else {"num_leaves": case["num_leaves"]}
    profile = FORMS[case["prf"]](
        ngram_len=case["ngram_len"],
        context_history_size=case["context_history_size"],
        skip_first_ngram_calls=case["skip_first_ngram_calls"],
        **options,
    )
    key, state = key_of(case["keys"], KeyForm.INTEGERS), profile.start()
    for position, wanted in enumerate(case["probabilities"]):
        ids, probs = profile.law(
            logits_of(case, position),
            case["tokens"][:position],
            key,
            state=state,
            sampling=Sampling(),
        )
        assert ids.tolist() == list(range(case["vocab_size"]))
        assert probs == pytest.approx(wanted, abs=2e-5)


def test_bayesian_detector() -> None:
    for case in DATA["bayesian"]:
        detector = Bayesian(
            beta=tuple(case["beta"]), delta=tuple(map(tuple, case["delta"])), prior=case["prior"]
        )
        profile = SynthIDHf(ngram_len=case["ngram_len"], eos_token_id=case["eos_token_id"])
        key = key_of(case["keys"], KeyForm.INTEGERS)
        for row in case["cases"]:
            found = profile.posterior(Written(tokens=row["tokens"]), key, detector)
            assert found.log_likelihood_ratio == pytest.approx(
                row["log_likelihood_ratio"], abs=1e-4
            )
            assert found.probability == pytest.approx(row["posterior"], abs=1e-5)
            assert found.n_scored == row["mask"].count("1")
        with pytest.raises(SchemeError, match="layers"):
            profile.posterior(Written(tokens=[1, 2, 3]), KEY, detector)


def test_weighted_tail_against_all_outcomes() -> None:
    # Three layers weigh 20, 11 and 2; two positions have 64 outcomes.
    profile, key = SynthIDHf(), key_of([5, 6, 7], KeyForm.INTEGERS)
    text = Written(tokens=[3, 1, 4, 1, 5, 9])
    result = profile.read(text, key)
    bits = profile._scored((text,), key.reveal()).bits
    assert bits.shape == (2, 3)
    weights = np.array([20, 11, 2] * 2)
    total = int(bits.reshape(-1) @ weights)
    outcomes = [int(np.array(o) @ weights) for o in itertools.product((0, 1), repeat=6)]
    assert result.pvalue == pytest.approx(sum(o >= total for o in outcomes) / 64, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tag",
    [
        "synthid-hf",
        "synthid-hf:scoring=mean,ngram_len=3",
        "synthid-hf:skip_first_ngram_calls=true",
        "synthid-text-head",
        "synthid-text-head:num_leaves=4",
    ],
)
def test_round_trip(tag: str) -> None:
    profile = from_tag(tag)
    (key,) = random_keys(profile, 1, seed=9)
    text = written(profile, key)
    assert profile.read(text, key).log_pvalue < 2 * CHANCE
    assert log_uniform(profile, text, 200) > CHANCE


def test_the_two_forms_do_not_read_each_other() -> None:
    for one, other in ((SynthIDHf(), SynthIDHead()), (SynthIDHead(), SynthIDHf())):
        assert other.read(written(one, KEY), KEY).log_pvalue > CHANCE


def test_aliases_are_as_recorded() -> None:
    rng = np.random.default_rng(2)
    context, tokens = rng.integers(0, 60_000, 4), rng.integers(0, 60_000, 500)
    for profile, fact in (
        (SynthIDHf(), "transformers SynthID: g(ctx,t)==g(ctx,t+65536) for all 20000 t tested"),
        (SynthIDHead(), "synthid-text repository head: g(ctx,t)==g(ctx,t+65536)"),
    ):
        one = profile.g_values(context, tokens, KEY)
        two = profile.g_values(context, tokens + 65536, KEY)
        assert np.array_equal(one, two) == FACTS[fact]
    shifted = key_of([k + 65536 for k in DATA["keys"]], KeyForm.INTEGERS)
    one, two = (SynthIDHf().g_values(context, tokens, key) for key in (KEY, shifted))
    assert np.array_equal(one, two)
    assert FACTS["transformers SynthID: keys k and k+65536 give identical g-values"]


def test_positions_with_the_same_bits_count_once() -> None:
    rng = np.random.default_rng(3)
    half = rng.integers(0, 60_000, 60)
    text = Written(tokens=np.concatenate([half, half + 65536]))
    result = SynthIDHf().read(text, KEY)
    alike = result.dropped["same bits as an earlier position"]
    assert alike == 56 and result.compat["num_scored_positions"] == 116
    assert result.n_scored == 60
    head = SynthIDHead().read(text, KEY)
    assert head.n_scored == 116 and not head.dropped["same bits as an earlier position"]


@pytest.mark.slow
def test_long_texts_stay_valid_although_only_16_bits_count() -> None:
    # 3,000 positions have some 70 pairs with the same bits: counted twice they would spread z.
    tokens = np.random.default_rng(4).integers(0, 50_000, 3000)
    assert log_uniform(SynthIDHf(), Written(tokens=tokens), 200) > CHANCE
    profile = SynthIDHf()
    z = []
    for key in random_keys(profile, 200):
        result = profile.read(Written(tokens=tokens), key)
        z.append(stats.log_isf_normal(min(result.log_pvalue, -1e-12)))
    assert 0.8 < float(np.std(z)) < 1.2 and float(np.mean(z)) < 0.3


def test_equal_layers_are_one() -> None:
    """Keys that agree where the generator looks: thirty of them carry what two carry."""
    rng = np.random.default_rng(5)
    text = Written(tokens=rng.integers(0, 50_000, 60))
    for scoring in ("mean", "weighted"):
        profile = SynthIDHf(scoring=scoring)  # type: ignore[arg-type]
        head = SynthIDHead(scoring=scoring)  # type: ignore[arg-type]
        for a, b in rng.integers(0, 2**16, (20, 2)).tolist():
            many = [a + 65536 * i for i in range(15)] + [b - 65536 * i for i in range(15)]
            result = profile.read(text, key_of(many, KeyForm.INTEGERS))
            assert any("30 keys make 2 different layers" in note for note in result.warnings)
            assert "2 different layers" in result.method
            weights = [1] * 30 if scoring == "mean" else [290 - 9 * i for i in range(30)]
            total = round(result.statistic * sum(weights) * result.n_scored)
            wanted = stats.log_sf_weighted_bits(
                total, result.n_scored, [sum(weights[:15]), sum(weights[15:])]
            )
            assert close(result.log_pvalue, wanted, 1e-12)
            assert result.log_pvalue > math.log(1e-6)
            assert len(set(many)) == 30
            apart = head.read(text, key_of(many, KeyForm.INTEGERS))
            assert "different layers" not in apart.method
            same = head.read(text, key_of([a] * 15 + [b] * 15, KeyForm.INTEGERS))
            assert "2 different layers" in same.method and same.log_pvalue > math.log(1e-6)


def test_the_law_takes_a_larger_share_of_ones() -> None:
    """Of seed 34 the table holds 50.27 % ones; a million bits see that."""
    text = Written(tokens=np.random.default_rng(1).integers(0, 50_000, 20_000))
    (key,) = random_keys(SynthIDHf(), 1)
    for scoring, weights in (("mean", [1] * 30), ("weighted", [290 - 9 * i for i in range(30)])):
        profile = SynthIDHf(scoring=scoring, sampling_table_seed=34)  # type: ignore[arg-type]
        ones, size = profile.ones()
        assert 0.5026 < ones / size < 0.5028
        result = profile.read(text, key)
        assert f"{ones} ones of {size}" in result.method
        assert result.n_scored > 15_000
        share = ones / size
        spread = math.sqrt(result.n_scored * share * (1 - share) * sum(w * w for w in weights))
        z = (result.statistic - share) * sum(weights) * result.n_scored / spread
        assert result.log_pvalue == pytest.approx(stats.log_sf_normal(z), abs=0.02)
        usual = SynthIDHf(scoring=scoring).read(text, key)  # type: ignore[arg-type]
        assert "ones" not in usual.method
    for seed in range(20):
        tiny = SynthIDHf(sampling_table_size=2, sampling_table_seed=seed)
        if tiny.ones()[0] == 2:
            assert tiny.read(text, key).log_pvalue == 0.0
            break
    else:
        pytest.fail("no table of ones")


def test_tables_of_other_sizes_count_an_entry_once() -> None:
    text = Written(tokens=np.random.default_rng(2).integers(0, 50_000, 3000))
    for key in random_keys(SynthIDHf(), 5):
        result = SynthIDHf(sampling_table_size=7, sampling_table_seed=1).read(text, key)
        assert result.n_scored == 7 and result.log_pvalue > math.log(1e-5)


@pytest.mark.slow
def test_random_keys_on_hard_texts() -> None:
    """What a text without a mark may repeat: p errs to the large side or is uniform."""
    for tokens in HARD_TEXTS:
        for tag in ("synthid-text-head", "synthid-text-head:scoring=mean", "synthid-hf"):
            assert log_valid(from_tag(tag), Written(tokens=tokens), 200) > CHANCE


def test_repeats_and_two_texts() -> None:
    tokens = DATA["sequences"][0]["tokens"]
    one = SynthIDHf().read(Written(tokens=tokens), KEY)
    both = SynthIDHf().read([Written(tokens=tokens)] * 2, KEY)
    assert both.log_pvalue == one.log_pvalue and both.n_scored == one.n_scored
    assert SynthIDHf().read([], KEY).log_pvalue == 0.0
    assert SynthIDHf().read(Written(tokens=[1, 2]), KEY).n_scored == 0


def test_everything_after_the_end_is_left_out() -> None:
    tokens = [*numbers(20, 1, 15), 2, *numbers(20, 2, 15)]
    whole = SynthIDHf().read(Written(tokens=tokens), KEY)
    cut = SynthIDHf(eos_token_id=2).read(Written(tokens=tokens), KEY)
    assert whole.n_scored == 37 and cut.n_scored == 16 and cut.dropped["after the end"] == 21


def test_warnings_and_parameters() -> None:
    assert SynthIDHf().read(Written(tokens=[1]), KEY).warnings
    own = key_of(numbers(30, 1), KeyForm.INTEGERS)
    assert not SynthIDHf().read(Written(tokens=[1]), own).warnings
    for bad in ({"ngram_len": 1}, {"scoring": "median"}, {"context_history_size": 0}):
        with pytest.raises(SchemeError):
            SynthIDHf(**bad)  # type: ignore[arg-type]
    with pytest.raises(SchemeError):
        Bayesian(beta=(1.0,), delta=((1.0, 2.0),), prior=0.5)
    assert math.isclose(SynthIDHf().read(Written(tokens=[1]), own).pvalue, 1.0)
