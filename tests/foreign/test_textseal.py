"""TextSeal's marks: recorded values, round trips, laws on 8,191 values."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hardtexts import HARD_TEXTS, log_valid

from filigrane import stats
from filigrane.errors import SchemeError
from filigrane.foreign import (
    KeyForm,
    TextSealGreenList,
    TextSealGumbelMax,
    TextSealSynthID,
    Written,
    from_tag,
    write,
)
from filigrane.foreign.layers import log_sf_layers
from filigrane.foreign.textseal import _arguments, buckets
from filigrane.toy import ZipfModel
from foreignkit import (
    CHANCE,
    close,
    forced,
    key_of,
    log_uniform,
    random_keys,
    realised,
    vectors,
    written,
)

DATA = vectors("textseal")
KEY = key_of(123_456_789, KeyForm.INTEGER)
Kind = type[TextSealGreenList] | type[TextSealGumbelMax] | type[TextSealSynthID]


def profile_of(case: Any, method: str) -> Any:
    kind = case["watermark_type"]
    options: dict[str, Any] = {"ngram": case["ngram"], "scoring_method": method}
    if kind == "gumbelmax":
        return TextSealGumbelMax(**options)
    options["gamma"] = case.get("gamma", 0.5)
    if kind == "greenlist":
        return TextSealGreenList(**options)
    options["depth"] = case.get("depth", 30)
    return TextSealSynthID(weighted=kind == "synthid-weighted", **options)


def holds(result: Any, wanted: Any, kind: str, suffix: str = "") -> None:
    assert result.compat["num_scored"] == wanted[f"num_scored{suffix}"]
    p = wanted["p_value_when_seen_windows_is_None_so_no_dedup" if suffix else "p_value"]
    if not suffix:
        assert close(result.compat["score"], wanted["score"], 1e-5)
    if kind == "gumbelmax":
        assert math.log10(result.compat["p_value"]) == pytest.approx(math.log10(p), abs=5e-4)
    else:
        assert close(result.compat["p_value"], p, 1e-6)


@pytest.mark.parametrize("case", DATA["prf_cases"], ids=lambda c: str(c["context"]))
def test_numbers(case: Any) -> None:
    arguments = _arguments(np.array(case["context"]), np.array(case["token_ids"]))
    b = buckets(arguments, case["secret_key"])
    assert b.tolist() == case["bucket_of_8191"]
    u = b.astype(np.float32) / np.float32(8191)
    assert u.tolist() == case["uniform"]
    assert (u < case["gamma"]).astype(int).tolist() == case["binary"]


@pytest.mark.parametrize(
    "case", DATA["detections"], ids=lambda c: f"{c['watermark_type']}{c['tag']}"
)
def test_detections(case: Any) -> None:
    text, key = Written(tokens=case["tokens"]), key_of(case["secret_key"], KeyForm.INTEGER)
    result = profile_of(case, "v2").read(text, key)
    holds(result, case, case["watermark_type"])
    holds(profile_of(case, "none").read(text, key), case, case["watermark_type"], "_no_dedup")
    assert any("default key" in w for w in result.warnings)
    # Whatever the tool counts, ours counts a number once.
    assert profile_of(case, "none").read(text, key).log_pvalue == result.log_pvalue


@pytest.mark.parametrize("case", DATA["detections_full"], ids=lambda c: c["watermark_type"])
def test_detections_with_every_rule(case: Any) -> None:
    key = key_of(case["secret_key"], KeyForm.INTEGER)
    for method, wanted in case["results"].items():
        rule = "none" if "silently off" in method else method
        result = profile_of(case, rule).read(Written(tokens=case["tokens"]), key)
        holds(result, wanted, case["watermark_type"])


def test_sampling() -> None:
    for case in DATA["sampling"]:
        key = key_of(case["secret_key"], KeyForm.INTEGER)
        profile = TextSealGumbelMax(ngram=case["ngram"])
        assert forced(profile, case, key, prompt=case["prompt"]) == case["tokens"]


def test_green_lists_are_read_by_an_exact_binomial_of_their_true_share() -> None:
    for gamma in (0.25, 0.5, 0.9):
        profile = TextSealGreenList(gamma=gamma, ngram=2)
        text = Written(tokens=np.random.default_rng(0).integers(0, 5000, 100))
        result = profile.read(text, KEY)
        green = sum(float(np.float32(b) / np.float32(8191)) < gamma for b in range(8191))
        wanted = stats.log_sf_binomial(int(result.statistic), result.n_scored, green / 8191)
        assert close(result.log_pvalue, wanted, 1e-12)


def test_layers_shared_by_neighbours_count_once() -> None:
    # After the same window, ids 10 and 11 share 29 of 30 layers.
    text = Written(tokens=[5, 6, 7, 7, 7, 10, 7, 11, 7, 500])
    result = TextSealSynthID().read(text, KEY)
    assert result.compat["num_scored"] == 7
    # After 6, 10 and 11 the token is 7; after 7 it is 7, 10, 11 and 500, three of which overlap.
    after_seven = {7 + i for i in range(30)} | {10 + i for i in range(30)}
    after_seven |= {11 + i for i in range(30)} | {500 + i for i in range(30)}
    layers = 3 * 30 + len(after_seven)
    assert result.dropped["layers shared with others"] == result.n_scored * 30 - layers


@pytest.mark.parametrize("share", [0.25, 0.5, 4096 / 8191, 0.9])
def test_weighted_tail_against_convolution(share: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        depth = int(rng.integers(2, 6))
        weights = np.array([10 * (depth - 1) - 9 * layer for layer in range(depth)])
        sizes = rng.integers(0, 9, depth)
        law = np.ones(1)
        for size, weight in zip(sizes, weights, strict=True):
            for _ in range(size):
                longer = np.zeros(law.shape[0] + weight)
                longer[: law.shape[0]] += law * (1.0 - share)
                longer[weight:] += law * share
                law = longer
        for total in rng.integers(0, law.shape[0], 5):
            got = log_sf_layers(int(total), sizes, weights, share)
            assert got == pytest.approx(math.log(law[total:].sum()), rel=1e-9, abs=1e-11)
        assert log_sf_layers(law.shape[0], sizes, weights, share) == -math.inf


@pytest.mark.parametrize("n", [3, 57, 400])
@pytest.mark.parametrize("part", [0.4, 0.5, 0.55, 0.8])
def test_weighted_tail_of_equal_layers_is_that_of_weighted_bits(n: int, part: float) -> None:
    weights = [10 * 29 - 9 * layer for layer in range(30)]
    total = int(sum(weights) * n * part)
    got = log_sf_layers(total, np.full(30, n), np.array(weights), 0.5)
    assert got == pytest.approx(stats.log_sf_weighted_bits(total, n, weights), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("depth", [4, 10, 19])
@pytest.mark.parametrize("n", [100, 3000])
def test_weighted_tail_on_a_coarser_lattice(depth: int, n: int) -> None:
    """Weights of these depths have a common divisor: 3, or 9."""
    weights = [10 * (depth - 1) - 9 * layer for layer in range(depth)]
    assert math.gcd(*weights) > 1
    middle = sum(weights) * n // 2
    spread = 0.5 * math.sqrt(n * sum(w * w for w in weights))
    for deviations in (0.3, 2.0, 6.0):
        for step in range(3):  # all steps between two points of the lattice are one
            total = middle + int(deviations * spread) + step
            got = log_sf_layers(total, np.full(depth, n), np.array(weights), 0.5)
            wanted = stats.log_sf_weighted_bits(total, n, weights)
            assert got == pytest.approx(wanted, rel=1e-9)


@pytest.mark.slow
def test_weighted_layers_over_random_keys_on_hard_texts() -> None:
    """What a text without a mark may repeat: p errs to the large side or is uniform."""
    for tokens in HARD_TEXTS:
        assert log_valid(TextSealSynthID(weighted=True), Written(tokens=tokens), 60) > CHANCE


def test_the_tool_loses_its_digits_and_we_do_not() -> None:
    case = DATA["detections_full"][3]
    assert case["watermark_type"] == "synthid-weighted"
    result = profile_of(case, "v2").read(
        Written(tokens=case["tokens"]), key_of(42, KeyForm.INTEGER)
    )
    assert result.compat["p_value"] == 1e-200
    assert -22.0 < result.log10_pvalue < -20.0


@pytest.mark.parametrize("tag", ["textseal-gumbelmax:ngram=2", "textseal-greenlist:ngram=2"])
def test_round_trip(tag: str) -> None:
    profile = from_tag(tag)
    (key,) = random_keys(profile, 1, seed=9)
    text = written(profile, key, 400)
    assert profile.read(text, key).log_pvalue < CHANCE


@pytest.mark.slow
def test_other_keys_are_uniform() -> None:
    tokens = np.random.default_rng(6).integers(0, 3000, 300)
    assert log_uniform(TextSealGumbelMax(ngram=2), Written(tokens=tokens)) > CHANCE
    # A count has steps: spread each one evenly over its own probability.
    rng, profile = np.random.default_rng(7), TextSealGreenList(ngram=2)
    ps = []
    for key in random_keys(profile, 240):
        result = profile.read(Written(tokens=tokens), key)
        n, count = result.n_scored, int(result.statistic)
        above = math.exp(stats.log_sf_binomial(count + 1, n, 4096 / 8191))
        ps.append(above + rng.random() * (result.pvalue - above))
    assert stats.log_uniformity(np.array(ps)) > CHANCE


def lattice(u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scores of the 8,191 values by cells of uniform numbers, largest scores first."""
    return -np.log(np.ceil(u * 8191) / 8191)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 32, 200])
def test_gumbel_p_values_err_to_the_large_side(n: int) -> None:
    for nominal in (1e-2, 1e-4, 1e-6, 1e-9):
        low, high = 0.0, 100.0 + 4.0 * n
        for _ in range(100):
            middle = 0.5 * (low + high)
            above = stats.log_sf_gamma(middle, n) > math.log(nominal)
            low, high = (middle, high) if above else (low, middle)
        if n == 1 and low > 9.0:
            continue  # no score is larger
        true = realised(lattice, (1.0,), n, low, samples=min(100_000, 8_000_000 // n))
        assert true / nominal < 1.02, (n, nominal, true / nominal)
        assert n == 1 or true / nominal > 0.4


def test_reading_only_and_parameters() -> None:
    with pytest.raises(SchemeError, match="only reads"):
        write(ZipfModel(50), [1], 3, KEY, TextSealSynthID(), rng=np.random.default_rng(0))
    for bad in ({"ngram": 0}, {"ngram": 11}, {"scoring_method": "v3"}):
        with pytest.raises(SchemeError):
            TextSealGumbelMax(**bad)  # type: ignore[arg-type]
    assert TextSealGreenList().read([], KEY).log_pvalue == 0.0
    assert TextSealSynthID(weighted=True).read(Written(tokens=[1, 2]), KEY).log_pvalue == 0.0
