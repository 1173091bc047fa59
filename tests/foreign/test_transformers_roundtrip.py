"""Round trips with transformers itself: what it marks we read, what we write it confirms.

The model is a real one; the marks are made and judged by transformers' own `WatermarkingConfig`,
`WatermarkDetector`, `SynthIDTextWatermarkingConfig` and `SynthIDTextWatermarkLogitsProcessor`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    SynthIDTextWatermarkingConfig,
    SynthIDTextWatermarkLogitsProcessor,
    WatermarkDetector,
    WatermarkingConfig,
)

from filigrane.adapters.models import LoadedModel, load
from filigrane.adapters.transformers import TransformersModel
from filigrane.embedding import Sampling
from filigrane.foreign import (
    ForeignKey,
    HfLefthash,
    HfSelfhash,
    KeyForm,
    KgwExtended,
    SynthIDHf,
    ThreeBricksMaryland,
    ThreeBricksOpenai,
    Written,
    read_auto,
    write,
)
from filigrane.stats import log_sf_binomial

pytestmark = [pytest.mark.slow, pytest.mark.model]

PROMPT = "The harbour of the old town was built by people who"
NEW_TOKENS = 70
SYNTHID_KEYS = [7919, 104729, 1299709, 15485867, 32452843, 49979687, 67867967, 86028121, 982451653]


@dataclass(frozen=True)
class Setting:
    """One seeding, as transformers is told and as we are."""

    config: Any
    profile: HfLefthash | HfSelfhash
    key: ForeignKey


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load("smollm2")


@pytest.fixture(scope="module")
def prompt(smollm2: LoadedModel) -> Any:
    return smollm2.tokenizer(PROMPT, return_tensors="pt")


def kgw(smollm2: LoadedModel, scheme: str, *, width: int, key: int, ratio: float) -> Setting:
    config = WatermarkingConfig(
        greenlist_ratio=ratio,
        bias=4.0,
        hashing_key=key,
        seeding_scheme=scheme,
        context_width=width,
    )
    kind = HfLefthash if scheme == "lefthash" else HfSelfhash
    profile = kind(
        vocab_size=smollm2.vocab_size, greenlist_ratio=ratio, bias=4.0, context_width=width
    )
    return Setting(config, profile, ForeignKey.from_text(str(key), KeyForm.INTEGER, "theirs"))


CASES = [("lefthash", 1, 271828182845, 0.25), ("selfhash", 3, 314159265, 0.4)]


def detector_of(smollm2: LoadedModel, setting: Setting, *, distinct: bool) -> WatermarkDetector:
    return WatermarkDetector(
        model_config=smollm2.model.config,
        device="cpu",
        watermarking_config=setting.config,
        ignore_repeated_ngrams=distinct,
    )


GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 0.95}
PURE: dict[str, Any] = {"do_sample": True, "top_k": 0}


@pytest.fixture(scope="module")
def generated(smollm2: LoadedModel, prompt: Any) -> Callable[[Any, dict[str, Any]], np.ndarray]:
    """Texts that transformers wrote, each once: generated(watermarking_config, decoding)."""
    texts: dict[str, np.ndarray] = {}

    def text(config: Any, decoding: dict[str, Any]) -> np.ndarray:
        name = repr((None if config is None else config.to_dict(), decoding))
        if name not in texts:
            torch.manual_seed(11)
            with torch.no_grad():
                out = smollm2.model.generate(
                    **prompt,
                    watermarking_config=config,
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    pad_token_id=smollm2.tokenizer.eos_token_id,
                    **decoding,
                )
            texts[name] = out[0, prompt["input_ids"].shape[1] :].numpy()
        return texts[name]

    return text


@pytest.mark.parametrize(("scheme", "width", "number", "ratio"), CASES)
def test_we_read_what_transformers_marks(
    smollm2: LoadedModel,
    prompt: Any,
    generated: Callable[[Any, dict[str, Any]], np.ndarray],
    scheme: str,
    width: int,
    number: int,
    ratio: float,
) -> None:
    setting = kgw(smollm2, scheme, width=width, key=number, ratio=ratio)
    for decoding in (SAMPLED, GREEDY):
        tokens = generated(setting.config, decoding)
        known = prompt["input_ids"][0].numpy()
        found = setting.profile.read(Written(tokens=tokens, prompt=known), setting.key)
        assert found.log10_pvalue < -8, decoding
        # what transformers says of the same ids
        for distinct, rule in ((False, "all"), (True, "distinct")):
            theirs = detector_of(smollm2, setting, distinct=distinct)(
                torch.tensor(tokens)[None], return_dict=True
            )
            assert found.compat[f"num_tokens_scored_{rule}"] == theirs.num_tokens_scored[0]
            assert found.compat[f"num_green_tokens_{rule}"] == theirs.num_green_tokens[0]
            assert found.compat[f"z_score_{rule}"] == pytest.approx(theirs.z_score[0], rel=1e-12)
        # another key finds nothing
        other = ForeignKey.from_text(str(number + 2), KeyForm.INTEGER, "other")
        assert setting.profile.read(Written(tokens=tokens), other).log10_pvalue > -6
    unmarked = generated(None, PURE)
    assert setting.profile.read(Written(tokens=unmarked), setting.key).log10_pvalue > -6


@pytest.mark.parametrize(("scheme", "width", "number", "ratio"), CASES)
def test_transformers_confirms_what_we_mark(
    smollm2: LoadedModel,
    prompt: Any,
    generated: Callable[[Any, dict[str, Any]], np.ndarray],
    scheme: str,
    width: int,
    number: int,
    ratio: float,
) -> None:
    setting = kgw(smollm2, scheme, width=width, key=number, ratio=ratio)
    lm, ids = TransformersModel(smollm2), prompt["input_ids"][0].numpy()
    for sampling in (Sampling(temperature=0.9, top_p=0.95), Sampling(temperature=0.0)):
        tokens = write(
            lm,
            ids,
            NEW_TOKENS,
            setting.key,
            setting.profile,
            rng=np.random.default_rng(3),
            sampling=sampling,
        )
        theirs = detector_of(smollm2, setting, distinct=True)(
            torch.tensor(tokens)[None], return_dict=True
        )
        assert theirs.prediction[0] and theirs.z_score[0] > 5
        found = setting.profile.read(Written(tokens=tokens, prompt=ids), setting.key)
        assert found.log10_pvalue < -8
        if sampling.greedy:  # nothing is random: both writers write one text
            assert tokens.tolist() == generated(setting.config, GREEDY).tolist()


# ------------------------------------------------------------------------ SynthID


def synthid_processor(config: SynthIDTextWatermarkingConfig) -> Any:
    return SynthIDTextWatermarkLogitsProcessor(
        ngram_len=config.ngram_len,
        keys=config.keys,
        sampling_table_size=config.sampling_table_size,
        sampling_table_seed=config.sampling_table_seed,
        context_history_size=config.context_history_size,
        device="cpu",
    )


def mean_score(config: SynthIDTextWatermarkingConfig, tokens: np.ndarray) -> tuple[float, int]:
    """Mean of transformers' own g-values over its own mask, and how many positions that is."""
    processor, ids = synthid_processor(config), torch.tensor(tokens)[None]
    g = processor.compute_g_values(ids)
    mask = processor.compute_context_repetition_mask(ids).bool()
    return float(g[mask].double().mean()), int(mask.sum())


def synthid() -> tuple[Any, SynthIDHf, ForeignKey]:
    config = SynthIDTextWatermarkingConfig(keys=SYNTHID_KEYS, ngram_len=5)
    text = ", ".join(map(str, SYNTHID_KEYS))
    key = ForeignKey.from_text(text, KeyForm.INTEGERS, "theirs")
    return config, SynthIDHf(ngram_len=5, scoring="mean"), key


def test_we_read_synthid_of_transformers(
    generated: Callable[[Any, dict[str, Any]], np.ndarray],
) -> None:
    config, profile, key = synthid()
    tokens = generated(config, PURE)
    found = profile.read(Written(tokens=tokens), key)
    score, n = mean_score(config, tokens)
    assert found.compat["num_scored_positions"] == n
    assert found.compat["mean_score"] == pytest.approx(score, rel=1e-12)
    assert found.log10_pvalue < -8
    unmarked = generated(None, PURE)
    assert profile.read(Written(tokens=unmarked), key).log10_pvalue > -6


def test_transformers_confirms_our_synthid(smollm2: LoadedModel, prompt: Any) -> None:
    config, profile, key = synthid()
    tokens = write(
        TransformersModel(smollm2),
        prompt["input_ids"][0].numpy(),
        NEW_TOKENS,
        key,
        profile,
        rng=np.random.default_rng(5),
        sampling=Sampling(),
    )
    score, n = mean_score(config, tokens)
    bits = n * len(SYNTHID_KEYS)
    assert log_sf_binomial(round(score * bits), bits, 0.5) < math.log(1e-8)
    assert profile.read(Written(tokens=tokens), key).log10_pvalue < -8


# ------------------------------------------------------------------------ tools that are not here


def test_the_other_lists_on_a_real_model(smollm2: LoadedModel, prompt: Any) -> None:
    """lm-watermarking and three_bricks: written in their form, read back, and told apart."""
    lm, ids = TransformersModel(smollm2), prompt["input_ids"][0].numpy()
    key = ForeignKey.from_text("918273645", KeyForm.INTEGER, "ours")
    profiles = [
        KgwExtended(vocab_size=smollm2.vocab_size, scheme="selfhash", delta=4.0),
        KgwExtended(vocab_size=smollm2.vocab_size, scheme="minhash", delta=4.0),
        ThreeBricksMaryland(vocab_size=smollm2.vocab_size, ngram=2, gamma=0.25, delta=4.0),
        ThreeBricksOpenai(vocab_size=smollm2.vocab_size, ngram=2),
    ]
    for number, profile in enumerate(profiles):
        tokens = write(
            lm,
            ids,
            50,
            key,
            profile,
            rng=np.random.default_rng(number),
            sampling=Sampling(temperature=1.0, top_p=0.98),
        )
        found = read_auto(Written(tokens=tokens, prompt=ids), key, candidates=profiles)
        assert found.best.profile == profile.tag and found.log10_pvalue < -6
        assert found.readings[1].log10_pvalue > -6


# ------------------------------------------------------------------------ speed


def test_reading_is_faster_than_the_tool(smollm2: LoadedModel) -> None:
    """The same 400 tokens, same counts; one run, one thread each for the tool."""
    setting = kgw(smollm2, "lefthash", width=1, key=424242, ratio=0.25)
    tokens = np.random.default_rng(0).integers(1, smollm2.tokenizer_size, 400)
    setting.profile.read(Written(tokens=tokens), setting.key)  # compiles
    begun = time.perf_counter()
    found = setting.profile.read(Written(tokens=tokens), setting.key)
    ours = time.perf_counter() - begun
    detector = detector_of(smollm2, setting, distinct=False)
    begun = time.perf_counter()
    theirs = detector(torch.tensor(tokens)[None], return_dict=True)
    tool = time.perf_counter() - begun
    assert found.compat["num_green_tokens_all"] == theirs.num_green_tokens[0]
    assert ours * 5 < tool
