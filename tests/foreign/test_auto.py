"""Reading without knowing the tool: what is tried, and what it costs."""

import math

import numpy as np
import pytest

import filigrane as fg
from filigrane import stats
from filigrane.errors import FiligraneError, KeyFormatError
from filigrane.foreign import (
    ForeignKey,
    KeyForm,
    SglangGumbel,
    VllmGumbel,
    Written,
    from_tag,
    read_auto,
    usual_candidates,
)
from foreignkit import key_of, random_keys, written

TOKENS = Written(tokens=np.random.default_rng(0).integers(0, 900, 150))


@pytest.mark.parametrize(
    "tag", ["vllm-gumbel", "sglang-gumbel", "synthid-hf", "hf-kgw-lefthash:vocab_size=600"]
)
def test_the_right_profile_comes_first(tag: str) -> None:
    profile = from_tag(tag)
    (key,) = random_keys(profile, 1)
    result = read_auto(written(profile, key), key, vocab_size=600)
    assert result.best.profile.partition(":")[0] == profile.name
    assert result.log_pvalue < -20.0
    corrected = result.best.log_pvalue + math.log(result.n_candidates)
    assert result.log_pvalue == pytest.approx(corrected, abs=1e-12)
    assert len(result.readings) == result.n_candidates
    assert f"Bonferroni over {result.n_candidates}" in result.method


def test_a_filigrane_key_stands_for_its_numbers_under_every_profile() -> None:
    root = fg.Key.generate("acme").user(3)
    profile = SglangGumbel()
    text = written(profile, ForeignKey.derive(root, profile))
    result = read_auto(text, root)
    assert result.best.profile.startswith("sglang-gumbel") and result.best.key == "acme/3"
    profiles, skipped = usual_candidates()
    assert result.n_candidates == len(profiles)
    assert set(skipped) <= set(result.skipped) and "hf-kgw-lefthash" in skipped
    more, none = usual_candidates(600)
    assert len(more) > len(profiles) and not none


def test_unmarked_text_pays_for_all_readings() -> None:
    keys = [*random_keys(VllmGumbel(), 12), key_of("ab", KeyForm.HEX)]
    result = read_auto(TOKENS, keys, candidates=[VllmGumbel(), SglangGumbel()])
    assert result.n_candidates == 13
    logs = [reading.log_pvalue for reading in result.readings]
    assert logs == sorted(logs)
    assert result.log_pvalue == stats.bonferroni(logs[0], 13) and result.log_pvalue > -14.0
    # One number given twice is one reading.
    twice = read_auto(TOKENS, [keys[0], keys[0]], candidates=[VllmGumbel()])
    assert twice.n_candidates == 1
    with pytest.raises(TypeError):
        bool(result)


def test_what_does_not_fit_is_named() -> None:
    result = read_auto(TOKENS, key_of("42", KeyForm.UINT64))
    assert "sglang-gumbel" in " ".join(result.skipped) and result.n_candidates == 2
    large = Written(tokens=[5, 70_000, 6, 7, 8, 9, 10, 11])
    result = read_auto(large, key_of(7, KeyForm.INTEGER), vocab_size=600)
    assert any("70000" in why for why in result.skipped.values())
    with pytest.raises(KeyFormatError, match="hex"):
        read_auto(TOKENS, key_of("42", KeyForm.UINT64), candidates=[SglangGumbel()])
    with pytest.raises(FiligraneError):
        read_auto(TOKENS, [])
    with pytest.raises(KeyFormatError):
        read_auto(TOKENS, ["42"])  # type: ignore[list-item]
