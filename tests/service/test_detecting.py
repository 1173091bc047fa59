"""One answer over all keys of a tenant: right, paid for, and never "no mark" for want of a key."""

import json
import math
import os
import threading
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bookkit import TENANT, Book, Clock, marked, marked_letters, open_book

from filigrane import stats
from filigrane.errors import (
    FiligraneError,
    KmsUnavailable,
    ModelError,
    NotFound,
    ReceiptError,
    StoreError,
    TokenError,
    VocabularyMismatch,
)
from filigrane.foreign import ForeignKey, KeyForm, write
from filigrane.foreign import from_tag as profile_from_tag
from filigrane.keys import Key
from filigrane.schemes import from_tag
from filigrane.service.detecting import CAUTIONS, Detector, Query, holm_sidak
from filigrane.service.public import PublicTier
from filigrane.service.tokenizing import BYTES_SHA256, NoTokenizer, Tokenizers
from filigrane.store.keys import KeyBook
from filigrane.store.records import VersionRecord
from filigrane.toy import ZipfModel
from servicekit import TENANT as SERVED
from servicekit import prepare, running

NULL_TEXTS = int(os.environ.get("FILIGRANE_NULL_TEXTS", "1500"))


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    """Keys of every kind, of two tenants; tests of this file do not change them."""
    with open_book(tmp_path_factory.mktemp("book"), TENANT, "other") as opened:
        for name, scheme in (
            ("gumbel", "gumbel"),
            ("green", "greenlist:gamma=0.25,delta=4"),
            ("tour", "tournament:depth=8"),
            ("delta", "delta"),
            ("gamma", "gamma"),
        ):
            opened.make(name, scheme, slots=3)
        opened.make("vllm", profile="vllm-gumbel")
        opened.make("strange", "gumbel", tenant="other", model="elsewhere")
        opened.detector._revalidate_s = 1e9
        yield opened


def unmarked(rng: np.random.Generator, n: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return rng.integers(0, 256, n)


def find(book: Book, name: str) -> VersionRecord:
    key = next(key for key in book.keybook.keys(TENANT) if key.spec.name == name)
    return key.versions[-1]


@pytest.mark.parametrize("name", ["gumbel", "green", "tour", "delta", "gamma"])
def test_every_scheme_is_found_under_its_key(book: Book, name: str) -> None:
    record = find(book, name)
    ids = book.write(record, 600, 5)
    finding = book.detector.detect(TENANT, Query(tokens=ids))
    assert finding.verdict == "detected" and finding.key_id == record.id
    assert finding.log_pvalue < math.log(1e-6)
    assert finding.n_keys == 6 and finding.n_tests == 5 * 3 + 1
    assert finding.per_key[0].key_id == record.id and finding.per_key[1].log_pvalue_holm > -7
    assert set(finding.cautions) <= set(CAUTIONS) and finding.said == "detected"
    assert finding.n_readable == 6 and finding.hints == ()
    assert "6 keys" in finding.method and "Holm-Sidak" in finding.method
    # The price of the other keys is Sidak's, exactly.
    expected = stats.sidak(finding.per_key[0].log_pvalue, 6)
    assert finding.log_pvalue == pytest.approx(expected, rel=1e-12)


def test_a_profile_of_another_tool_is_found(book: Book) -> None:
    record = find(book, "vllm")
    key = book.keybook.key_of(record)
    assert isinstance(key, ForeignKey)
    profile = profile_from_tag("vllm-gumbel")
    rng = np.random.default_rng(3)
    ids = write(ZipfModel(256, 1.0), [1], 200, key, profile, rng=rng)
    finding = book.detector.detect(TENANT, Query(tokens=ids, evidence=True))
    assert finding.verdict == "detected" and finding.key_id == record.id
    assert "foreign_profile" in finding.cautions
    assert finding.spans == () and finding.heat is None


def test_another_tenants_mark_is_not_found(book: Book) -> None:
    (theirs,) = book.keybook.keys("other")
    ids = book.write(theirs.versions[0], 300, 8)
    assert book.detector.detect("other", Query(tokens=ids)).verdict == "detected"
    finding = book.detector.detect(TENANT, Query(tokens=ids))
    assert finding.verdict == "inconclusive" and finding.key_id is None
    assert all(one.key_id.startswith(f"{TENANT}.") for one in finding.per_key)


def test_hints_leave_out_keys_and_their_price(book: Book) -> None:
    record = find(book, "gumbel")
    ids = book.write(record, 100, 6)
    one = book.detector.detect(TENANT, Query(tokens=ids, key="gumbel"))
    same = book.detector.detect(TENANT, Query(tokens=ids, key=record.id))
    assert one.n_keys == same.n_keys == 1 and one.log_pvalue == same.log_pvalue
    assert one.n_readable == 6 and one.hints == (("key", "gumbel"),)
    assert one.log_pvalue < book.detector.detect(TENANT, Query(tokens=ids)).log_pvalue
    for query in (Query(tokens=ids, key="nobody"), Query(tokens=ids, model="nothing")):
        with pytest.raises(NotFound, match="leave out the hints"):
            book.detector.detect(TENANT, query)
    with pytest.raises(NotFound):
        book.detector.detect(TENANT, Query(tokens=ids, key="acme.gumbel@2"))


def test_short_texts_and_bad_ones(book: Book) -> None:
    rng = np.random.default_rng(1)
    for n in (0, 3, 4, 8):
        finding = book.detector.detect(TENANT, Query(tokens=unmarked(rng, n)))
        assert finding.verdict == "too_short", n
    assert book.detector.detect(TENANT, Query(tokens=unmarked(rng, 200))).verdict == "inconclusive"
    with pytest.raises(TokenError):
        book.detector.detect(TENANT, Query(tokens=[1, 2**40]))
    with pytest.raises(TokenError):
        Query(text="a", tokens=[1])
    with pytest.raises(TokenError):
        Query()
    for alpha in (0.0, 1.0, 0.2, math.nan):
        with pytest.raises(FiligraneError, match="alpha"):
            Query(text="a", alpha=alpha)
    assert "secret words" not in repr(Query(text="secret words"))


def test_null_texts_give_uniform_p_values(book: Book) -> None:
    """Derived keys with continuous laws: Sidak over slots and versions is exact."""
    rng = np.random.default_rng(20)
    detector = Detector(_Some(book.keybook, {"gumbel", "delta"}), Tokenizers(), revalidate_s=1e9)
    found = []
    for _ in range(NULL_TEXTS):
        finding = detector.detect(TENANT, Query(tokens=unmarked(rng, 60)))
        assert finding.n_tests == 6 and "Holm-Sidak" in finding.method
        found.append(math.exp(finding.log_pvalue))
    assert stats.log_uniformity(found) > math.log(1e-6)


def test_null_texts_of_all_keys_are_conservative(book: Book, tmp_path: Path) -> None:
    """Discrete laws, slots, a foreign profile and an imported number among them."""
    rng = np.random.default_rng(21)
    with open_book(tmp_path) as own:
        for name, scheme in (("a", "gumbel"), ("b", "greenlist"), ("c", "gamma")):
            own.make(name, scheme, slots=2)
        own.make("d", profile="vllm-gumbel")
        number = ForeignKey.from_text("42", KeyForm.UINT64, "x")
        # The same number twice: p-values that depend on each other as much as can be.
        own.take("e", "vllm-gumbel", number)
        own.take("f", "vllm-gumbel", number)
        own.detector._revalidate_s = 1e9
        n = NULL_TEXTS // 2
        found = np.empty(n)
        for i in range(n):
            finding = own.detector.detect(TENANT, Query(tokens=unmarked(rng, 50)))
            assert finding.n_keys == 6 and "Bonferroni" in finding.method
            found[i] = finding.log_pvalue
    for level in (0.5, 0.2, 0.05, 0.01):
        count = int((found <= math.log(level)).sum())
        # At most the level, but for chance: log P(count or more) under it.
        assert stats.log_sf_binomial(count, n, level) > math.log(1e-7), (level, count)


def test_null_texts_with_two_readings_are_conservative(book: Book) -> None:
    rng = np.random.default_rng(22)
    n = NULL_TEXTS // 3
    found = np.empty(n)
    for i in range(n):
        letters = "".join(chr(c) for c in rng.integers(97, 123, 60))
        text = letters[:30] + "\u200b" + letters[30:]
        finding = book.detector.detect(
            TENANT, Query(text=text, tokenizer="bytes", key="gumbel", alpha=0.01)
        )
        assert finding.n_readings == 2 and finding.n_tests == 6
        found[i] = finding.log_pvalue
    for level in (0.5, 0.2, 0.05, 0.01):
        count = int((found <= math.log(level)).sum())
        assert stats.log_sf_binomial(count, n, level) > math.log(1e-7), (level, count)
    # Not absurdly so: readings that share nearly everything cost a factor of two at most.
    count = int((found <= math.log(0.2)).sum())
    assert count > n * 0.2 * 0.4


def test_holm_sidak_agrees_with_its_definition() -> None:
    ps = [0.3, 0.001, 0.02, 0.02, 1.0]
    expected, floor = [0.0] * 5, 0.0
    for rank, i in enumerate(sorted(range(5), key=lambda i: ps[i])):
        floor = max(floor, 1 - (1 - ps[i]) ** (5 - rank))
        expected[i] = floor
    found = [math.exp(value) for value in holm_sidak([math.log(p) for p in ps])]
    assert found == pytest.approx(expected, rel=1e-12)


def test_mixtures_are_said_to_be(book: Book) -> None:
    one, two = find(book, "gumbel"), find(book, "delta")
    ids = np.concatenate([book.write(one, 200, 1), book.write(two, 400, 2)])
    finding = book.detector.detect(TENANT, Query(tokens=ids))
    assert finding.verdict == "detected" and "several_keys" in finding.cautions
    key = book.keybook.key_of(one)
    assert isinstance(key, Key)
    # Seeds choose slots: eight texts of three slots have at least two of them.
    ids = np.concatenate([marked(key, "gumbel", 120, seed) for seed in range(8)])
    finding = book.detector.detect(TENANT, Query(tokens=ids, key="gumbel"))
    assert "several_slots" in finding.cautions
    honest = book.detector.detect(TENANT, Query(tokens=book.write(one, 200, 1), key="gumbel"))
    assert "several_slots" not in honest.cautions and "several_keys" not in honest.cautions


def test_spans_and_offsets_show_where(book: Book) -> None:
    record = find(book, "gumbel")
    key = book.keybook.key_of(record)
    assert isinstance(key, Key)
    rng = np.random.default_rng(4)
    noise = ["".join(chr(c) for c in rng.integers(97, 123, 300)) for _ in range(2)]
    # Two bytes a letter before it: characters and tokens count differently.
    text = "é" * 50 + noise[0] + marked_letters(key, "gumbel", 300, 9) + noise[1]
    finding = book.detector.detect(
        TENANT, Query(text=text, tokenizer="bytes", key="gumbel", evidence=True)
    )
    assert finding.verdict == "detected"
    (span,) = finding.spans
    assert span.start_char is not None and span.stop_char is not None
    assert abs(span.start_char - 350) <= 20 and abs(span.stop_char - 650) <= 20
    assert span.start - span.start_char == 50
    heat = finding.heat
    assert heat is not None and heat.offsets is not None and heat.reading == "given"
    assert heat.evidence.shape == (finding.n_tokens,) and heat.offsets.shape == (len(text) + 50, 2)
    inside = np.nanmean(heat.evidence[410:690])
    assert inside > 1.5 * np.nanmean(heat.evidence[110:390])


def test_tokenizers_of_texts(book: Book, tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        record = own.make("bytes", tokenizer=BYTES_SHA256)
        own.make("ids")
        own.make("far", tokenizer="0" * 64)
        key = own.keybook.key_of(record)
        assert isinstance(key, Key)
        text = marked_letters(key, "gumbel", 300, 2)
        # Without a hint only the key that names a tokenizer which is here can be tested.
        finding = own.detector.detect(TENANT, Query(text=text))
        assert finding.verdict == "detected" and finding.n_keys == 1
        assert "tokenizer_missing" in finding.cautions
        named = own.detector.detect(TENANT, Query(text=text, tokenizer=BYTES_SHA256))
        assert named.n_keys == 2 and "tokenizer_missing" not in named.cautions
        with pytest.raises(ModelError, match=r"it has bytes\. Have it added"):
            own.detector.detect(TENANT, Query(text=text, tokenizer="nobodys"))
        for name, says in (
            ("far", "acme.far@1 names one that cannot be read here: set"),
            ("ids", "acme.ids@1 does not say its tokenizer: set .* or send token ids"),
        ):
            with pytest.raises(NoTokenizer, match=says):
                own.detector.detect(TENANT, Query(text=text, key=name))
        ids = np.frombuffer(text.encode(), np.uint8)
        assert own.detector.detect(TENANT, Query(tokens=ids)).n_keys == 3


def test_the_only_tokenizer_reads_keys_that_name_none(tmp_path: Path) -> None:
    letter_tokenizer(tmp_path / "letters")
    sources = {"letters": str(tmp_path / "letters")}
    with open_book(tmp_path) as own:
        record = own.make("ids")
        key = own.keybook.key_of(record)
        assert isinstance(key, Key)
        # Ids of ASCII letters are their bytes, turned by one.
        ids = np.frombuffer(marked_letters(key, "gumbel", 300, 2).encode(), np.uint8)
        text = "".join(chr(number + 1) for number in ids.tolist())
        detector = Detector(own.keybook, Tokenizers(sources), revalidate_s=0.0)
        finding = detector.detect(TENANT, Query(text=text))
        assert finding.verdict == "detected" and finding.cautions == () and finding.hints == ()
        told = PublicTier(detector).answer(TENANT, text, identity=None, address=None)
        assert told.verdict == "detected"
        # What a key or a request names goes before it.
        hinted = detector.detect(TENANT, Query(text=text, tokenizer="bytes"))
        assert hinted.verdict == "inconclusive"
        with pytest.raises(NoTokenizer, match=r"acme.ids@1 does not .*\(bytes, letters, more\)"):
            Detector(own.keybook, Tokenizers(sources | {"more": "smollm2"})).detect(
                TENANT, Query(text=text)
            )
        other = own.make("bytes", tokenizer=BYTES_SHA256)
        their = own.keybook.key_of(other)
        assert isinstance(their, Key)
        theirs = marked_letters(their, "gumbel", 300, 2)
        assert detector.detect(TENANT, Query(text=theirs)).key_id == other.id


def letter_tokenizer(folder: Path) -> None:
    """A tokenizer of characters below 128, whose ids are one less than their codes."""
    folder.mkdir()
    vocabulary = {chr(code + 1): code for code in range(127)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    written = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def test_over_http_a_key_says_its_tokenizer(tmp_path: Path) -> None:
    made = prepare(tmp_path, sections="[detector]\nrevalidate_s = 0\n")
    spec = {"model": "m", "scheme": "gumbel", "slots": 1}
    text = "some words of a text " * 40
    with (
        running(made) as service,
        service.client("key-admin") as admin,
        service.client("detector-expert") as expert,
    ):
        for body in (
            {"tokenizer": "bytes", "tokenizer_sha256": BYTES_SHA256},
            {"tokenizer": "canary"},
        ):
            answer = admin.post("/v1/keys", json=spec | {"name": "no"} | body)
            assert (answer.status_code, answer.json()["code"]) == (422, "tokenizer")
            assert "canary" not in answer.text
        assert admin.post("/v1/keys", json=spec | {"name": "none"}).status_code == 201
        answer = expert.post("/v1/detect", json={"text": text})
        assert answer.status_code == 422
        assert f"{SERVED}.none@1 does not say its tokenizer: set" in answer.json()["detail"]
        said = spec | {"name": "chat", "tokenizer": "bytes"}
        assert admin.post("/v1/keys", json=said).status_code == 201
        assert admin.get("/v1/keys/chat").json()["tokenizer_sha256"] == BYTES_SHA256
        assert expert.post("/v1/detect", json={"text": text}).json()["n_keys"] == 1
        answer = expert.post("/v1/detect", json={"text": "a" + "\u0301" * 31})
        assert answer.status_code == 422 and "30 combining marks" in answer.json()["detail"]


def test_ids_outside_a_vocabulary(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        own.make("kgw", profile="hf-kgw-lefthash:vocab_size=256")
        rng = np.random.default_rng(1)
        with pytest.raises(VocabularyMismatch):
            own.detector.detect(TENANT, Query(tokens=[5, 300, 1] * 50))
        own.make("gumbel")
        finding = own.detector.detect(TENANT, Query(tokens=unmarked(rng, 200) + 200))
        assert finding.n_keys == 1 and "vocabulary_mismatch" in finding.cautions


# ------------------------------------------------------------------ keys that change


def test_a_destroyed_or_new_version_is_noticed(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        with pytest.raises(NotFound, match="make a key"):
            own.detector.detect(TENANT, Query(tokens=[1] * 50))
        first = own.make("chat")
        assert own.detector.detect(TENANT, Query(tokens=[1] * 50)).n_keys == 1
        own.keybook.rotate(TENANT, "chat", actor="test")
        finding = own.detector.detect(TENANT, Query(tokens=own.write(first, 200, 1)))
        assert finding.n_keys == 2 and finding.key_id == first.id
        own.keybook.retire(TENANT, "chat", 1, actor="test")
        retired = own.detector.detect(TENANT, Query(tokens=own.write(first, 200, 1)))
        assert retired.verdict == "detected" and retired.per_key[0].state == "retired"


def test_what_a_compromised_key_finds_counts_only_with_a_receipt_from_before(
    tmp_path: Path,
) -> None:
    with open_book(tmp_path) as own:
        record = own.make("chat")
        old, new = own.write(record, 200, 1), own.write(record, 200, 2)
        before = own.detector.detect(TENANT, Query(tokens=old))
        receipt = own.receipts.issue(TENANT, before, expert=True, actor="test")
        own.clock.pass_by(3600)
        since = own.clock.now
        own.clock.pass_by(60)
        late = own.receipts.issue(
            TENANT, own.detector.detect(TENANT, Query(tokens=new)), expert=True, actor="test"
        )
        own.keybook.compromise(TENANT, "chat", 1, since=since, actor="test")
        own.make("other")

        forged = own.detector.detect(TENANT, Query(tokens=new))
        assert forged.verdict == "inconclusive" and forged.key_id is None
        assert "compromised_key" in forged.cautions and forged.log_pvalue > math.log(1e-6)
        assert forged.said == "uncounted"
        shown = own.detector.detect(TENANT, Query(tokens=new, evidence=True))
        assert shown.spans == () and (shown.heat is None or shown.heat.key_id == "acme.other@1")
        assert forged.per_key[0].log_pvalue_holm < -100 and not forged.per_key[0].counts

        assert own.detector.detect(TENANT, Query(tokens=old)).verdict == "inconclusive"
        proved = own.detector.detect(TENANT, Query(tokens=old, receipt=receipt))
        assert proved.verdict == "detected" and "compromised_key" not in proved.cautions
        # A receipt from after the leak, for another text, or of nobody proves nothing.
        dated = own.detector.detect(TENANT, Query(tokens=new, receipt=late))
        assert dated.verdict == "inconclusive"
        with pytest.raises(ReceiptError, match="another content"):
            own.detector.detect(TENANT, Query(tokens=new, receipt=receipt))
        with pytest.raises(ReceiptError):
            own.detector.detect(TENANT, Query(tokens=old, receipt=receipt[:-4] + "AAAA"))
        # A mark of a key that is not compromised counts as ever, beside it.
        other = own.write(find(own, "other"), 200, 3)
        both = own.detector.detect(TENANT, Query(tokens=np.concatenate([new, other])))
        assert both.verdict == "detected" and both.key_id == "acme.other@1"
        assert {"compromised_key", "several_keys"} <= set(both.cautions)


def test_canonically_equal_texts_get_one_answer(tmp_path: Path) -> None:
    """They have one hash: or a receipt of one of 2**n forms would be valid for all the others."""
    with open_book(tmp_path) as own:
        record = own.make("chat", tokenizer=BYTES_SHA256)
        key = own.keybook.key_of(record)
        assert isinstance(key, Key)
        text = marked_letters(key, "gumbel", 300, 7) + " élève, naïve, 한국어 ￦ \u212b" * 10
        rng = np.random.default_rng(1)
        forms = [text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))]
        for _ in range(5):
            pieces = [unicodedata.normalize("NFD", c) if rng.random() < 0.5 else c for c in text]
            forms.append("".join(pieces))
        assert len(set(forms)) == 8
        findings = [own.detector.detect(TENANT, Query(text=form, evidence=True)) for form in forms]
        assert len({(f.content_sha256, f.log_pvalue, f.n_tests, f.verdict) for f in findings}) == 1
        assert findings[0].verdict == "detected"
        # Places are those of the text as it was sent.
        for form, finding in zip(forms, findings, strict=True):
            assert finding.heat is not None and finding.heat.offsets is not None
            assert int(finding.heat.offsets.max()) == len(form)
        receipt = own.receipts.issue(TENANT, findings[0], expert=False, actor="test")
        own.clock.pass_by(10)
        own.keybook.compromise(TENANT, "chat", 1, since=own.clock.now, actor="test")
        for form in forms:
            found = own.detector.detect(TENANT, Query(text=form, receipt=receipt))
            assert found.verdict == "detected"


def test_what_a_key_finds_that_never_came_into_use_does_not_count(tmp_path: Path) -> None:
    """Keys can be made until one fits a text; what is promoted is in the log once a version."""
    with open_book(tmp_path) as own:
        record = own.make("chat", promote=False)
        ids = own.write(record, 200, 1)
        waiting = own.detector.detect(TENANT, Query(tokens=ids, evidence=True))
        assert waiting.verdict == "inconclusive" and waiting.cautions == ("pre_active_key",)
        assert waiting.said == "uncounted" and not waiting.per_key[0].counts
        assert waiting.spans == () and waiting.heat is None
        own.keybook.promote(TENANT, "chat", 1, actor="test")
        assert own.detector.detect(TENANT, Query(tokens=ids)).said == "detected"


def test_spans_are_paid_for_keys_and_readings(book: Book) -> None:
    from filigrane.localisation import localise

    record = find(book, "gumbel")
    key = book.keybook.key_of(record)
    assert isinstance(key, Key)
    ids = book.write(record, 300, 5)
    (span,) = book.detector.detect(TENANT, Query(tokens=ids, evidence=True)).spans
    (alone,) = localise(ids, key, from_tag("gumbel"), alpha=1e-6 / 6).spans
    assert span.log_pvalue == pytest.approx(alone.log_pvalue + math.log(6), abs=1e-9)


# ------------------------------------------------------------------ outages and threads


class _Some:
    """A key book of which only some keys are seen; the database of which can be out."""

    def __init__(self, keybook: KeyBook, names: set[str] | None = None) -> None:
        self._keybook = keybook
        self._names = names
        self.out = False

    def revision(self, tenant: str) -> int:
        if self.out:
            raise StoreError("the database does not answer")
        return self._keybook.revision(tenant)

    def keys(self, tenant: str) -> list[object]:
        found = self._keybook.keys(tenant)
        return [key for key in found if self._names is None or key.spec.name in self._names]

    def key_of(self, record: VersionRecord) -> Key | ForeignKey:
        return self._keybook.key_of(record)


def test_an_outage_of_the_database_is_survived_for_a_while(book: Book) -> None:
    clock, keybook = Clock(), _Some(book.keybook)
    detector = Detector(
        keybook,  # type: ignore[arg-type]
        Tokenizers(),
        clock=clock.monotonic,
        revalidate_s=1.0,
        outage_s=100.0,
        lifetime_s=500.0,
    )
    ids = book.write(find(book, "gumbel"), 200, 1)
    assert detector.detect(TENANT, Query(tokens=ids)).verdict == "detected"
    keybook.out = True
    clock.pass_by(50)
    finding = detector.detect(TENANT, Query(tokens=ids))
    assert finding.verdict == "detected" and "stale_keys" in finding.cautions
    clock.pass_by(51)
    with pytest.raises(StoreError):
        detector.detect(TENANT, Query(tokens=ids))
    keybook.out = False
    assert "stale_keys" not in detector.detect(TENANT, Query(tokens=ids)).cautions


def test_without_the_root_nothing_is_called_unmarked(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        ids = own.write(own.make("chat"), 200, 1)
        assert own.detector.detect(TENANT, Query(tokens=ids)).verdict == "detected"
        (tmp_path / "root.key").unlink()
        # Keys in memory serve on; who has none can say nothing.
        assert own.detector.detect(TENANT, Query(tokens=ids)).verdict == "detected"
        fresh = Detector(KeyBook(own.database, own.kms), Tokenizers())
        with pytest.raises(KmsUnavailable):
            fresh.detect(TENANT, Query(tokens=ids))
        own.detector._keybook = KeyBook(own.database, own.kms)
        own.clock.pass_by(601)
        with pytest.raises(KmsUnavailable):
            own.detector.detect(TENANT, Query(tokens=ids))


def test_threads_get_the_same_answers_while_keys_change(tmp_path: Path) -> None:
    with open_book(tmp_path) as own:
        ids = own.write(own.make("chat"), 200, 1)
        stop = threading.Event()
        verdicts = set()

        def ask() -> int:
            count = 0
            while not stop.is_set():
                finding = own.detector.detect(TENANT, Query(tokens=ids))
                verdicts.add((finding.verdict, finding.key_id))
                count += 1
            return count

        with ThreadPoolExecutor(3) as pool:
            work = [pool.submit(ask) for _ in range(3)]
            for _ in range(5):
                own.keybook.rotate(TENANT, "chat", actor="test")
            stop.set()
            assert all(future.result() > 0 for future in work)
        assert verdicts == {("detected", "acme.chat@1")}
        assert own.detector.detect(TENANT, Query(tokens=ids)).n_keys == 6
