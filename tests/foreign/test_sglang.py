"""SGLang's marks: recorded values, round trips, the coin, and the law on the lattice."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from filigrane import stats
from filigrane.embedding import Sampling
from filigrane.errors import SchemeError
from filigrane.foreign import KeyForm, SglangDualGumbel, SglangGumbel, Written, from_tag
from filigrane.foreign.base import Writable
from filigrane.foreign.sglang import coins, context_hashes, murmur, token_hashes
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

DATA = vectors("sglang_gumbel")


def profile_of(case: Any) -> SglangGumbel | SglangDualGumbel:
    options: dict[str, Any] = {"context_window": case["context_window"]}
    if "max_contexts" in case:
        options["max_contexts"] = case["max_contexts"]
    if case["key_b"] is None:
        return SglangGumbel(**options)
    return SglangDualGumbel(mixing_probability=case["mixing_probability"], **options)


def keys_in(case: Any) -> Any:
    if case["key_b"] is None:
        return key_of(case["key"], KeyForm.HEX)
    return key_of([case["key"], case["key_b"]], KeyForm.HEX_PAIR)


@pytest.mark.parametrize("case", DATA["prf_cases"])
def test_numbers(case: Any) -> None:
    key = int(case["key"], 16)
    hashes = context_hashes(np.array([case["context"]], dtype=np.uint32))
    assert hashes.tolist() == [case["context_hash"]]
    words = token_hashes(key, hashes, np.array(case["token_ids"], dtype=np.uint32))
    assert words.tolist() == case["token_hash"]
    assert ((words.astype(np.float64) + 0.5) / 2.0**32).tolist() == case["u"]
    other = int("00000000deadbeef", 16)
    assert coins(key, other, hashes).tolist() == [case["coin_with_key_b_00000000deadbeef"]]


def test_known_words() -> None:
    four = [np.array([i], dtype=np.uint64) for i in (1, 2, 3, 4)]
    assert murmur(four).tolist() == [0x4445AD00]
    context = context_hashes(np.array([[1, 2, 3, 4]], dtype=np.uint32))
    a, b = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    assert token_hashes(a, context, np.array([5], np.uint32)).tolist() == [0x5F81F799]
    assert coins(a, b, context).tolist() == [0x75617683]


def test_compiled_numbers_are_the_same() -> None:
    from filigrane.kernels.engines import murmur_row

    ids = np.append(np.arange(152_000), 2**32 - 2).astype(np.uint32)
    for key, context in ((0, 0), (0x0123456789ABCDEF, 2**32 - 1), (2**64 - 1, 77)):
        plain = token_hashes(key, np.array(context, dtype=np.uint64), ids)
        assert np.array_equal(murmur_row(key, context, ids), plain)


def alike(first: tuple[int, int], others: list[int]) -> list[list[int]]:
    """Contexts (a, b) with the hash of `first`, one for each a: the words' mixing is undone."""
    inverse = [pow(c, -1, 2**32) for c in (0xCC9E2D51, 0x1B873593)]

    def turned(word: int, n: int) -> int:
        return (word << n | word >> (32 - n)) & 0xFFFFFFFF

    def mixed(word: int) -> int:
        return turned(word * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF

    def state(word: int) -> int:
        return (turned(mixed(word), 13) * 5 + 0xE6546B64) & 0xFFFFFFFF

    meant = state(first[0]) ^ mixed(first[1])
    found = []
    for a in others:
        wanted = (state(a) ^ meant) * inverse[1] & 0xFFFFFFFF
        found.append([a, turned(wanted, 17) * inverse[0] & 0xFFFFFFFF])
    return found


@pytest.mark.parametrize("kind", [SglangGumbel, SglangDualGumbel])
def test_contexts_of_one_hash_count_once(kind: type[SglangGumbel | SglangDualGumbel]) -> None:
    """Forty contexts that share one hash, all followed by one token."""
    profile = kind(context_window=2)
    pairs = alike((3, 4), list(range(100, 140)))
    assert len(set(context_hashes(np.array(pairs, dtype=np.uint32)).tolist())) == 1
    prompt = [1, 2]
    text = Written(tokens=[token for pair in pairs for token in (*pair, 77)], prompt=prompt)
    for key in random_keys(profile, 60):
        result = profile.read(text, key)
        assert result.compat["num_contexts"] == 120
        assert result.n_scored == 81
        assert result.dropped["same hash as an earlier context"] == 39
        assert result.n_scored + sum(result.dropped.values()) == result.n_tokens
        wanted = stats.log_sf_gamma(result.statistic, 81)
        assert close(result.log_pvalue, wanted, 1e-12)
        assert result.statistic < result.compat["score"]
        assert result.log_pvalue > math.log(1e-5)


def test_a_context_padded_in_front_is_the_shorter_context() -> None:
    padded = np.array([[0xFFFFFFFF, 0xFFFFFFFF, 7, 9]], dtype=np.uint32)
    short = np.array([[7, 9]], dtype=np.uint32)
    assert context_hashes(padded).tolist() == context_hashes(short).tolist()
    assert context_hashes(padded).tolist() != context_hashes(short[:, :1]).tolist()


@pytest.mark.parametrize("case", DATA["detections"] + DATA["detections_full"])
def test_detections(case: Any) -> None:
    text = Written(tokens=case["tokens"], prompt=case["prompt"])
    result = profile_of(case).read(text, keys_in(case))
    assert result.n_scored == case["num_contexts"]
    assert result.dropped["repeated context"] == case["repeated_contexts"]
    assert result.dropped["prompt unknown"] == case["skipped_initial_tokens"]
    assert result.n_scored + sum(result.dropped.values()) == result.n_tokens
    parts = {name: part for name, part in case.items() if isinstance(part, dict)}
    parts = {f"{name}.": part for name, part in parts.items()} | {"": case}
    if case["key_b"] is None:
        parts.pop("key_a_all_positions.", None)
    for prefix, part in parts.items():
        assert result.compat[f"{prefix}num_contexts"] == part["num_contexts"]
        assert close(result.compat[f"{prefix}score"], part["score"], 1e-9)
        assert close(result.compat[f"{prefix}z_score"], part["z_score"], 1e-9)
        assert close(result.compat[f"{prefix}p_value"], part["p_value"], 1e-6)
        assert close(result.compat[f"{prefix}log_p_value"], part["log_p_value"], 1e-6)
    assert close(result.log_pvalue, case["log_p_value"], 1e-6)
    if "tokens_examined" in case:
        assert result.compat["tokens_examined"] == case["tokens_examined"]
        assert (result.dropped["after max_contexts"] > 0) == case["prefix_limit_reached"]


def with_min_p(value: float, temperature: float) -> Any:
    def shape(row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        scaled = row / np.float32(temperature)
        return np.where(scaled < scaled.max() + math.log(value), -np.inf, row).astype(np.float32)

    return shape if value else lambda row: row


@pytest.mark.parametrize("case", DATA["sampling"], ids=lambda c: c["key"])
def test_samplings(case: Any) -> None:
    sampling = Sampling(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"])
    shape = with_min_p(case["min_p"], case["temperature"])
    tokens = forced(
        profile_of(case), case, keys_in(case), prompt=case["prompt"], sampling=sampling, shape=shape
    )
    assert tokens == case["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "tag",
    [
        "sglang-gumbel",
        "sglang-gumbel:context_window=1",
        "sglang-dual-gumbel:mixing_probability=0.5",
        "sglang-dual-gumbel:mixing_probability=0.9,context_window=2",
    ],
)
def test_round_trip(tag: str) -> None:
    profile = from_tag(tag)
    (key,) = random_keys(profile, 1, seed=9)
    text = written(profile, key)
    assert profile.read(text, key).log_pvalue < 2 * CHANCE
    assert profile.read(Written(tokens=text.tokens), key).log_pvalue < 2 * CHANCE
    assert log_uniform(profile, text) > CHANCE


def test_both_keys_write() -> None:
    profile = SglangDualGumbel(mixing_probability=0.5)
    (key,) = random_keys(profile, 1)
    result = profile.read(written(profile, key), key)
    for name in ("key_a_partition", "key_b_partition"):
        assert result.compat[f"{name}.num_contexts"] > 50
        assert result.compat[f"{name}.log_p_value"] < CHANCE
    assert not result.warnings
    # Swapped, half of the coins still name the right key.
    swapped = key_of([f"{k:x}" for k in reversed(key.reveal())], KeyForm.HEX_PAIR)
    assert result.log_pvalue < profile.read(written(profile, key), swapped).log_pvalue < CHANCE


def test_a_context_is_forced_once_and_no_more_than_the_limit() -> None:
    row = np.array([1.0, 0.9, 0.8], dtype=np.float32)
    key = key_of("2a", KeyForm.HEX)
    prompt = np.array([3, 4], dtype=np.int64)

    def second(profile: Writable, seed: int) -> int:
        state, rng = profile.start(), np.random.default_rng(seed)
        output: list[int] = []
        for _ in range(2):  # the same context twice, as if nothing had been appended
            output.append(
                profile.choose(row, prompt, [], key, state=state, rng=rng, sampling=Sampling())
            )
        return output[1]

    assert len({second(SglangGumbel(), seed) for seed in range(30)}) == 3
    limited = SglangGumbel(max_contexts=1)
    state = limited.start()
    draws = [
        limited.choose(
            row,
            prompt,
            [number],
            key,
            state=state,
            rng=np.random.default_rng(number),
            sampling=Sampling(),
        )
        for number in range(30)
    ]
    assert len(state.forced) == 1 and len(set(draws)) == 3


def test_certain_positions_are_left_alone_and_stay_eligible() -> None:
    key = key_of("2a", KeyForm.HEX)
    profile = SglangGumbel(max_probability=0.5)
    state = profile.start()
    for row, forced_now in (([9.0, 0.0], 0), ([0.1, 0.0, 0.0], 1)):
        profile.choose(
            np.array(row, dtype=np.float32),
            np.array([1], dtype=np.int64),
            [],
            key,
            state=state,
            rng=np.random.default_rng(0),
            sampling=Sampling(),
        )
        assert len(state.forced) == forced_now


def test_the_limit_counts_texts_one_by_one() -> None:
    rng = np.random.default_rng(0)
    texts = [Written(tokens=rng.integers(0, 900, 40), prompt=[1, 2, 3, i]) for i in range(3)]
    result = SglangGumbel(max_contexts=10).read(texts, key_of("2a", KeyForm.HEX))
    assert result.n_scored == 30 and result.dropped["after max_contexts"] == 90


def test_warnings_and_parameters() -> None:
    text = Written(tokens=np.arange(60))
    dual = SglangDualGumbel().read(text, key_of(["1", "2"], KeyForm.HEX_PAIR))
    assert any("mixing_probability not given" in w for w in dual.warnings)
    assert any("prompt unknown" in w for w in dual.warnings)
    known = Written(tokens=np.arange(60), prompt=[5])
    assert not SglangGumbel().read(known, key_of("1", KeyForm.HEX)).warnings
    for bad in ({"context_window": 65}, {"max_contexts": 0}, {"max_probability": 1.5}):
        with pytest.raises(SchemeError):
            SglangGumbel(**bad)  # type: ignore[arg-type]


def lattice(u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scores of the 32-bit numbers by cells of uniform numbers, largest scores first."""
    return -np.log((np.ceil(u * 2.0**32) - 0.5) / 2.0**32)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 32])
def test_realised_over_nominal(n: int) -> None:
    for nominal in (1e-2, 1e-4, 1e-6, 1e-8):
        low, high = 0.0, 100.0 + 4.0 * n
        for _ in range(100):
            middle = 0.5 * (low + high)
            above = stats.log_sf_gamma(middle, n) > math.log(nominal)
            low, high = (middle, high) if above else (low, middle)
        true = realised(lattice, (1.0,), n, low)
        assert 0.9 < true / nominal < 1.1, (n, nominal, true / nominal)
