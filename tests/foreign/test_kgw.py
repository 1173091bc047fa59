"""Green lists of lm-watermarking: all seeding functions, recorded lists and counts, the null."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from filigrane.errors import SchemeError
from filigrane.foreign import mersenne
from filigrane.foreign.base import Written
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.foreign.kgw import PRFS, SCHEME_NAMES, KgwExtended
from filigrane.foreign.transformers_kgw import HfLefthash, HfSelfhash
from filigrane.stats import log_sf_binomial, log_uniformity

VECTORS = json.loads(
    (Path(__file__).parents[2] / "vectors" / "foreign" / "lm_watermarking.json").read_text()
)


def integer_key(number: int) -> ForeignKey:
    return ForeignKey.from_text(str(number), KeyForm.INTEGER, "k")


def without_key(scheme: str) -> str:
    """The free form's trailing key belongs into the key file."""
    return re.sub(r"^(ff-[a-z_]+-\d+-(?:True|False))-\d+$", r"\1", scheme)


def profile_of(record: dict[str, Any]) -> KgwExtended:
    return KgwExtended(
        vocab_size=record["vocab_size"],
        gamma=record["gamma"],
        scheme=without_key(record["seeding_scheme"]),
    )


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    """The tool's fixed permutation, by the readable twin."""
    return mersenne.perm(2971215073, 1000003)


@pytest.mark.slow
def test_the_fixed_table(table: np.ndarray) -> None:
    assert table[:16].tolist() == VECTORS["fixed_table_first16"]


def test_vectors_cover_every_function() -> None:
    covered = {record["prf_type"] for record in VECTORS["greenlists"]}
    assert covered == set(PRFS)


@pytest.mark.parametrize("record", VECTORS["greenlists"], ids=lambda r: r["seeding_scheme"])
def test_green_lists(record: dict[str, Any]) -> None:
    profile, key = profile_of(record), integer_key(record["hash_key"])
    assert (profile.width, profile.self_salted) == (record["context_width"], record["self_salt"])
    assert profile.seed(record["context"], key) == record["manual_seed"]
    assert profile.seed(record["context_used"], key) == record["manual_seed"]
    green = profile.green(record["context"], key)
    assert green.sum() == record["green_count"]
    assert "".join(str(int(x)) for x in green[:64]) == record["green_mask_ids_0_63"]
    digest = hashlib.sha256(green.astype(np.uint8).tobytes()).hexdigest()
    assert digest == record["green_mask_sha256"]


@pytest.mark.parametrize("record", VECTORS["detections"], ids=lambda r: r["tag"])
def test_detections(record: dict[str, Any]) -> None:
    profile = profile_of(record)
    found = profile.read(Written(tokens=record["tokens"]), integer_key(15485863))
    for rule, setting in (("all", "False"), ("distinct", "True")):
        expected = record["results"][f"ignore_repeated_ngrams={setting}"]
        for name, value in expected.items():
            if name not in ("prediction", "confidence"):
                got = found.compat[f"{name}_{rule}"]
                assert got == pytest.approx(value, rel=1e-6 if name == "p_value" else 1e-12), name
    share = profile.list_size / profile.vocab_size
    assert found.log_pvalue == log_sf_binomial(int(found.statistic), found.n_scored, share)
    assert sum(found.dropped.values()) + found.n_scored == found.n_tokens


# ------------------------------------------------------------------------ other implementations


def i64(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def plain_seed(prf: str, k: int, c: list[int], table: np.ndarray) -> int:
    """The functions once more, in whole numbers of Python wrapped by hand."""

    def h(x: int) -> int:
        return int(table[x % 1000003]) + 1

    def product(values: list[int]) -> int:
        out = 1
        for value in values:
            out = i64(out * value)
        return out

    wrapped = [h(i64(k * x)) for x in c]
    pairs = [i64(a * b) for i, a in enumerate(wrapped) for b in wrapped[i + 1 :]]
    if prf == "noncomm_prf":
        seed = k
        for x in c:
            seed = i64(seed * h(i64(seed * x))) % 2**32
        return seed
    return {
        "additive_prf": lambda: k * sum(c),
        "multiplicative_prf": lambda: k * product(c),
        "minfunc_prf": lambda: k * min(c),
        "simple_skip_prf": lambda: product([h(i64(k * x)) for x in c[::2]]),
        "skipgram_prf": lambda: wrapped[0],
        "anchored_skipgram_prf": lambda: i64(wrapped[0] * wrapped[-1]),
        "minhash_prf": lambda: min(wrapped),
        "anchored_minhash_prf": lambda: min(i64(i64(k * h(x)) * h(c[-1])) for x in c),
        "minskipgram_prf": lambda: min(pairs),
        "position_prf": lambda: i64(sum(i64(i64(k * x) * (i + 1)) for i, x in enumerate(c))),
    }[prf]() % (2**64 - 1)


@pytest.mark.slow
@pytest.mark.parametrize("prf", PRFS)
def test_seeds_wrap_as_64_bits_do(prf: str, table: np.ndarray) -> None:
    """Large keys, tokens and windows, where products leave 64 bits many times over."""
    rng = np.random.default_rng(sum(map(ord, prf)))
    for _ in range(60):
        key = int(rng.integers(1, 2**63 - 1))
        width = int(rng.integers(2, 9))
        contexts = rng.integers(0, 2**18, (20, width))
        contexts[0] = 0
        got = PRFS[prf](contexts, key)
        for row, seed in zip(contexts.tolist(), got.tolist(), strict=True):
            assert seed == plain_seed(prf, key, row, table)


def test_simple_1_is_the_lefthash_of_transformers_and_selfhash_is_not() -> None:
    key, tokens = (
        integer_key(271828),
        Written(tokens=np.random.default_rng(1).integers(0, 900, 300)),
    )
    ours = KgwExtended(vocab_size=1000, scheme="simple_1").read(tokens, key)
    theirs = HfLefthash(vocab_size=1000).read(tokens, key)
    assert dict(ours.compat) == dict(theirs.compat) and ours.log_pvalue == theirs.log_pvalue
    one = KgwExtended(vocab_size=1000, scheme="selfhash")
    two = HfSelfhash(vocab_size=1000, context_width=4)
    assert one.seed([1, 2, 3, 4], key) != two.seed([1, 2, 3, 4], key)


def test_legacy_lists_are_the_end_of_the_permutation() -> None:
    key = integer_key(3)
    legacy = KgwExtended(vocab_size=1003, scheme="simple_1", select_green_tokens=False)
    order = mersenne.perm(legacy.seed([17], key), 1003)
    expected = np.zeros(1003, dtype=np.bool_)
    expected[order[1003 - 250 :]] = True
    assert (legacy.green([17], key) == expected).all()
    tokens = np.column_stack([np.full(200, 17), np.arange(1, 201)]).ravel()
    found = legacy.read(Written(tokens=tokens), key)
    after_17 = int(expected[1:201].sum())
    rest = sum(bool(legacy.green([t], key)[17]) for t in range(1, 200))
    assert found.n_scored == 398  # 17 -> 17 is met twice
    assert found.statistic == after_17 + rest - int(expected[17])


def test_contexts_that_share_a_seed_count_once() -> None:
    """additive ignores the order: (a, b) -> c and (b, a) -> c are one coin, two to the tool."""
    profile = KgwExtended(vocab_size=1000, scheme="ff-additive_prf-2-False")
    found = profile.read(Written(tokens=[5, 9, 77, 9, 5, 77]), integer_key(11))
    assert found.compat["num_tokens_scored_distinct"] == 4
    assert found.dropped["draw counted before"] == 1 and found.n_scored == 3


@pytest.mark.parametrize(
    "scheme",
    [
        "simple_1",
        "selfhash",
        "minhash",
        "skipgram",
        "ff-additive_prf-3-False",
        "ff-multiplicative_prf-2-False",
        "ff-minfunc_prf-3-False",
        "ff-simple_skip_prf-4-False",
        "ff-anchored_skipgram_prf-4-True",
        "ff-minskipgram_prf-4-False",
        "ff-noncomm_prf-3-False",
        "ff-position_prf-3-False",
        "ff-anchored_minhash_prf-2-True",
    ],
)
def test_uniform_over_keys(scheme: str) -> None:
    """One repetitive text of 400 tokens, 250 keys: p, spread over its steps, is uniform."""
    profile = KgwExtended(vocab_size=1001, scheme=scheme)
    rng = np.random.default_rng(20260102)
    tokens = Written(tokens=rng.choice(np.arange(1, 120), 400))
    share = profile.list_size / profile.vocab_size
    spread = []
    for number in rng.integers(1, 2**62, 250).tolist():
        found = profile.read(tokens, integer_key(number))
        above = math.exp(found.log_pvalue)
        after = math.exp(log_sf_binomial(int(found.statistic) + 1, found.n_scored, share))
        spread.append(after + rng.random() * (above - after))
    assert log_uniformity(spread) > math.log(1e-4)


FREE_SCHEMES = [f"ff-{prf}-4-{salted}" for prf in PRFS for salted in (False, True)]


@pytest.mark.parametrize("scheme", [*SCHEME_NAMES, *FREE_SCHEMES, "ff-noncomm_prf-9-False"])
def test_token_0_is_no_evidence_under_any_key(scheme: str) -> None:
    """After zeros, tokens that are green under one key, read under thirty others."""
    profile = KgwExtended(vocab_size=1001, scheme=scheme)
    width = profile.width
    zeros = [0] * width
    own = integer_key(987654321)
    if profile.self_salted:
        green = [t for t in range(1, 400) if profile.green([*zeros[1:], t], own)[t]]
    else:
        green = np.flatnonzero(profile.green(zeros, own)).tolist()
    for chosen in (green[1:81], [t for t in green[1:81] for _ in range(2)]):
        text = Written(tokens=[token for t in chosen for token in (*zeros, t)])
        for number in np.random.default_rng(8).integers(2**40, 2**62, 30).tolist():
            assert profile.read(text, integer_key(number)).log_pvalue > math.log(1e-5)


@pytest.mark.parametrize(
    ("scheme", "window"),
    [
        ("skipgram", [0, 5, 6, 7, 8]),
        ("ff-simple_skip_prf-3-False", [0, 5, 0]),
        ("ff-anchored_skipgram_prf-3-False", [0, 5, 0]),
        ("ff-minskipgram_prf-3-False", [0, 0, 0]),
        ("minhash", [0, 0, 0, 0]),
        ("ff-additive_prf-2-False", [0, 0]),
        ("ff-multiplicative_prf-3-False", [4, 0, 9]),
        ("ff-minfunc_prf-3-False", [4, 0, 9]),
        ("ff-position_prf-2-False", [0, 0]),
    ],
)
def test_lists_without_a_key_are_dropped(scheme: str, window: list[int]) -> None:
    profile = KgwExtended(vocab_size=1001, scheme=scheme)
    for number in (3, 2**40 + 7, 2**62 - 57):
        found = profile.read(Written(tokens=[*window, 500]), integer_key(number))
        assert found.dropped["same list under every key"] == 1 and found.n_scored == 0
        assert found.compat["num_tokens_scored_all"] == 1
        # A multiple of the table's size is another zero, unless its product wraps.
        if scheme == "skipgram" and number == 3:
            tokens = Written(tokens=[1000003, *window[1:], 500])
            wider = KgwExtended(vocab_size=1_000_010, scheme=scheme)
            assert wider.read(tokens, integer_key(3)).n_scored == 0


def test_minima_count_unless_they_are_that_of_zero() -> None:
    """h(0) = 250535: a window with token 0 is evidence if another token's number is smaller."""
    profile = KgwExtended(vocab_size=1001, scheme="minhash")
    scored = []
    for number in range(2**40, 2**40 + 60):
        key = integer_key(number)
        found = profile.read(Written(tokens=[0, 3, 4, 5, 500]), key)
        assert found.n_scored == (profile.seed([0, 3, 4, 5], key) < 250535)
        scored.append(found.n_scored)
    assert 0 < sum(scored) < 60


def test_seeds_that_hold_few_bits_of_the_key_are_dropped() -> None:
    """The anchored product of two tokens whose public numbers end in many zeros."""
    profile = KgwExtended(vocab_size=200_000, scheme="ff-anchored_minhash_prf-1-True")
    numbers = [profile.seed([t], integer_key(1)) for t in range(3000)]
    even = [t for t, seed in enumerate(numbers) if seed % 2**16 == 0]
    odd = [t for t, seed in enumerate(numbers) if seed % 2]
    assert even and odd
    for key in (1, 2**20, 2**62 - 57):
        dropped = [profile.read(Written(tokens=[t]), integer_key(key)).n_scored for t in even]
        assert not any(dropped)
        kept = [profile.read(Written(tokens=[t]), integer_key(key)).n_scored for t in odd[:50]]
        assert all(kept)


# ------------------------------------------------------------------------ names


def test_named_schemes() -> None:
    for scheme, seeding in SCHEME_NAMES.items():
        profile = KgwExtended(vocab_size=1000, scheme=scheme)
        assert profile.width == seeding.width and profile.self_salted == seeding.self_salted
        free = f"ff-{seeding.prf}-{seeding.width}-{seeding.self_salted}"
        same = KgwExtended(vocab_size=1000, scheme=free)
        assert same.seed([1, 2, 3, 4, 5], integer_key(9)) == profile.seed(
            [1, 2, 3, 4, 5], integer_key(9)
        )


def test_refusals() -> None:
    for scheme in ("md5", "ff-nothing_prf-3-False", "ff-additive_prf-0-False", "ff-additive_prf-3"):
        with pytest.raises(SchemeError):
            KgwExtended(vocab_size=1000, scheme=scheme)
    with pytest.raises(SchemeError, match="pairs"):
        KgwExtended(vocab_size=1000, scheme="ff-minskipgram_prf-1-False")
    with pytest.raises(SchemeError, match="keys are never part of a profile") as caught:
        KgwExtended(vocab_size=1000, scheme="ff-additive_prf-2-False-987654321")
    assert "987654321" not in str(caught.value)
