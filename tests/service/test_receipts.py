"""Receipts: verified by others' code, refused when anything about them is changed."""

import base64
import hashlib
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from bookkit import TENANT, Book, marked_letters, open_book
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from typer.testing import CliRunner

from filigrane.cli import receipt as cli
from filigrane.errors import FiligraneError, ReceiptError, StateError
from filigrane.keys import Key
from filigrane.service.answers import receipt_answer
from filigrane.service.detecting import Finding, Query
from filigrane.service.receipts import TYPE, WORDS, Receipts, Replay, check_date, verify
from filigrane.service.tokenizing import BYTES_SHA256
from filigrane.store.log import Log


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    with open_book(tmp_path_factory.mktemp("receipts"), TENANT, "other") as opened:
        opened.make("chat", tokenizer=BYTES_SHA256)
        opened.make("more", "greenlist", tokenizer=BYTES_SHA256)
        opened.make("theirs", tenant="other")
        yield opened


@pytest.fixture(scope="module")
def text(book: Book) -> str:
    key = book.keybook.key_of(book.keybook.version(TENANT, "acme.chat@1"))
    assert isinstance(key, Key)
    return marked_letters(key, "gumbel", 300, 1) + " naïve"


@pytest.fixture(scope="module")
def finding(book: Book, text: str) -> Finding:
    found = book.detector.detect(TENANT, Query(text=text, evidence=True))
    assert found.verdict == "detected"
    return found


@pytest.fixture(scope="module")
def token(book: Book, finding: Finding) -> str:
    book.clock.pass_by(5)
    return book.receipts.issue(TENANT, finding, expert=True, actor="judge")


def unpadded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def padded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def independently(token: str, jwks: dict[str, Any], text: str) -> dict[str, Any]:
    """What docs say of receipts, checked with `cryptography` and hashlib alone."""
    head, body, signature = token.split(".")
    header = json.loads(unpadded(head))
    assert header["alg"] == "EdDSA" and header["typ"] == "filigrane-receipt+jws"
    keys = {
        key["kid"]: Ed25519PublicKey.from_public_bytes(unpadded(key["x"])) for key in jwks["keys"]
    }
    keys[header["kid"]].verify(unpadded(signature), f"{head}.{body}".encode())
    claims: dict[str, Any] = json.loads(unpadded(body))
    assert claims["content"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()

    mark = claims["mark"]
    record = json.dumps(
        mark["record"], sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    leaf = hashlib.sha256(
        b"filigrane/v1/audit/record" + bytes.fromhex(mark["previous"]) + record
    ).digest()
    node, index, last = hashlib.sha256(b"\0" + leaf).digest(), mark["record"]["index"], None
    point = mark["checkpoint"]
    last = point["size"] - 1
    for step in map(bytes.fromhex, mark["inclusion"]):
        if index & 1 or index == last:
            node = hashlib.sha256(b"\1" + step + node).digest()
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            node = hashlib.sha256(b"\1" + node + step).digest()
        index, last = index >> 1, last >> 1
    assert node.hex() == point["root"]
    root = base64.b64encode(bytes.fromhex(point["root"])).decode()
    note = (
        f"filigrane/{point['tenant']}\n{point['size']}\n{root}\n"
        f"head {point['head']}\nat {point['at']}\n"
    )
    keys[point["key_id"]].verify(unpadded(point["signature"]), note.encode())
    assert mark["record"]["facts"]["commitment"] == mark["commitment"]
    assert mark["record"]["facts"]["key"] == mark["key"]
    return claims


def test_independent_code_verifies_a_receipt(
    book: Book, text: str, token: str, finding: Finding
) -> None:
    claims = independently(token, book.receipts.jwks(), text)
    assert claims["verdict"] == "detected" and claims["mark"]["key"] == "acme.chat@1"
    assert claims["n_keys"] == 2 and claims["keys"] == ["acme.chat@1", "acme.more@1"]
    assert claims["alpha"] == 1e-6 and claims["tier"] == "expert"
    assert claims["log10_pvalue"] == pytest.approx(finding.log10_pvalue)
    assert claims["spans"] and "never" not in claims["statement"]
    with pytest.raises(AssertionError):
        independently(token, book.receipts.jwks(), text + " ")


def test_ours_verifies_it_too(book: Book, text: str, token: str) -> None:
    found = verify(token, book.receipts.jwks(), text)
    assert found.key_id == "acme.chat@1" and found.tenant == TENANT
    assert found.committed_at is not None and found.committed_at < found.issued_at
    assert verify(f"\n{token} ", book.receipts.jwks()).id == found.id
    # One hash for all normal forms of a text.
    assert verify(token, book.receipts.jwks(), text.replace("ï", "i\u0308")).id == found.id


def test_a_receipt_says_what_could_have_been_tried(book: Book, text: str, token: str) -> None:
    found = verify(token, book.receipts.jwks())
    assert (found.n_keys, found.n_readable, found.hints) == (2, 2, {})
    hinted = book.detector.detect(TENANT, Query(text=text, key="chat", tokenizer="bytes"))
    narrow = verify(
        book.receipts.issue(TENANT, hinted, expert=True, actor="judge"), book.receipts.jwks()
    )
    assert (narrow.n_keys, narrow.n_readable) == (1, 2)
    assert narrow.hints == {"key": "chat", "tokenizer": "bytes"}
    assert "first seen after" in found.claims["statement"]


def test_a_receipt_does_not_count_for_a_text_older_than_the_key(book: Book, token: str) -> None:
    found = verify(token, book.receipts.jwks())
    assert found.committed_at is not None
    check_date(found, found.committed_at)
    with pytest.raises(ReceiptError, match="does not count"):
        check_date(found, found.committed_at - timedelta(seconds=1))


def test_the_service_says_that_a_key_was_compromised_since(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        record = own.make("chat")
        ids = own.write(record, 200, 1)
        own.clock.pass_by(10)
        tokens = []
        for _ in range(2):
            found = own.detector.detect(TENANT, Query(tokens=ids))
            tokens.append(own.receipts.issue(TENANT, found, expert=True, actor="test"))
            own.clock.pass_by(100)
        since = own.clock.now - timedelta(seconds=150)
        before = own.keybook.version(TENANT, record.id)
        assert receipt_answer(own.receipts.verify(tokens[1]), before).counts is True
        own.keybook.compromise(TENANT, "chat", 1, since=since, actor="test")
        now = own.keybook.version(TENANT, record.id)
        old, new = (receipt_answer(own.receipts.verify(one), now) for one in tokens)
        assert (old.counts, new.counts) == (True, False)
        assert "does not count" in new.statement and "does not count" not in old.statement
        assert old.key_state == new.key_state == "compromised"
        assert old.compromised_since == since.isoformat()
        # What is signed from now on does not say that no mark was found, and shows none.
        again = own.detector.detect(TENANT, Query(tokens=ids, evidence=True))
        claims = own.receipts.verify(
            own.receipts.issue(TENANT, again, expert=True, actor="test")
        ).claims
        assert claims["verdict"] == "inconclusive" and claims["spans"] == []
        assert claims["statement"] == WORDS["uncounted"] != WORDS["inconclusive"]


def test_forged_receipts_cost_the_key_management_nothing(book: Book, token: str) -> None:
    asked = 0

    class Counting:
        def __getattr__(self, name: str) -> Any:
            nonlocal asked
            asked += name == "versions"
            return getattr(book.kms, name)

    own = Receipts(Log(book.database, Counting()), Counting())  # type: ignore[arg-type]
    forged = token[:-20] + "A" * 20
    for _ in range(50):
        with pytest.raises(ReceiptError):
            own.verify(forged)
    assert 0 < asked <= 4


def test_public_receipts_hold_no_number_of_the_test(book: Book, finding: Finding) -> None:
    token = book.receipts.issue(TENANT, finding, expert=False, actor="public")
    claims = json.loads(unpadded(token.split(".")[1]))
    assert claims["tier"] == "public"
    assert not {"log10_pvalue", "spans", "n_scored", "n_tokens", "method"} & set(claims)
    assert "pvalue" not in json.dumps(claims)


def test_a_receipt_for_another_text_is_refused(book: Book, text: str, token: str) -> None:
    with pytest.raises(ReceiptError, match="another content"):
        verify(token, book.receipts.jwks(), text + "!")
    with pytest.raises(ReceiptError, match="another content"):
        verify(token, book.receipts.jwks(), [1, 2, 3])


def test_no_byte_can_be_changed(book: Book, text: str, token: str) -> None:
    jwks = book.receipts.jwks()
    step = max(1, len(token) // 400)
    for place in range(0, len(token), step):
        other = "A" if token[place] != "A" else "B"
        with pytest.raises(ReceiptError):
            verify(token[:place] + other + token[place + 1 :], jwks, text)
    for broken in ("", "a.b.c", token[:-1], token + "A", token.rsplit(".", 1)[0], "é" + token):
        with pytest.raises(ReceiptError):
            verify(broken, jwks, text)
    with pytest.raises(ReceiptError):
        verify(token, {"keys": []}, text)
    with pytest.raises(ReceiptError):
        verify(token, {}, text)


@pytest.mark.parametrize("alg", ["none", "HS256", "ES256", "Ed25519"])
def test_other_algorithms_are_refused(book: Book, token: str, alg: str) -> None:
    head, body, signature = token.split(".")
    header = json.loads(unpadded(head)) | {"alg": alg}
    forged = f"{padded(json.dumps(header).encode())}.{body}."
    for tail in ("", signature):
        with pytest.raises(ReceiptError):
            verify(forged + tail, book.receipts.jwks())


def resigned(book: Book, claims: dict[str, Any], *, kid: str | None = None) -> tuple[str, Any]:
    """The claims under a key that a set of keys calls as the service's: a dishonest service."""
    key = Ed25519PrivateKey.generate()
    jwks = json.loads(json.dumps(book.receipts.jwks()))
    name = kid or "receipt-1"
    for one in jwks["keys"]:
        if one["kid"] == name:
            one["x"] = padded(key.public_key().public_bytes_raw())
    header = {"alg": "EdDSA", "kid": name, "typ": TYPE}
    signed = f"{padded(json.dumps(header).encode())}.{padded(json.dumps(claims).encode())}"
    return f"{signed}.{padded(key.sign(signed.encode()))}", jwks


def test_the_key_must_stand_in_the_log_and_before(book: Book, text: str, token: str) -> None:
    """Even who holds the signing key of receipts cannot date a key back."""
    claims = json.loads(unpadded(token.split(".")[1]))
    assert verify(*resigned(book, claims), text).key_id == "acme.chat@1"

    def changed(**fields: Any) -> dict[str, Any]:
        copy: dict[str, Any] = json.loads(json.dumps(claims))
        copy["mark"] |= fields
        return copy

    mark = claims["mark"]
    early = json.loads(json.dumps(claims)) | {"iat": claims["iat"] - 100}
    ground = changed(commitment="0" * 64)
    other_record = changed(record=mark["record"] | {"at": "2020-01-01T00:00:00.000Z"})
    other_key = changed(key="acme.more@1")
    no_proof = changed(inclusion=[])
    bad_point = changed(checkpoint=mark["checkpoint"] | {"root": "0" * 64})
    unproved = json.loads(json.dumps(claims)) | {"mark": None}
    for forged, words in (
        (early, "after the receipt"),
        (ground, "another key"),
        (other_record, "not proved"),
        (other_key, "another key"),
        (no_proof, "not proved"),
        (bad_point, "not proved"),
        (unproved, "does not say whose"),
        (claims | {"tenant": "other"}, "somebody else"),
        ({**claims, "version": 2}, "newer"),
        ({name: value for name, value in claims.items() if name != "alpha"}, "lacks"),
    ):
        with pytest.raises(ReceiptError, match=words):
            verify(*resigned(book, forged), text)
    # A key for checkpoints signs no receipts.
    with pytest.raises(ReceiptError, match="not signed by a key for receipts"):
        verify(*resigned(book, claims, kid="log-1"), text)


def test_old_receipts_verify_after_the_root_is_rotated(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        record = own.make("chat")
        found = own.detector.detect(TENANT, Query(tokens=own.write(record, 200, 1)))
        old = own.receipts.issue(TENANT, found, expert=True, actor="test")
        assert own.receipts.verify(old).id
        own.kms.rotate()
        new = own.receipts.issue(TENANT, found, expert=True, actor="test")
        kids = [json.loads(unpadded(one.split(".")[0]))["kid"] for one in (old, new)]
        assert kids == ["receipt-1", "receipt-2"]
        # Another process, which has just learned of the rotation.
        fresh = Receipts(Log(own.database, own.kms), own.kms)
        assert {fresh.verify(one).tenant for one in (old, new)} == {TENANT}
        assert own.receipts.verify(new).tenant == TENANT
        for one in (old, new):
            verify(one, own.receipts.jwks())


def test_issuing_is_logged_without_the_content(book: Book, finding: Finding, text: str) -> None:
    token = book.receipts.issue(TENANT, finding, expert=True, actor="judge")
    claims = json.loads(unpadded(token.split(".")[1]))
    record = book.log.records(TENANT)[-1]
    assert record.kind == "receipt.issue" and record.actor == "judge"
    assert record.facts["receipt"] == claims["jti"] and record.facts["verdict"] == "detected"
    # Whoever reads the log cannot try texts against it.
    assert finding.content_sha256 not in json.dumps(record.to_json())
    assert record.facts["content"] == book.receipts.content_name(TENANT, finding.content_sha256)
    assert record.facts["content"] != book.receipts.content_name("other", finding.content_sha256)


def test_no_receipts_while_the_clock_is_behind_the_log(book: Book, finding: Finding) -> None:
    behind = Receipts(book.log, book.kms, clock=lambda: book.clock.now - timedelta(days=1))
    with pytest.raises(StateError, match="clock"):
        behind.issue(TENANT, finding, expert=True, actor="test")


def test_a_receipt_of_another_tenant_dates_nothing(book: Book) -> None:
    (theirs,) = book.keybook.keys("other")
    ids = book.write(theirs.versions[0], 200, 3)
    found = book.detector.detect("other", Query(tokens=ids))
    token = book.receipts.issue("other", found, expert=True, actor="test")
    assert book.receipts.existed_at(token, "other", found.content_sha256)
    with pytest.raises(ReceiptError, match="another tenant"):
        book.receipts.existed_at(token, TENANT, found.content_sha256)


def test_showing_a_receipt_again_is_noticed() -> None:
    replay = Replay(most=2)
    assert [replay.seen(one) for one in "aab"] == [False, True, False]
    assert replay.seen("c") is False and replay.seen("a") is False  # forgotten, bounded


def test_a_receipt_shown_again_is_noted(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        record = own.make("chat")
        ids = own.write(record, 200, 1)
        found = own.detector.detect(TENANT, Query(tokens=ids))
        token = own.receipts.issue(TENANT, found, expert=True, actor="test")
        own.clock.pass_by(10)
        own.keybook.compromise(TENANT, "chat", 1, since=own.clock.now, actor="test")
        first = own.detector.detect(TENANT, Query(tokens=ids, receipt=token))
        again = own.detector.detect(TENANT, Query(tokens=ids, receipt=token))
        assert first.verdict == again.verdict == "detected"
        assert "receipt_shown_before" not in first.cautions
        assert "receipt_shown_before" in again.cautions


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, book: Book, token: str, text: str) -> Any:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "jwks.json").write_text(json.dumps(book.receipts.jwks()))
    (folder / "receipt.jws").write_text(token + "\n")
    (folder / "text.txt").write_text(text)
    (folder / "other.txt").write_text(text + "?")
    (folder / "ended.txt").write_text(text + "\n")
    app = typer.Typer()
    app.command()(cli.verify)

    def call(*words: str) -> Any:
        return CliRunner().invoke(
            app, [str(folder / word) if "." in word else word for word in words]
        )

    return call


def test_the_command_says_what_a_receipt_says(run: Any) -> None:
    done = run("receipt.jws", "--jwks", "jwks.json", "--text", "text.txt", "--json")
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert facts["verdict"] == "detected" and facts["key"] == "acme.chat@1"
    assert facts["content_checked"] is True
    assert run("receipt.jws", "--jwks", "jwks.json", "--text", "ended.txt").exit_code == 0
    assert facts["n_readable"] == 2
    dated = ("receipt.jws", "--jwks", "jwks.json", "--text-date")
    # The clock of these tests is at noon of 2027-01-04, when the key was made.
    assert run(*dated, "2027-01-05").exit_code == 0
    for early in ("2027-01-04", "2027-01-04T11:59:59", "2026-12-31"):
        refused = run(*dated, early)
        assert refused.exit_code and "does not count" in str(refused.exception)
    plain = run("receipt.jws", "--jwks", "jwks.json")
    assert "first seen after" in " ".join(plain.output.split())
    assert plain.exit_code == 0 and "genuine" in plain.output and "acme.chat@1" in plain.output


@pytest.mark.parametrize(
    "words",
    [
        ("receipt.jws", "--jwks", "jwks.json", "--text", "other.txt"),
        ("text.txt", "--jwks", "jwks.json"),
        ("receipt.jws", "--jwks", "text.txt"),
    ],
)
def test_the_command_refuses_what_is_not_genuine(run: Any, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert isinstance(done.exception, FiligraneError)
    assert "genuine" not in done.stdout


def test_the_independent_check_can_fail(book: Book, text: str, token: str) -> None:
    head, body, signature = token.split(".")
    with pytest.raises(InvalidSignature):
        independently(f"{head}.{body[:-8]}AAAAAAAA.{signature}", book.receipts.jwks(), text)
