"""vLLM's marks: recorded values, round trips, the exact law, and vLLM itself."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from filigrane import stats
from filigrane.embedding import Sampling
from filigrane.errors import SchemeError
from filigrane.foreign import KeyForm, VllmDualGumbel, VllmGumbel, Written, from_tag
from filigrane.foreign.vllm import philox_words, uniforms
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

DATA = vectors("vllm_gumbel")
PROGRAM = Path(
    os.environ.get("FILIGRANE_VLLM") or Path(__file__).parents[2] / ".vllm" / "bin" / "vllm"
)


def contexts(rows: list[list[int]]) -> npt.NDArray[np.uint32]:
    return (np.asarray(rows, dtype=np.int64) & 0xFFFFFFFF).astype(np.uint32)


@pytest.mark.parametrize("case", DATA["prf_cases"], ids=lambda c: f"{c['key']}-{c['context']}")
def test_numbers(case: Any) -> None:
    ids = np.asarray(case["token_ids"], dtype=np.uint32)
    words = philox_words(int(case["key"]), contexts([case["context"]]), ids)
    assert (words >> 8).tolist() == case["mantissa24"]
    assert uniforms(words).tolist() == case["uniform_float32"]


@pytest.mark.parametrize(
    ("key", "context", "token", "word"),
    [
        (42, [-1] * 4, 0, 0xFA2F6B05),
        (42, [1, 2, 3, 4], 5, 0x2EB1554C),
        (0xDEADBEEFCAFEF00D, [10, 20, 30, 40, 50], 151643, 0x498D4A0E),
        (2**64 - 1, [7], 3, 0x7F809FC2),
    ],
)
def test_known_words(key: int, context: list[int], token: int, word: int) -> None:
    assert philox_words(key, contexts([context]), np.array([token], np.uint32)).tolist() == [word]


def test_numbers_of_many_contexts_at_once_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**32, (50, 6), dtype=np.uint32)
    ids = rng.integers(0, 152_000, 50, dtype=np.uint32)
    together = philox_words(7, rows, ids)
    alone = [int(philox_words(7, rows[i : i + 1], ids[i : i + 1])[0]) for i in range(50)]
    assert together.tolist() == alone


@pytest.mark.parametrize("width", [1, 3, 4, 5, 9])
def test_compiled_numbers_are_the_same(width: int) -> None:
    from filigrane.kernels.engines import philox_row

    rng = np.random.default_rng(width)
    row = rng.integers(0, 2**32, width, dtype=np.uint32)
    for ids in (np.arange(152_000), np.array([3, 3, 2, 151_999, 2**32 - 2])):
        for key in (0, 42, 2**64 - 1, 0xDEADBEEFCAFEF00D):
            got = philox_row(key, row, ids.astype(np.uint32))
            assert np.array_equal(got, philox_words(key, row[None, :], ids.astype(np.uint32)))


@pytest.mark.parametrize("case", DATA["detections"])
def test_detections(case: Any) -> None:
    key = key_of(case["detect_key"], KeyForm.UINT64)
    text = Written(tokens=case["tokens"])
    result = VllmGumbel(context_width=case["context_width"]).read(text, key)
    for suffix, wanted in (("", case["gumbel"]), ("_no_dedup", case["gumbel_no_dedup"])):
        assert close(result.compat[f"score{suffix}"], wanted["score"], 1e-9)
        assert close(result.compat[f"p_value{suffix}"], wanted["p_value"], 1e-6)
    assert result.n_scored == case["gumbel"]["num_scored_tokens"]
    assert close(result.pvalue, case["gumbel"]["p_value"], 1e-6)
    assert result.n_scored + sum(result.dropped.values()) == result.n_tokens
    wanted = case["dual_key_alpha_0_1"]
    dual = VllmDualGumbel(context_width=case["context_width"], alpha=0.1).read(text, key)
    assert close(dual.statistic, wanted["score"], 1e-9)
    assert close(dual.compat["p_value"], wanted["p_value"], 1e-6)
    assert dual.n_scored == wanted["num_scored_tokens"]
    # Ours is the exact law, which is above the tool's fit far out.
    exact = stats.log_sf_two_gammas(dual.statistic, dual.n_scored, 0.1)
    assert close(dual.log_pvalue, exact, 1e-12)
    assert wanted["p_value"] > 1e-3 or dual.pvalue > 1.02 * wanted["p_value"]


@pytest.mark.parametrize("case", DATA["detections_alpha"])
def test_detections_at_other_alphas(case: Any) -> None:
    profile = VllmDualGumbel(context_width=case["context_width"], alpha=case["alpha"])
    result = profile.read(
        Written(tokens=case["tokens"]), key_of(case["detect_key"], KeyForm.UINT64)
    )
    wanted = case["dual_key"]
    assert close(result.compat["score"], wanted["score"], 1e-9)
    assert close(result.compat["p_value"], wanted["p_value"], 1e-6)
    assert result.compat["num_scored_tokens"] == wanted["num_scored_tokens"]
    if case["alpha"] in (0.0, 0.5, 1.0):  # where the tool's own p-value is exact
        assert close(result.pvalue, wanted["p_value"], 1e-6)


def test_derived_keys_by_their_readings() -> None:
    text = Written(tokens=DATA["detections"][0]["tokens"])
    for key, pair in DATA["derived_keys"].items():
        dual = VllmDualGumbel(alpha=0.3).read(text, key_of(key, KeyForm.UINT64))
        for name in ("key_a", "key_b"):
            alone = VllmGumbel().read(text, key_of(pair[name], KeyForm.UINT64))
            assert close(dual.compat[f"score_{name}"], alone.statistic, 1e-12)


@pytest.mark.parametrize("case", DATA["sampling"], ids=lambda c: c["kind"])
def test_samplings(case: Any) -> None:
    options: dict[str, Any] = {"context_width": case["context_width"]}
    options["deduplicate_contexts"] = "none"
    profile = {
        "gumbel": VllmGumbel(**options),
        "dual_key_a_only": VllmDualGumbel(alpha=0.0, **options),
        "dual_key_b_only": VllmDualGumbel(alpha=1.0, **options),
    }[case["kind"]]
    key = key_of(case["key"], KeyForm.UINT64)
    assert forced(profile, case, key) == case["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "tag",
    [
        "vllm-gumbel",
        "vllm-gumbel:context_width=1,deduplicate_contexts=all",
        "vllm-gumbel:context_width=6,deduplicate_contexts=none",
        "vllm-dual-gumbel:alpha=0.1",
        "vllm-dual-gumbel:alpha=0.5,context_width=2",
    ],
)
def test_round_trip(tag: str) -> None:
    profile = from_tag(tag)
    (key,) = random_keys(profile, 1, seed=9)
    text = written(profile, key)
    assert profile.read(text, key).log_pvalue < 2 * CHANCE
    assert log_uniform(profile, text) > CHANCE


def test_repeated_contexts_are_drawn_without_the_mark() -> None:
    # A law of two tokens repeats its contexts at once; marked throughout it leaves no choice.
    row = np.array([1.0, 0.9], dtype=np.float32)
    key = key_of(5, KeyForm.UINT64)

    def text(profile: VllmGumbel, seed: int) -> list[int]:
        state, output = profile.start(), list[int]()
        rng = np.random.default_rng(seed)
        prompt = np.array([0, 1, 0], dtype=np.int64)
        for _ in range(60):
            token = profile.choose(
                row, prompt, output, key, state=state, rng=rng, sampling=Sampling()
            )
            output.append(token)
        return output

    once = VllmGumbel(context_width=1)
    always = VllmGumbel(context_width=1, deduplicate_contexts="none")
    prompted = VllmGumbel(context_width=1, deduplicate_contexts="all")
    assert text(always, 1) == text(always, 2)
    # Single turn: contexts -1 and the first token are new, then a repetition must come.
    assert text(once, 1)[:2] == text(once, 2)[:2] == text(always, 1)[:2]
    assert text(once, 1) != text(once, 2)
    # With the prompt, both contexts are known before the first token: nothing is marked.
    firsts = {text(prompted, seed)[1] for seed in range(20)}
    assert firsts == {0, 1}


def test_short_memory_marks_again() -> None:
    forgetful = VllmGumbel(context_width=1, deduplicate_contexts_max_history=2)
    state = forgetful.start()
    none = np.empty(0, dtype=np.int64)
    seen = [forgetful.context(none, [7, 7, 8, 9, 7][:i], state) is not None for i in range(6)]
    # Contexts -1, 7, 7, 8, 9, 7: the second 7 comes one later, the third three later.
    assert seen == [True, True, False, True, True, True]


def test_two_texts_are_one_claim() -> None:
    key = key_of(42, KeyForm.UINT64)
    case = DATA["detections"][0]["tokens"]
    one = VllmGumbel().read(Written(tokens=case), key)
    both = VllmGumbel().read([Written(tokens=case), Written(tokens=case)], key)
    assert both.log_pvalue == one.log_pvalue and both.n_tokens == 2 * one.n_tokens
    assert both.dropped["repeated context"] == len(case)
    assert VllmGumbel().read([], key).log_pvalue == 0.0


def test_warnings_say_what_was_assumed() -> None:
    text = Written(tokens=DATA["detections"][0]["tokens"])
    key = key_of(42, KeyForm.UINT64)
    assert any("alpha not given" in w for w in VllmDualGumbel().read(text, key).warnings)
    assert not VllmDualGumbel(alpha=0.1).read(text, key).warnings
    assert VllmGumbel(context_width=17).read(text, key).warnings
    for bad in ({"alpha": -0.1}, {"alpha": 1.5}, {"context_width": 0}):
        with pytest.raises(SchemeError):
            VllmDualGumbel(**bad)


def lattice(u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scores of vLLM's 24-bit numbers by cells of uniform numbers, largest scores first."""
    mantissa = 2**24 - np.ceil(u * 2.0**24)
    words = (mantissa.astype(np.uint64) << np.uint64(8)).astype(np.uint32)
    return -np.log1p(-uniforms(words).astype(np.float64))


@pytest.mark.slow
def test_no_score_exceeds_an_exponential_by_more_than_the_lattice() -> None:
    every = np.arange(2**24, dtype=np.uint32) << np.uint32(8)
    scores = -np.log1p(-uniforms(every).astype(np.float64))
    # The exponential of a cell is at least that of its upper end.
    least = -np.log((2.0**24 - np.arange(2**24)) / 2.0**24)
    assert 0.0 < (scores - least).max() <= 2.0**-23
    assert scores.max() == pytest.approx(24 * math.log(2.0))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "alpha"), [(32, 0.1), (32, 0.2), (200, 0.1), (1, 0.1)])
def test_realised_over_nominal(n: int, alpha: float) -> None:
    for nominal in (1e-2, 1e-4, 1e-6, 1e-9):
        low, high = 0.0, 100.0 + 4.0 * n
        for _ in range(100):
            middle = 0.5 * (low + high)
            above = stats.log_sf_two_gammas(middle, n, alpha) > math.log(nominal)
            low, high = (middle, high) if above else (low, middle)
        if n == 1 and low > 0.7 * 16.6:
            continue  # one position of 24 bits ends here
        samples = min(100_000, 8_000_000 // n)
        true = realised(lattice, (1.0 - alpha, alpha), n, low, samples=samples)
        assert 0.9 < true / nominal < 1.1, (n, alpha, nominal, true / nominal)


def test_the_tool_understates_its_p_value() -> None:
    from filigrane.foreign.vllm import _moment_matched

    total = 58.0
    exact = stats.log_sf_two_gammas(total, 32, 0.1)
    assert 0.2 < exact - _moment_matched(total, 32, 0.1) < 1.0


SCRIPT = """
import json, sys
import torch
from vllm.v1.watermarking.gumbel import (
    DualKeyGumbelWatermarkDetector, DualKeyGumbelWatermarker, GumbelWatermarkDetector,
    GumbelWatermarker,
)
asked = json.load(sys.stdin)
answers = []
for job in asked["read"]:
    kind = DualKeyGumbelWatermarkDetector if "alpha" in job else GumbelWatermarkDetector
    more = {"alpha": job["alpha"]} if "alpha" in job else {}
    detector = kind(job["key"], job["context_width"], **more)
    found = detector.detect(job["tokens"])
    answers.append([found.score, found.p_value, found.num_scored_tokens, found.is_watermarked])
texts = []
for job in asked["write"]:
    width, generator = job["context_width"], torch.Generator().manual_seed(1)
    if "alpha" in job:
        marker = DualKeyGumbelWatermarker(job["key"], width, alpha=job["alpha"])
    else:
        marker = GumbelWatermarker(job["key"], width)
    def plain(logits):
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    tokens, seen = [], set()
    for step in range(job["length"]):
        context = tuple(([-1] * width + tokens)[-width:])
        logits = 2.0 * torch.randn(1, job["vocab"], generator=generator)
        skip = torch.tensor([context in seen])
        seen.add(context)
        sample = marker.sample(logits, torch.tensor([context]), plain, skip_mask=skip)
        tokens.append(int(sample.token_ids[0]))
    texts.append(tokens)
print("ANSWER " + json.dumps({"read": answers, "write": texts}))
"""


def ask_vllm(question: Any) -> Any:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [str(PROGRAM.with_name("python")), "-c", SCRIPT],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("ANSWER "))


@pytest.mark.vllm
@pytest.mark.skipif(
    not PROGRAM.with_name("python").exists(),
    reason="no vLLM: `make vllm`, or name its program in FILIGRANE_VLLM",
)
def test_vllm_reads_what_we_write_and_we_read_what_vllm_writes() -> None:
    key, other = 0xDEADBEEFCAFEF00D, 77
    profiles = [VllmGumbel(), VllmGumbel(context_width=2), VllmDualGumbel(alpha=0.1)]
    texts = [written(p, key_of(key, KeyForm.UINT64)).tokens.tolist() for p in profiles]
    reads, writes = [], []
    for profile, tokens in zip(profiles, texts, strict=True):
        job = {"context_width": profile.context_width}
        job |= {"alpha": profile.alpha} if isinstance(profile, VllmDualGumbel) else {}
        reads += [{**job, "key": number, "tokens": tokens} for number in (key, other)]
        writes.append({**job, "key": key, "length": 120, "vocab": 500})
    answer = ask_vllm({"read": reads, "write": writes})
    told = iter(answer["read"])
    for profile, tokens in zip(profiles, texts, strict=True):
        for number in (key, other):
            score, p_value, n, marked = next(told)
            ours = profile.read(Written(tokens=tokens), key_of(number, KeyForm.UINT64))
            assert close(ours.compat["score"], score, 1e-9)
            assert close(ours.compat["p_value"], p_value, 1e-6)
            assert ours.n_scored == n
            assert not marked or number == key
            assert number != key or (marked and p_value < 1e-10)
    for profile, tokens in zip(profiles, answer["write"], strict=True):
        mine = profile.read(Written(tokens=tokens), key_of(key, KeyForm.UINT64))
        assert mine.log_pvalue < 2 * CHANCE
        assert profile.read(Written(tokens=tokens), key_of(other, KeyForm.UINT64)).pvalue > 1e-6
