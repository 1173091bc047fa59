"""The audit log: golden bytes by an independent implementation, and every way to falsify one."""

import base64
import hashlib
import hmac
import io
import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from filigrane.custody.chain import Record, canonical, genesis, link, timestamp
from filigrane.custody.checkpoints import (
    SIGN_LOG,
    SIGN_RECEIPT,
    Checkpoint,
    Signer,
    checkpoint,
    note,
    sign_checkpoint,
    signer,
    verify_checkpoint,
)
from filigrane.custody.merkle import Tree, verify_consistency
from filigrane.custody.verification import read_lines, verify_log
from filigrane.errors import AuditError, KeyFormatError, SecretLeakError
from filigrane.keys import _Secret

ROOT_SECRET = bytes(range(32))
AT = "2026-11-02T09:30:00.000Z"
FACTS = {"key": "acme.chat@3", "versions": 3, "by_hand": False, "until": None, "who": ["a", "b"]}


def mac(message: bytes, secret: bytes = ROOT_SECRET) -> _Secret[bytes]:
    return _Secret(hmac.digest(secret, message, "sha256"))


LOG = signer(mac(SIGN_LOG), "log-1")
OTHER_LOG = signer(mac(SIGN_LOG, b"another root"), "log-1")
JWKS = {"keys": [LOG.public_jwk()]}


def record(index: int, /, tenant: str = "acme", **other: Any) -> Record:
    values: dict[str, Any] = {
        "tenant": tenant,
        "index": index,
        "at": f"2026-11-02T09:30:{index % 60:02d}.{index % 1000:03d}Z",
        "actor": "marie",
        "kind": "key.create",
        "facts": {**FACTS, "number": index},
    }
    return Record(**(values | other))


@lru_cache
def chain(size: int, tenant: str = "acme", turn: int = -1) -> tuple[tuple[Record, bytes], ...]:
    """Records and their hashes; from record `turn` on it is another history."""
    made, previous = [], genesis(tenant)
    for index in range(size):
        kind = "key.create" if turn < 0 or index < turn else "key.forged"
        entry = record(index, tenant, kind=kind)
        previous = link(previous, entry)
        made.append((entry, previous))
    return tuple(made)


def lines(size: int, tenant: str = "acme", turn: int = -1) -> list[dict[str, Any]]:
    return [
        {"record": json.loads(canonical(entry)), "hash": digest.hex()}
        for entry, digest in chain(size, tenant, turn)
    ]


def point(size: int, tenant: str = "acme", turn: int = -1, by: Signer = LOG) -> Checkpoint:
    hashes = [digest for _, digest in chain(size, tenant, turn)]
    return checkpoint(tenant, hashes, AT, by)


def closed(size: int) -> list[dict[str, Any]]:
    """A log as it is exported: records, then the checkpoint over them."""
    return [*lines(size), {"checkpoint": point(size).to_json()}]


def plain_log(entries: list[dict[str, Any]], tenant: str) -> tuple[list[bytes], bytes]:
    """Hashes and root by SPEC alone; nothing of filigrane."""

    def tree(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return hashlib.sha256(b"\0" + leaves[0]).digest()
        half = 1
        while half * 2 < len(leaves):
            half *= 2
        return hashlib.sha256(b"\1" + tree(leaves[:half]) + tree(leaves[half:])).digest()

    name = tenant.encode()
    previous = hashlib.sha256(
        b"filigrane/v1/audit/genesis" + len(name).to_bytes(2, "big") + name
    ).digest()
    hashes = []
    for entry in entries:
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        previous = hashlib.sha256(b"filigrane/v1/audit/record" + previous + text.encode()).digest()
        hashes.append(previous)
    return hashes, tree(hashes)


# Golden: computed once by `plain_log` and kept, so that both implementations cannot drift together.
GOLDEN_CANONICAL = (
    '{"actor":"marie","at":"2026-11-02T09:30:00.000Z","facts":{"by_hand":false,'
    '"key":"acme.chat@3","name":"Zoë \\"1\\"\\n€","until":null,"versions":3,"who":["a","b"]},'
    '"index":0,"kind":"key.create","tenant":"acme"}'
)
GOLDEN_HASH = "24320e357fc95bc3e593639ec3d5f7dabd06976fdf28d85ab13abb105eaa1f7d"
GOLDEN_HEAD = "9b09a63f0991d0729642d3bb2eee866db68dae5a6395b31deb8e7bcb8fad46f8"
GOLDEN_ROOT = "be3d3225acc030ed47f73a463e056efd55049f4a26ed00b833bdcf81acc55c56"
GOLDEN_SIGNATURE = (
    "LGxvlEWs4qmqSjwnCpArHjiHSNsR081JBpn8kRgaOqenzYiMTGPjoR_OFaf0Xqq2EFdiiCnU5xvbRKwDamN1AQ"
)


def test_golden_record() -> None:
    entry = record(0, facts={**FACTS, "name": 'Zoë "1"\n€'})
    assert canonical(entry).decode() == GOLDEN_CANONICAL
    assert link(genesis("acme"), entry).hex() == GOLDEN_HASH


def test_golden_log_by_an_independent_implementation() -> None:
    entries = [line["record"] for line in lines(7)]
    hashes, top = plain_log(entries, "acme")
    assert [line["hash"] for line in lines(7)] == [digest.hex() for digest in hashes]
    made = point(7)
    assert (made.head, made.root) == (hashes[-1].hex(), top.hex()) == (GOLDEN_HEAD, GOLDEN_ROOT)
    # Ed25519 is deterministic, and the seed is the MAC of the purpose.
    seed = hmac.digest(ROOT_SECRET, b"filigrane/v1/sign/log", "sha256")
    body = (
        f"filigrane/acme\n7\n{base64.b64encode(top).decode()}\n"
        f"head {hashes[-1].hex()}\nat 2026-11-02T09:30:00.000Z\n"
    )
    signature = Ed25519PrivateKey.from_private_bytes(seed).sign(body.encode())
    assert base64.urlsafe_b64encode(signature).decode().rstrip("=") == made.signature
    assert made.signature == GOLDEN_SIGNATURE


def test_logs_are_the_golden_ones() -> None:
    file = Path(__file__).parents[2] / "vectors" / "v1" / "custody.json"
    for case in json.loads(file.read_text("utf-8"))["logs"]:
        hashes, head = [], genesis(case["tenant"])
        for entry in case["records"]:
            head = link(head, Record.from_json(entry))
            hashes.append(head)
        assert [value.hex() for value in hashes] == case["hashes"]
        key = signer(_Secret(bytes.fromhex(case["seed"])), "log-1")
        made = checkpoint(case["tenant"], hashes, case["at"], key)
        jwks = {"keys": [key.public_jwk()]}
        verify_checkpoint(made, jwks)
        assert note(made, jwks).startswith(case["checkpoint"] + "\n")


def test_a_log_verifies() -> None:
    mixed = [{"jwks": JWKS}]
    for size in (1, 4, 9):
        start = len([line for line in mixed if "record" in line])
        mixed += [*lines(9)[start:size], {"checkpoint": point(size).to_json()}]
    report = verify_log(mixed, JWKS, trusted=point(4))
    assert (report.tenant, report.n_records, report.n_checkpoints) == ("acme", 9, 3)
    assert report.n_covered == 9 and report.n_backwards == 0
    assert (report.head, report.root) == (point(9).head, point(9).root)
    assert (report.first_at, report.last_at) == (record(0).at, record(8).at)


def test_a_log_that_is_empty_or_has_no_checkpoint_yet() -> None:
    report = verify_log([{"checkpoint": point(0).to_json()}], JWKS)
    assert (report.n_records, report.n_covered, report.first_at) == (0, 0, None)
    report = verify_log(lines(3), JWKS)
    assert (report.n_records, report.n_covered) == (3, 0)
    with pytest.raises(AuditError, match="neither"):
        verify_log([{"jwks": JWKS}], JWKS)


def test_a_clock_that_went_back_is_told_not_refused() -> None:
    entries = [record(0, at="2026-11-02T09:30:01.000Z"), record(1, at=AT)]
    first = link(genesis("acme"), entries[0])
    hashes = [first, link(first, entries[1])]
    told = [
        {"record": entry.to_json(), "hash": digest.hex()}
        for entry, digest in zip(entries, hashes, strict=True)
    ]
    assert verify_log(told, JWKS).n_backwards == 1


Forgery = Callable[[list[dict[str, Any]], int, st.DataObject], list[dict[str, Any]]]


def changed_value(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value is not True
    if isinstance(value, int):
        return value + 1
    if isinstance(value, list):
        return [*value, "c"]
    return value[:-1] + ("1" if value[-1:] != "1" else "2")


def flip(log: list[dict[str, Any]], at: int, data: st.DataObject) -> list[dict[str, Any]]:
    """Change one member of one record, one fact, or its hash."""
    where = data.draw(st.sampled_from(["actor", "kind", "at", "index", "hash", "fact", "new"]))
    line = json.loads(json.dumps(log[at]))
    if where == "hash":
        line["hash"] = changed_value(line["hash"])
    elif where == "fact":
        name = data.draw(st.sampled_from(sorted(line["record"]["facts"])))
        line["record"]["facts"][name] = changed_value(line["record"]["facts"][name])
    elif where == "new":
        line["record"]["facts"]["more"] = 1
    elif where == "at":
        line["record"]["at"] = "2026-11-02T09:29:59.999Z"
    else:
        line["record"][where] = changed_value(line["record"][where])
    return [*log[:at], line, *log[at + 1 :]]


def drop(log: list[dict[str, Any]], at: int, data: st.DataObject) -> list[dict[str, Any]]:
    return [*log[:at], *log[at + 1 :]]


def duplicate(log: list[dict[str, Any]], at: int, data: st.DataObject) -> list[dict[str, Any]]:
    return [*log[: at + 1], log[at], *log[at + 1 :]]


def reorder(log: list[dict[str, Any]], at: int, data: st.DataObject) -> list[dict[str, Any]]:
    other = data.draw(st.integers(0, len(log) - 2).filter(lambda n: n != at))
    made = list(log)
    made[at], made[other] = made[other], made[at]
    return made


def truncate(log: list[dict[str, Any]], at: int, data: st.DataObject) -> list[dict[str, Any]]:
    """Cut records from `at` on; the checkpoint stays."""
    return [*log[:at], log[-1]]


def splice(log: list[dict[str, Any]], at: int, data: st.DataObject) -> list[dict[str, Any]]:
    """From `at` on another history, well chained from there."""
    return [*lines(len(log) - 1, turn=at), log[-1]]


def foreign(log: list[dict[str, Any]], at: int, data: st.DataObject) -> list[dict[str, Any]]:
    """One record out of another tenant's log."""
    return [*log[:at], lines(len(log) - 1, "globex")[at], *log[at + 1 :]]


FORGERIES: list[Forgery] = [flip, drop, duplicate, reorder, truncate, splice, foreign]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
@settings(max_examples=15)
@given(size=st.integers(2, 12), data=st.data())
def test_a_forged_log_fails(forge: Forgery, size: int, data: st.DataObject) -> None:
    log = closed(size)
    verify_log(log, JWKS)
    at = data.draw(st.integers(0, size - 1))
    forged = forge(log, at, data)
    with pytest.raises(AuditError):
        verify_log(forged, JWKS)


@settings(max_examples=25)
@given(size=st.integers(1, 12), data=st.data())
def test_the_first_bad_record_is_named(size: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, size - 1))
    log = closed(size)
    log[at] = {"record": log[at]["record"], "hash": "0" * 64}
    with pytest.raises(AuditError, match=f"^record {at} "):
        verify_log(log, JWKS)


def test_rehashed_from_a_change_on_only_the_checkpoint_tells() -> None:
    rewritten = [*lines(8, turn=3), {"checkpoint": point(8).to_json()}]
    with pytest.raises(AuditError, match="forked or written anew"):
        verify_log(rewritten, JWKS)


def test_cut_with_its_checkpoints_only_a_kept_one_tells() -> None:
    cut = closed(5)
    verify_log(cut, JWKS)
    with pytest.raises(AuditError, match="record 5 is missing"):
        verify_log(cut, JWKS, trusted=point(8))


def test_written_anew_with_the_services_key_only_a_kept_one_tells() -> None:
    anew = [*lines(8, turn=3), {"checkpoint": point(8, turn=3).to_json()}]
    verify_log(anew, JWKS)
    verify_log(anew, JWKS, trusted=point(3))
    with pytest.raises(AuditError, match="forked"):
        verify_log(anew, JWKS, trusted=point(5))


@settings(max_examples=25)
@given(size=st.integers(2, 40), data=st.data())
def test_a_fork_fails_the_consistency_proof(size: int, data: st.DataObject) -> None:
    turn = data.draw(st.integers(0, size - 1))
    old = data.draw(st.integers(turn + 1, size))
    ours = Tree(digest for _, digest in chain(size))
    theirs = Tree(digest for _, digest in chain(size, turn=turn))
    verify_consistency(old, ours.root(old), size, ours.root(), ours.consistency(old))
    for proof in (theirs.consistency(old), ours.consistency(old)):
        with pytest.raises(AuditError):
            verify_consistency(old, ours.root(old), size, theirs.root(), proof)


@pytest.mark.parametrize("member", ["tenant", "size", "head", "root", "at", "key_id", "signature"])
def test_a_checkpoint_with_one_member_changed_fails(member: str) -> None:
    good = point(4)
    verify_checkpoint(good, JWKS)
    values = good.to_json()
    values[member] = {
        "tenant": "globex",
        "size": 5,
        "head": "0" * 64,
        "root": "0" * 64,
        "at": "2026-11-02T09:30:00.001Z",
        "key_id": "log-2",
        "signature": point(5).signature,
    }[member]
    with pytest.raises(AuditError):
        verify_checkpoint(Checkpoint.from_json(values), JWKS)


def test_every_bit_of_a_signature_counts() -> None:
    good = point(4)
    raw = base64.urlsafe_b64decode(good.signature + "==")
    for bit in range(0, 512, 7):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        text = base64.urlsafe_b64encode(flipped).decode().rstrip("=")
        with pytest.raises(AuditError):
            verify_checkpoint(Checkpoint.from_json(good.to_json() | {"signature": text}), JWKS)


def test_another_key_of_the_same_name_does_not_vouch() -> None:
    forged = point(4, by=OTHER_LOG)
    with pytest.raises(AuditError, match="not signed by log-1"):
        verify_checkpoint(forged, JWKS)
    with pytest.raises(AuditError):
        verify_log([*lines(4), {"checkpoint": forged.to_json()}], JWKS)
    # A set of keys inside the file is no proof of anything.
    with pytest.raises(AuditError):
        inside = {"keys": [OTHER_LOG.public_jwk()]}
        verify_log([{"jwks": inside}, *lines(4), {"checkpoint": forged.to_json()}], JWKS)


def test_a_receipts_key_does_not_vouch_for_a_log() -> None:
    receipts = signer(mac(SIGN_RECEIPT), "receipt-1")
    assert receipts.public_jwk()["x"] != LOG.public_jwk()["x"]
    with pytest.raises(AuditError, match="log-1"):
        checkpoint("acme", [], AT, receipts)


@pytest.mark.parametrize(
    "jwks",
    [
        {},
        {"keys": "none"},
        {"keys": []},
        {"keys": [LOG.public_jwk(), LOG.public_jwk()]},
        {"keys": [LOG.public_jwk() | {"kty": "EC"}]},
        {"keys": [LOG.public_jwk() | {"crv": "X25519"}]},
        {"keys": [LOG.public_jwk() | {"x": "AAAA"}]},
        {"keys": [LOG.public_jwk() | {"x": "not base64!"}]},
        {"keys": [LOG.public_jwk() | {"x": None}]},
        {"keys": [None, 1]},
    ],
)
def test_a_set_of_keys_that_is_none(jwks: dict[str, Any]) -> None:
    with pytest.raises(AuditError):
        verify_checkpoint(point(2), jwks)


def test_old_keys_verify_beside_new_ones() -> None:
    second = signer(mac(SIGN_LOG, b"root version 2"), "log-2")
    both = {"keys": [LOG.public_jwk(), second.public_jwk()]}
    log = [*lines(3), {"checkpoint": point(3).to_json()}, *lines(6)[3:]]
    log.append({"checkpoint": point(6, by=second).to_json()})
    assert verify_log(log, both).n_checkpoints == 2


def test_a_note_is_what_a_witness_reads() -> None:
    text = note(point(5), JWKS)
    body, _, tail = text.partition("\n\n")
    assert tail.startswith("— filigrane/acme ") and tail.endswith("\n")
    decoded = base64.b64decode(tail.split()[2])
    raw = base64.urlsafe_b64decode(LOG.public_jwk()["x"] + "=")
    assert decoded[:4] == hashlib.sha256(b"filigrane/acme\n\x01" + raw).digest()[:4]
    key = Ed25519PublicKey.from_public_bytes(raw)
    key.verify(decoded[4:], (body + "\n").encode())
    with pytest.raises(InvalidSignature):
        key.verify(decoded[4:], body.encode())
    origin, size, top = body.split("\n")[:3]
    assert (origin, size, base64.b64decode(top).hex()) == ("filigrane/acme", "5", point(5).root)


def test_sign_checkpoint_is_checkpoint() -> None:
    tree = Tree(digest for _, digest in chain(6))
    head = chain(6)[-1][1]
    made = sign_checkpoint("acme", size=6, head=head, root=tree.root(), at=AT, signer=LOG)
    assert made == point(6) == Checkpoint.from_json(json.loads(json.dumps(made.to_json())))


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "Acme"},
        {"tenant": ""},
        {"tenant": None},
        {"index": -1},
        {"index": True},
        {"index": 1.0},
        {"index": 2**53},
        {"at": "2026-11-02T09:30:00Z"},
        {"at": "2026-11-02T09:30:00.000+00:00"},
        {"at": "2026-02-30T09:30:00.000Z"},
        {"at": None},
        {"actor": ""},
        {"actor": "a\nb"},
        {"actor": "x" * 201},
        {"kind": "Key.create"},
        {"kind": "key create"},
        {"kind": "key.create\n"},
        {"facts": None},
        {"facts": {"A": 1}},
        {"facts": {"a-b": 1}},
        {"facts": {1: 1}},
        {"facts": {"a": 0.5}},
        {"facts": {"a": float("nan")}},
        {"facts": {"a": 2**53}},
        {"facts": {"a": b"bytes"}},
        {"facts": {"a": {"b": 1}}},
        {"facts": {"a": ["b", 1]}},
        {"facts": {"a": _Secret("x")}},
        {"facts": {"a": datetime.now(UTC)}},
        {"facts": {"a": "\ud800"}},
        {"facts": {"a": "x" * 70_000}},
    ],
)
def test_what_a_record_cannot_hold(other: dict[str, Any]) -> None:
    with pytest.raises(AuditError):
        record(0, **other)


def test_a_record_does_not_change() -> None:
    who = ["a"]
    entry = record(0, facts={"who": who})
    before = canonical(entry)
    who.append("b")
    assert canonical(entry) == before
    with pytest.raises(TypeError):
        entry.facts["who"] = []  # type: ignore[index]
    with pytest.raises(AttributeError):
        entry.index = 1  # type: ignore[misc]


FACT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.integers(-(2**53) + 1, 2**53 - 1),
    st.booleans(),
    st.none(),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=3),
)


@settings(max_examples=20)
@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), FACT, max_size=5))
def test_a_record_has_one_form(facts: dict[str, Any]) -> None:
    entry = record(3, facts=facts)
    text = canonical(entry)
    read = next(read_lines(io.BytesIO(text + b"\n")))
    assert Record.from_json(read) == entry and canonical(Record.from_json(read)) == text
    turned = record(3, facts=dict(reversed(facts.items())))
    assert canonical(turned) == text


@settings(max_examples=20)
@given(
    st.tuples(FACT, FACT).filter(lambda two: repr(two[0]) != repr(two[1])),
)
def test_other_facts_have_another_hash(two: tuple[Any, Any]) -> None:
    first, second = (link(bytes(32), record(0, facts={"a": value})) for value in two)
    assert first != second


def test_a_hash_belongs_to_one_tenant_and_place() -> None:
    assert genesis("acme") != genesis("acm") != genesis("acme2")
    assert link(genesis("acme"), record(0)) != link(genesis("globex"), record(0))
    with pytest.raises(AuditError):
        link(b"short", record(0))
    with pytest.raises(AuditError):
        genesis("No Tenant")


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[1]",
        b'"text"',
        b'{"record": 1, "record": 2}',
        b'{"record": {"facts": {"a": 1, "a": 2}}}',
        b'{"a": 0.5}',
        b'{"a": 1e3}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"\xff\xfe{}",
        b"[" * 5000 + b"]" * 5000,
        b'{"a": "' + b"x" * 140_000 + b'"}',
    ],
)
def test_a_line_that_two_readers_may_read_differently(line: bytes) -> None:
    stream = io.BytesIO(b'{"jwks": {}}\n' + line + b"\n")
    with pytest.raises(AuditError, match="line 2"):
        list(read_lines(stream))


@pytest.mark.parametrize(
    "line",
    [
        {"record": None, "hash": "0" * 64},
        {"record": {}, "hash": "0" * 64},
        {"hash": "0" * 64},
        {"record": record(0).to_json()},
        {"record": record(0).to_json(), "hash": None},
        {"record": record(0).to_json() | {"more": 1}, "hash": "0" * 64},
        {"record": record(0).to_json(), "hash": chain(1)[0][1].hex().upper()},
        {"record": record(0).to_json(), "hash": chain(1)[0][1].hex(), "more": 1},
        {"checkpoint": None},
        {"checkpoint": point(0).to_json() | {"more": 1}},
        {"checkpoint": point(0).to_json() | {"size": True}},
        {"checkpoint": point(0).to_json(), "record": record(0).to_json()},
        {"something": 1},
        {},
    ],
)
def test_a_line_of_another_shape(line: dict[str, Any]) -> None:
    with pytest.raises(AuditError):
        verify_log([line], JWKS)


def test_signers_show_nothing() -> None:
    assert repr(LOG) == "<Signer log-1>" and LOG.key_id == "log-1"
    with pytest.raises(SecretLeakError):
        pickle.dumps(LOG)
    with pytest.raises(TypeError):
        Signer()
    with pytest.raises(AttributeError):
        LOG.key_id = "log-2"  # type: ignore[misc]
    jwk = LOG.public_jwk()
    assert jwk["kid"] == "log-1" and "d" not in jwk
    for bad in ("", "log", "log-0", "log-x", "token-1"):
        with pytest.raises(KeyFormatError):
            signer(mac(SIGN_LOG), bad)
    with pytest.raises(KeyFormatError):
        signer(_Secret(b"short"), "log-1")


def test_timestamps() -> None:
    moment = datetime(2026, 11, 2, 10, 30, 0, 1999, tzinfo=timezone(timedelta(hours=1)))
    assert timestamp(moment) == "2026-11-02T09:30:00.001Z"
    assert timestamp(datetime(999, 1, 1, tzinfo=UTC)) == "0999-01-01T00:00:00.000Z"
    with pytest.raises(ValueError, match="time zone"):
        timestamp(datetime(2026, 11, 2))


def chained(entries: list[Record]) -> list[dict[str, Any]]:
    """Lines whose hashes fit, whatever the records say."""
    made, previous = [], genesis(entries[0].tenant)
    for entry in entries:
        previous = link(previous, entry)
        made.append({"record": entry.to_json(), "hash": previous.hex()})
    return made


def test_hashes_that_fit_do_not_excuse_a_wrong_number_or_tenant() -> None:
    with pytest.raises(AuditError, match="record 1 is missing"):
        verify_log(chained([record(0), record(2)]), JWKS)
    with pytest.raises(AuditError, match="record 1 is of globex"):
        verify_log(chained([record(0), record(1, "globex")]), JWKS)


def test_a_checkpoint_with_the_right_head_and_another_root_fails() -> None:
    head = chain(4)[-1][1]
    wrong = sign_checkpoint("acme", size=4, head=head, root=bytes(32), at=AT, signer=LOG)
    with pytest.raises(AuditError, match="forked"):
        verify_log([*lines(4), {"checkpoint": wrong.to_json()}], JWKS)
