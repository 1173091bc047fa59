"""Green lists of transformers: every recorded list, count and bias, and what a p-value is worth."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from filigrane.errors import KeyFormatError, LogitsError, SchemeError, VocabularyMismatch
from filigrane.foreign.base import Written
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.foreign.transformers_kgw import HfLefthash, HfSelfhash
from filigrane.stats import log_sf_binomial, log_uniformity

VECTORS = json.loads(
    (Path(__file__).parents[2] / "vectors" / "foreign" / "hf_kgw.json").read_text()
)
PROFILES = {"lefthash": HfLefthash, "selfhash": HfSelfhash}


def integer_key(number: int, name: str = "k") -> ForeignKey:
    return ForeignKey.from_text(str(number), KeyForm.INTEGER, name)


def profile_of(record: dict[str, Any]) -> HfLefthash | HfSelfhash:
    return PROFILES[record["seeding_scheme"]](
        vocab_size=record["vocab_size"],
        greenlist_ratio=record["greenlist_ratio"],
        context_width=record["context_width"],
        bias=record.get("bias", 2.0),
    )


@pytest.mark.parametrize("record", VECTORS["greenlists"], ids=lambda r: f"{r['seeding_scheme']}")
def test_green_lists(record: dict[str, Any]) -> None:
    profile, key = profile_of(record), integer_key(record["hashing_key"])
    assert profile.seed(record["context"], key) == record["manual_seed"]
    green = profile.green(record["context"], key)
    assert green.sum() == record["green_count"] == profile.list_size
    assert "".join(str(int(x)) for x in green[:64]) == record["green_mask_ids_0_63"]
    digest = hashlib.sha256(green.astype(np.uint8).tobytes()).hexdigest()
    assert digest == record["green_mask_sha256"]


@pytest.mark.parametrize("record", VECTORS["detections"], ids=lambda r: r["tag"])
def test_detections(record: dict[str, Any]) -> None:
    profile, key = profile_of(record), integer_key(record["hashing_key"])
    found = profile.read(Written(tokens=record["tokens"]), key)
    for rule, setting in (("all", "False"), ("distinct", "True")):
        expected = record["results"][f"ignore_repeated_ngrams={setting}"]
        for name, value in expected.items():
            got = found.compat[f"{name}_{rule}"]
            assert got == pytest.approx(value, rel=1e-6 if name == "p_value" else 1e-12), name
    # Here no two n-grams are one draw and no context is token 0: our count is that of the distinct.
    assert found.n_scored <= found.compat["num_tokens_scored_distinct"]
    if found.n_scored == found.compat["num_tokens_scored_distinct"]:
        assert found.statistic == found.compat["num_green_tokens_distinct"]
        expected_p = log_sf_binomial(
            int(found.statistic), found.n_scored, profile.list_size / profile.vocab_size
        )
        assert found.log_pvalue == expected_p
    assert found.n_tokens == len(record["tokens"])
    assert sum(found.dropped.values()) + found.n_scored == found.n_tokens


@pytest.mark.parametrize("trace", VECTORS["processor_traces"], ids=lambda t: t["seeding_scheme"])
def test_processor_traces(trace: dict[str, Any]) -> None:
    profile, key = profile_of(trace), integer_key(trace["hashing_key"])
    rule, ids = trace["logits"], np.arange(trace["vocab_size"])
    for step in trace["steps"]:
        pos = step["pos"]
        raw = (((rule["a"] * ids + rule["b"] * pos) % rule["m"]) - rule["c"]) / rule["div"]
        logits = raw.astype(np.float32)
        biased = profile.biased(logits, trace["tokens"][:pos], key)
        green = np.flatnonzero(biased != logits).tolist()
        assert len(green) == step["biased_ids_count"]
        assert green[:20] == step["biased_ids_first20"]
        compact = json.dumps(green, separators=(",", ":")).encode()
        assert hashlib.sha256(compact).hexdigest() == step["biased_ids_sha256"]
        assert np.allclose((biased - logits)[green], trace["bias"])


# ------------------------------------------------------------------------ counting


def text(seed: int, n: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, n)


def test_lefthash_counts_what_the_list_depends_on() -> None:
    """Five-grams with the same last two tokens are one draw; the tool counts them twice."""
    key = integer_key(99)
    profile = HfLefthash(vocab_size=1000, context_width=4)
    tokens = [1, 2, 3, 4, 5, 9, 8, 7, 4, 5]  # 4 -> 5 twice after different contexts
    found = profile.read(Written(tokens=tokens), key)
    assert found.compat["num_tokens_scored_distinct"] == 6
    assert found.n_scored == 5 and found.dropped["draw counted before"] == 1


def test_token_zero_is_no_evidence() -> None:
    """After token 0 the list is the same for every key, so a text can be green there by itself."""
    profile = HfLefthash(vocab_size=1000)
    lists = [profile.green([0], integer_key(k)) for k in (1, 15485863, 2**40 + 1)]
    assert (lists[0] == lists[1]).all() and (lists[0] == lists[2]).all()
    always = np.flatnonzero(lists[0])[1:60]
    tokens = np.column_stack([np.zeros_like(always), always]).ravel()
    found = profile.read(Written(tokens=tokens), integer_key(7))
    assert found.dropped["same list under every key"] == always.shape[0]
    assert found.log_pvalue > math.log(1e-4)
    assert found.compat["z_score_distinct"] > 3  # the tool is taken in


def test_keys_alias_in_their_low_half() -> None:
    profile = HfLefthash(vocab_size=1000)
    tokens = Written(tokens=text(1, 300, 1000))
    one, two = integer_key(12345), integer_key(12345 + 2**32)
    assert profile.read(tokens, one).statistic == profile.read(tokens, two).statistic


def test_several_texts_are_one_claim() -> None:
    key, profile = integer_key(5), HfLefthash(vocab_size=1000)
    a, b = text(1, 100, 1000), text(2, 100, 1000)
    both = profile.read([Written(tokens=a), Written(tokens=b), Written(tokens=a)], key)
    alone = [profile.read(Written(tokens=x), key) for x in (a, b)]
    assert both.n_scored == len(
        {tuple(x[i : i + 2]) for x in (a, b) for i in range(99) if x[i] != 0}
    )
    assert both.n_scored <= alone[0].n_scored + alone[1].n_scored
    assert both.n_tokens == 300 and dict(both.compat) == {}


def test_prompt_completes_the_first_contexts() -> None:
    key = integer_key(5)
    for profile, missing in (
        (HfLefthash(vocab_size=1000, context_width=3), 3),
        (
            HfSelfhash(vocab_size=1000, context_width=3),
            2,
        ),
    ):
        tokens, prompt = text(1, 50, 1000), text(2, 30, 1000)
        without = profile.read(Written(tokens=tokens), key)
        within = profile.read(Written(tokens=tokens, prompt=prompt), key)
        assert without.dropped["incomplete context"] == missing
        assert within.dropped["incomplete context"] == 0
        assert within.n_scored == without.n_scored + missing
        assert dict(within.compat) == dict(without.compat)  # the tool is shown the text alone


def test_leading_bos() -> None:
    key = integer_key(5)
    tokens = text(1, 50, 1000)
    with_bos = HfLefthash(vocab_size=1000, bos_token_id=999).read(
        Written(tokens=[999, *tokens]), key
    )
    plain = HfLefthash(vocab_size=1000).read(Written(tokens=tokens), key)
    assert with_bos.dropped["leading BOS"] == 1
    assert with_bos.statistic == plain.statistic and dict(with_bos.compat) == dict(plain.compat)


@pytest.mark.parametrize("tokens", [[], [3], [3, 4]])
def test_too_short_is_no_evidence(tokens: list[int]) -> None:
    found = HfLefthash(vocab_size=1000, context_width=2).read(
        Written(tokens=np.array(tokens, dtype=np.int64)), integer_key(1)
    )
    assert found.log_pvalue == 0.0 and found.n_scored == 0 and dict(found.compat) == {}


# ------------------------------------------------------------------------ the null


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "length"),
    [
        (HfLefthash(vocab_size=1000), 400),
        (HfLefthash(vocab_size=1001, greenlist_ratio=0.3, context_width=4), 400),
        (HfSelfhash(vocab_size=1000, context_width=3), 300),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_uniform_over_keys(profile: HfLefthash | HfSelfhash, length: int) -> None:
    """One text, 300 keys: p, spread evenly over its steps, is uniform."""
    rng = np.random.default_rng(20260101)
    tokens = Written(tokens=rng.choice(np.arange(profile.vocab_size)[:150], length))
    share = profile.list_size / profile.vocab_size
    spread = []
    for number in rng.integers(1, 2**62, 300).tolist():
        found = profile.read(tokens, integer_key(number))
        above = math.exp(found.log_pvalue)
        after = math.exp(log_sf_binomial(int(found.statistic) + 1, found.n_scored, share))
        spread.append(after + rng.random() * (above - after))
    assert log_uniformity(spread) > math.log(1e-4)


def test_rounding_of_the_list_is_in_the_p_value() -> None:
    """int(7 * 0.25) = 1 green token of 7: the share is 1/7, not 1/4."""
    profile = HfLefthash(vocab_size=7)
    found = profile.read(Written(tokens=text(3, 400, 7)), integer_key(5))
    assert "1/7" in found.method
    expected = log_sf_binomial(int(found.statistic), found.n_scored, 1 / 7)
    assert found.log_pvalue == expected


# ------------------------------------------------------------------------ refusals and warnings


def test_refusals() -> None:
    with pytest.raises(SchemeError, match="greenlist_ratio"):
        HfLefthash(vocab_size=1000, greenlist_ratio=1.0)
    with pytest.raises(SchemeError, match="no green or no red"):
        HfLefthash(vocab_size=3, greenlist_ratio=0.25)
    with pytest.raises(SchemeError, match="context_width"):
        HfSelfhash(vocab_size=1000, context_width=0)
    with pytest.raises(TypeError):
        HfLefthash()  # type: ignore[call-arg]
    profile = HfLefthash(vocab_size=1000)
    with pytest.raises(VocabularyMismatch):
        profile.read(Written(tokens=[1, 1000]), integer_key(1))
    with pytest.raises(KeyFormatError):
        profile.read(Written(tokens=[1, 2]), ForeignKey.from_text("5", KeyForm.UINT64))
    with pytest.raises(LogitsError, match="width of the logits"):
        profile.biased(np.zeros(999, np.float32), [1, 2], integer_key(1))


def test_warnings_name_the_public_key() -> None:
    profile = HfLefthash(vocab_size=1000)
    tokens = Written(tokens=text(1, 20, 1000))
    assert any("public default" in w for w in profile.read(tokens, integer_key(15485863)).warnings)
    assert not any("public" in w for w in profile.read(tokens, integer_key(15485864)).warnings)
    assert any("CPU" in w for w in profile.read(tokens, integer_key(1)).warnings)


def test_results_do_not_show_the_key() -> None:
    canary = 987654321987654
    for profile in (HfLefthash(vocab_size=1000), HfSelfhash(vocab_size=1000)):
        found = profile.read(Written(tokens=text(1, 20, 1000)), integer_key(canary))
        state = profile.start()
        profile.biased(np.zeros(1000, np.float32), [1, 2, 3, 4], integer_key(canary), state=state)
        assert str(canary) not in repr(found) + repr(profile) + repr(state)
        assert "array" not in repr(state)
