"""Keys from root to version: the golden vectors, what separates keys, and what shows no secret."""

import json
from pathlib import Path
from typing import Any

import pytest

from filigrane.custody.hierarchy import (
    KeySpec,
    TenantSecret,
    commitment,
    derive,
    imported_commitment,
    key_id,
    tenant_message,
)
from filigrane.errors import KeyFormatError, SchemeError
from filigrane.foreign import ForeignKey, KeyForm
from filigrane.keys import Key, _Secret

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "v1" / "custody.json").read_text("utf-8")
)
SALT = bytes(range(32))


def secret(byte: bytes = b"\x07") -> TenantSecret:
    return TenantSecret.of(_Secret(byte * 32))


def spec(**changes: Any) -> KeySpec:
    facts = {"tenant": "acme", "name": "chat", "model": "m", "scheme": "gumbel"}
    return KeySpec(**(facts | changes))


@pytest.mark.parametrize("case", VECTORS["versions"], ids=lambda case: case["id"])
def test_versions_are_the_golden_ones(case: dict[str, Any]) -> None:
    foreign = case["mark"].startswith("vllm")
    known = KeySpec(
        tenant=case["tenant"],
        name=case["name"],
        model=case["model"],
        tokenizer_sha256=case["tokenizer"] or None,
        scheme=None if foreign else case["mark"],
        profile=case["mark"] if foreign else None,
    )
    above = TenantSecret.of(_Secret(bytes.fromhex(case["tenant_secret"])))
    key = derive(above, known, case["version"], bytes.fromhex(case["salt"]))
    assert key.name == case["id"] == key_id(known.tenant, known.name, case["version"])
    assert key.fingerprint == case["fingerprint"] and commitment(key) == case["commitment"]
    # The secret itself shows only in the text form, as its first 32 bytes.
    assert key == Key._of_secret(key.name, 8, _Secret(bytes.fromhex(case["secret"])))


def test_imported_and_content_are_the_golden_ones() -> None:
    for case in VECTORS["imported"]:
        form = KeyForm.INTEGERS if "," in case["key"] else KeyForm.UINT64
        key = ForeignKey.from_text(case["key"], form)
        assert imported_commitment(key, bytes.fromhex(case["opening"])) == case["commitment"]
    for case in VECTORS["content"]:
        above = TenantSecret.of(_Secret(bytes.fromhex(case["tenant_secret"])))
        assert above.content_hash(bytes.fromhex(case["content_sha256"])) == case["content_hash"]


def test_every_part_of_a_key_separates_it() -> None:
    keys = [
        derive(secret(), spec(), 1, SALT),
        derive(secret(b"\x08"), spec(), 1, SALT),
        derive(secret(), spec(), 2, SALT),
        derive(secret(), spec(), 1, SALT[::-1]),
        derive(secret(), spec(name="chat2"), 1, SALT),
        derive(secret(), spec(model="m2"), 1, SALT),
        derive(secret(), spec(tokenizer_sha256="0" * 64), 1, SALT),
        derive(secret(), spec(scheme="gumbel:context_width=3"), 1, SALT),
    ]
    assert len({key.fingerprint for key in keys}) == len(keys)
    assert len({commitment(key) for key in keys}) == len(keys)
    # Names do not run into each other.
    one = derive(secret(), spec(name="ab", model="c"), 1, SALT)
    two = derive(secret(), spec(name="a", model="bc"), 1, SALT)
    assert one.fingerprint != two.fingerprint


def test_a_default_that_is_spelled_out_is_the_same_key() -> None:
    short, long = spec(), spec(scheme="gumbel:context_width=4")
    assert short == long and short.mark == "gumbel:context_width=4"
    assert spec(scheme=None, profile="vllm-gumbel").mark.startswith("vllm-gumbel:")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tenant": "Acme"},
        {"tenant": "-acme"},
        {"tenant": "a" * 25},
        {"tenant": ""},
        {"name": "a.b"},
        {"name": "a" * 29},
        {"model": "../x"},
        {"model": "a b"},
        {"scheme": None},
        {"profile": "vllm-gumbel"},
        {"tokenizer_sha256": "A" * 64},
        {"tokenizer_sha256": "0" * 63},
        {"slots": 0},
        {"slots": 65},
        {"slots": True},
        {"source": "found"},
    ],
    ids=str,
)
def test_specs_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(KeyFormatError):
        spec(**wrong)


def test_unknown_marks_are_refused() -> None:
    with pytest.raises(SchemeError):
        spec(scheme="gumble")
    with pytest.raises(SchemeError):
        spec(scheme=None, profile="vllm")


def test_derivation_refuses_what_is_out_of_range() -> None:
    for version in (0, 1_000_000, -1):
        with pytest.raises(KeyFormatError):
            derive(secret(), spec(), version, SALT)
    for salt in (b"", SALT[:31], SALT + b"x"):
        with pytest.raises(KeyFormatError, match="salt"):
            derive(secret(), spec(), 1, salt)
    with pytest.raises(KeyFormatError):
        TenantSecret.of(_Secret(b"short"))
    with pytest.raises(KeyFormatError):
        tenant_message("Acme")
    with pytest.raises(KeyFormatError):
        imported_commitment(derive(secret(), spec(), 1, SALT), b"short")


def test_nothing_shows_the_secret() -> None:
    held = secret(b"\xab")
    shown = f"{held!r} {held} {derive(held, spec(), 1, SALT)!r} {spec()!r}"
    assert "abab" not in shown and "\\xab" not in shown
    with pytest.raises(Exception, match="pickle"):
        __import__("pickle").dumps(held)


def test_the_name_of_an_imported_key_is_not_committed_to() -> None:
    one = Key._of_secret("old-name", 4, _Secret(b"\x01" * 32))
    other = Key._of_secret("old-name", 4, _Secret(b"\x02" * 32))
    assert imported_commitment(one, SALT) != imported_commitment(other, SALT)
    assert imported_commitment(one, SALT) != imported_commitment(one, SALT[::-1])
