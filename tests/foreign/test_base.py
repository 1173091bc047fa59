"""Keys, texts, results and tags: what all foreign profiles share."""

import copy
import hashlib
import hmac
import pickle
import stat
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import filigrane as fg
from filigrane import foreign
from filigrane.errors import (
    KeyFormatError,
    SchemeError,
    SecretLeakError,
    TokenError,
    VocabularyMismatch,
)
from filigrane.foreign import ForeignKey, KeyForm, Profile, VllmGumbel, Written
from filigrane.foreign.keys import load_any
from filigrane.foreign.profiles import parameters
from foreignkit import key_of, random_keys
from keymaker import key_of as filigrane_key

CANARY = 13371337420420999
EVERY = [foreign.from_tag(name, vocab_size=1000) for name in foreign.PROFILES]


def secure(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


# ------------------------------------------------------------------ keys


@pytest.mark.parametrize(
    ("text", "form", "numbers"),
    [
        ("42", KeyForm.UINT64, (42,)),
        ("0xDEADbeef\n", KeyForm.UINT64, (0xDEADBEEF,)),
        ("# vLLM\n\n18446744073709551615", KeyForm.UINT64, (2**64 - 1,)),
        ("0123456789abcdef", KeyForm.HEX, (0x0123456789ABCDEF,)),
        ("0x2A", KeyForm.HEX, (42,)),
        ("10 20", KeyForm.HEX_PAIR, (16, 32)),
        ("-9223372036854775808", KeyForm.INTEGER, (-(2**63),)),
        ("[654, 400,\n 836]", KeyForm.INTEGERS, (654, 400, 836)),
        ("654 -400", KeyForm.INTEGERS, (654, -400)),
    ],
)
def test_key_texts(text: str, form: KeyForm, numbers: tuple[int, ...]) -> None:
    key = ForeignKey.from_text(text, form, "acme/7")
    assert key.reveal() == numbers and key.form is form and key.name == "acme/7"
    assert ForeignKey.from_text(key.export_text(), form, "acme/7") == key
    assert hash(key) == hash(ForeignKey.from_text(text, form, "acme/7"))


@pytest.mark.parametrize(
    ("text", "form", "words"),
    [
        ("", KeyForm.UINT64, "no key here"),
        ("# only a note", KeyForm.HEX, "no key here"),
        (f"{CANARY} {CANARY}", KeyForm.UINT64, "2 numbers"),
        (f"-{CANARY}", KeyForm.UINT64, "out of range"),
        ("18446744073709551616", KeyForm.UINT64, "out of range"),
        (f"{CANARY}x", KeyForm.UINT64, "not of this form"),
        (f"g{CANARY}", KeyForm.HEX, "not of this form"),
        ("0123456789abcdef0", KeyForm.HEX, "not of this form"),
        ("ab", KeyForm.HEX_PAIR, "1 numbers"),
        ("9223372036854775808", KeyForm.INTEGERS, "out of range"),
        ("1.5", KeyForm.INTEGER, "not of this form"),
        (f"{2**70}", KeyForm.INTEGER, "not of this form"),
    ],
)
def test_texts_that_are_no_keys(text: str, form: KeyForm, words: str) -> None:
    with pytest.raises(KeyFormatError, match=words) as caught:
        ForeignKey.from_text(text, form)
    assert str(CANARY)[:6] not in "".join(traceback.format_exception(caught.value, limit=0))


def test_a_key_never_shows_its_numbers(tmp_path: Path) -> None:
    key = key_of(CANARY, KeyForm.UINT64)
    assert key.reveal() == (CANARY,)
    result = VllmGumbel().read(Written(tokens=[1, 2, 3]), key)
    shown = f"{key!r} {key} {result!r} {VllmGumbel()!r} {copy.deepcopy(key)!r}"
    assert str(CANARY) not in shown and f"{CANARY:x}" not in shown
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(SecretLeakError):
            pickle.dumps(key, protocol)
    with pytest.raises(AttributeError):
        key.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        ForeignKey()
    for name in (str(CANARY) + "!", ""):
        with pytest.raises(KeyFormatError) as caught:
            ForeignKey.from_text("5", KeyForm.UINT64, name)
        assert str(CANARY) not in str(caught.value)
    # What a traceback with local variables would show.
    try:
        ForeignKey.from_text(f"{CANARY} junk", KeyForm.UINT64)
    except KeyFormatError as error:
        told = "".join(
            traceback.TracebackException.from_exception(error, capture_locals=True).format()
        )
    frames = [line for line in told.splitlines() if "test_base" not in line]
    inside = "\n".join(frames[next(i for i, f in enumerate(frames) if "keys.py" in f) :])
    assert str(CANARY) not in inside


def test_key_files(tmp_path: Path) -> None:
    path = secure(tmp_path / "engine.key", f"# a note\n{CANARY}\n")
    key = ForeignKey.load(path, KeyForm.UINT64)
    assert key.reveal() == (CANARY,) and key.name == "engine"
    path.chmod(0o644)
    with pytest.raises(KeyFormatError, match="chmod 600"):
        ForeignKey.load(path, KeyForm.UINT64)
    path.chmod(stat.S_IRUSR)
    with pytest.raises(KeyFormatError, match="no such file"):
        ForeignKey.load(tmp_path / "none", KeyForm.UINT64)
    with pytest.raises(KeyFormatError, match="hex"):
        ForeignKey.load(secure(tmp_path / "odd", "xyz"), KeyForm.HEX)
    root = fg.Key.generate("acme")
    root.save(tmp_path / "root.key")
    with pytest.raises(KeyFormatError, match="derive"):
        ForeignKey.load(tmp_path / "root.key", KeyForm.UINT64)
    assert load_any(tmp_path / "root.key") == root
    found = load_any(path)
    assert isinstance(found, tuple)
    assert {k.form for k in found} == {
        KeyForm.UINT64,
        KeyForm.INTEGER,
        KeyForm.INTEGERS,
    }  # 17 digits are too many for hex


def expand(key: bytes, info: bytes) -> bytes:
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()


@pytest.mark.parametrize("profile", EVERY, ids=lambda p: p.name)
def test_derived_keys_are_those_of_the_specification(profile: Profile) -> None:
    secret = bytes(range(32))
    root = filigrane_key(secret, "alpha", 2)
    label = len(profile.name).to_bytes(2, "big") + profile.name.encode()
    for key, name in ((root, "alpha"), (root.user(7), "alpha/7")):
        wanted = []
        for number in range(profile.key_count):
            if key is root:
                block = expand(secret, b"filigrane/v1/foreign" + label + bytes([number]))
            else:
                parent = expand(secret, b"filigrane/v1/foreign-users" + label + bytes([number]))
                block = expand(parent, b"filigrane/v1/user" + (7).to_bytes(8, "big"))
            wanted.append(int.from_bytes(block, "big") >> (256 - profile.key_bits))
        derived = ForeignKey.derive(key, profile)
        assert derived.reveal() == tuple(wanted)
        assert derived.form is profile.key_form and derived.name == name
        # The tool's own text form takes them.
        assert ForeignKey.from_text(derived.export_text(), profile.key_form, name) == derived
    with pytest.raises(TypeError):
        ForeignKey.derive("alpha", profile)  # type: ignore[arg-type]


def test_derived_keys_differ_by_profile_and_user() -> None:
    root = fg.Key.generate("acme")
    one, two = foreign.from_tag("vllm-gumbel"), foreign.from_tag("vllm-dual-gumbel")
    keys = [ForeignKey.derive(k, p).reveal() for k in (root, root.user(0)) for p in (one, two)]
    assert len(set(keys)) == 4


# ------------------------------------------------------------------ texts, profiles, results


def test_written_checks_its_tokens() -> None:
    text = Written(tokens=[1, 2, 3], prompt=(4, 5))  # type: ignore[arg-type]
    assert text.tokens.dtype == np.int64 and text.prompt is not None
    for bad in ([-1], ["a"], [[1]]):
        with pytest.raises(TokenError):
            Written(tokens=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", EVERY, ids=lambda p: p.name)
def test_every_profile(profile: Profile) -> None:
    assert foreign.PROFILES[profile.name] is type(profile)
    assert foreign.from_tag(profile.tag) == profile
    assert profile.tool and profile.reference and profile.__doc__
    (key,) = random_keys(profile, 1)
    tokens = np.random.default_rng(0).integers(0, 1000, 80)
    result = profile.read(Written(tokens=tokens), key)
    assert -14.0 < result.log_pvalue <= 0.0
    assert result.profile == profile.tag and result.key == "foreign" and result.n_tokens == 80
    assert 0 < result.n_scored <= 80 and result.method
    assert result.assurance == "detects honest use; does not prove origin"
    assert result.log10_pvalue == pytest.approx(np.log10(result.pvalue))
    with pytest.raises(TypeError, match="log_pvalue"):
        bool(result)
    with pytest.raises(TypeError):
        result.compat["p_value"] = 0.0  # type: ignore[index]
    # Nothing to score is p = 1, and several texts are one claim.
    for nothing in ([], Written(tokens=[]), Written(tokens=[5])):
        empty = profile.read(nothing, key)
        assert empty.log_pvalue == 0.0 or empty.n_scored == 1
    twice = profile.read([Written(tokens=tokens)] * 2, key)
    assert twice.n_tokens == 160
    assert twice.log_pvalue == pytest.approx(result.log_pvalue, rel=0.5, abs=0.5)
    wrong = next(form for form in KeyForm if form is not profile.key_form)
    with pytest.raises(KeyFormatError, match=profile.key_form.value):
        profile.read(
            Written(tokens=tokens), key_of(["1"] * (1 + (wrong is KeyForm.HEX_PAIR)), wrong)
        )
    with pytest.raises(KeyFormatError):
        profile.read(Written(tokens=tokens), "42")  # type: ignore[arg-type]
    with pytest.raises(TokenError):
        profile.read([tokens], key)  # type: ignore[list-item]
    if profile.needs_vocab:
        with pytest.raises(VocabularyMismatch):
            profile.read(Written(tokens=[1, 1000, 2]), key)


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("vlm-gumbel", "Did you mean 'vllm-gumbel'"),
        ("vllm-gumbel:width=3", "no parameter 'width'"),
        ("vllm-gumbel:context_width=x", "not of type int"),
        ("vllm-gumbel:context_width=0", "context_width"),
        ("vllm-gumbel:context_width=1,context_width=1", "twice"),
        ("vllm-gumbel:context_width", "write context_width=VALUE"),
        ("hf-kgw-lefthash", "needs vocab_size"),
        ("synthid-hf:skip_first_ngram_calls=yes", "not of type bool"),
        ("vllm-dual-gumbel:alpha=nan", "not of type float"),
    ],
)
def test_tags_that_are_none(tag: str, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        foreign.from_tag(tag)


def test_tags_read_every_kind_of_value() -> None:
    profile: Any = foreign.from_tag(
        " vllm-gumbel:context_width=2, deduplicate_contexts=all,"
        "deduplicate_contexts_max_history=none "
    )
    assert profile.context_width == 2 and profile.deduplicate_contexts_max_history is None
    assert foreign.from_tag("synthid-hf:skip_first_ngram_calls=true").skip_first_ngram_calls  # type: ignore[attr-defined]
    assert foreign.from_tag("hf-kgw-lefthash:vocab_size=9", vocab_size=5).vocabulary == 9
    assert parameters("vllm-dual-gumbel")["alpha"] is None
