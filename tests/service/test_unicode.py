"""Hostile and merely unusual characters: found, read without, paid for, and mapped back."""

import math
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bookkit import TENANT, Book, marked_letters, open_book
from hypothesis import given, settings
from hypothesis import strategies as st

from filigrane.errors import TokenError
from filigrane.keys import Key
from filigrane.service.contents import cleaned, content_hash
from filigrane.service.detecting import Query
from filigrane.service.tokenizing import BYTES_SHA256, Tokenizers

ZWSP, ZWNJ, ZWJ, BOM, SHY = "\u200b", "\u200c", "\u200d", "\ufeff", "\u00ad"


@pytest.mark.parametrize(
    ("text", "expected", "unusual"),
    [
        ("plain text\n", "plain text\n", ()),
        (f"in{ZWSP}vis{BOM}ible{SHY}", "invisible", ("invisible",)),
        ("tag\U000e0041\U000e007f", "tag", ("invisible",)),
        ("\u202eevil\u202c \u2066x\u2069", "evil x", ("bidi",)),
        ("nbsp\u00a0and\u2009thin\u2028line", "nbsp and thin\nline", ("spaces",)),
        ("bell\x07 nul\x00", "bell nul", ("controls",)),
        ("pаypаl with Latin words", "paypal with Latin words", ("homoglyphs",)),
        ("ｆｕｌｌ 𝐛𝐨𝐥𝐝 𝟙 ﬁne", "full bold 1 fine", ("presentation_forms",)),
        ("cafe\u0301 nai\u0308ve", "café naïve", ("non_nfc",)),
        # A whole word of look-alikes in a text of another script.
        ("the сосоа of words that are Latin", "the cocoa of words that are Latin", ("homoglyphs",)),
        ("это pусский текст", "это русский текст", ("homoglyphs",)),
    ],
)
def test_what_is_unusual_is_named_and_undone(
    text: str, expected: str, unusual: tuple[str, ...]
) -> None:
    found = cleaned(text)
    assert found.text == expected and found.unusual == unusual


@pytest.mark.parametrize(
    "text",
    [
        "Привет, мир. Hello, world.",
        "Ελληνικά και Latin ονόματα",
        f"می{ZWNJ}خواهم",
        f"क्{ZWJ}ष and हिन्दी",
        f"👨{ZWJ}👩{ZWJ}👧 ❤️ 1️⃣ 🇩🇪",
        "日本語のテキスト、ラーメン。",
        "naïve café Straße İstanbul ısı",
        "한국어 텍스트",
        "tiếng Việt",
        "עברית עם English",
    ],
)
def test_what_writing_needs_stays(text: str) -> None:
    found = cleaned(unicodedata.normalize("NFC", text))
    assert found.text == unicodedata.normalize("NFC", text) and found.unusual == ()


def test_joiners_between_latin_letters_go() -> None:
    assert cleaned(f"he{ZWJ}l{ZWNJ}lo\ufe0f").text == "hello"


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_cleaning_is_stable_and_maps_back(text: str) -> None:
    found = cleaned(text)
    assert unicodedata.is_normalized("NFC", found.text)
    assert found.origins.shape == (len(found.text) + 1,)
    assert np.all(np.diff(found.origins) >= 0) and found.origins[-1] == len(text)
    assert (found.text == text) or found.unusual
    if not found.unusual:
        assert found.text == text
    again = cleaned(found.text)
    assert again.text == found.text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_normal_forms_have_one_hash_and_nothing_else_has(text: str) -> None:
    forms = {content_hash(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")}
    assert forms == {content_hash(text)}
    assert content_hash(text + "x") not in forms
    assert content_hash(list(text.encode())) not in forms


def test_hashes_of_ids_are_of_ids() -> None:
    assert content_hash([1, 2]) == content_hash(np.array([1, 2], np.uint16))
    assert len({content_hash(one) for one in ([], [0], [1], [1, 2], [2, 1], [258])}) == 6
    with pytest.raises(TokenError):
        content_hash([0.5])


def test_lone_surrogates_are_no_text() -> None:
    for call in (content_hash, cleaned, lambda text: Tokenizers().encode(text, "bytes")):
        with pytest.raises(TokenError, match="no Unicode"):
            call("a\ud800b")  # type: ignore[operator]


def test_long_hostile_texts_take_linear_time() -> None:
    import time

    def took(n: int) -> float:
        text = ("a\u0301\u200bе" + "\u0301" * 5) * (n // 9)
        began = time.process_time()
        cleaned(text)
        return time.process_time() - began

    took(1000)
    small, large = min(took(20_000) for _ in range(3)), min(took(160_000) for _ in range(2))
    assert large < 8 * 4 * small


@pytest.mark.parametrize(
    "hostile",
    [
        "a" + "\u0301\u0323" * 100_000,
        # A vowel that is no mark itself and becomes two of them.
        "\u0f73" * 100_000,
        # What keeps the marks apart is taken out when the text is cleaned.
        "a" + ("\u0301" * 15 + "\u0323" * 15 + ZWSP) * 6_000,
    ],
)
def test_texts_that_freeze_normalisation_are_refused(hostile: str) -> None:
    import time

    began = time.process_time()
    with pytest.raises(TokenError, match="combining marks"):
        cleaned(hostile)
    assert time.process_time() - began < 5
    if ZWSP not in hostile:
        for call in (content_hash, lambda text: Tokenizers().encode(text, "bytes")):
            with pytest.raises(TokenError, match="combining marks"):
                call(hostile)  # type: ignore[operator]
    assert cleaned("a" + "\u0301" * 30).unusual == ("non_nfc",)


def test_offsets_of_the_byte_tokenizer_are_characters() -> None:
    text = "aé€😀x"
    encoded = Tokenizers().encode(text, "bytes")
    assert bytes(encoded.ids.astype(np.uint8)).decode() == text
    for (start, stop), byte in zip(encoded.offsets.tolist(), encoded.ids.tolist(), strict=True):
        assert stop == start + 1 and byte in text[start].encode()


# ------------------------------------------------------------------ what detection makes of it


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    with open_book(tmp_path_factory.mktemp("unicode")) as opened:
        opened.make("chat", tokenizer=BYTES_SHA256)
        opened.make("more", tokenizer=BYTES_SHA256)
        yield opened


@pytest.fixture(scope="module")
def text(book: Book) -> str:
    key = book.keybook.key_of(book.keybook.version(TENANT, "acme.chat@1"))
    assert isinstance(key, Key)
    return marked_letters(key, "gumbel", 400, 1)


LOOK_ALIKE = str.maketrans("aeopcxy", "аеорсху")


@pytest.mark.parametrize(
    "attack",
    [
        lambda text: ZWSP.join(text),
        lambda text: "".join(c + ZWJ * (i % 3 == 0) for i, c in enumerate(text)),
        lambda text: "".join(c.translate(LOOK_ALIKE) if i % 2 else c for i, c in enumerate(text)),
        lambda text: text.replace(" ", "\u00a0"),
        lambda text: "".join(chr(ord(c) + 0x1D41A - 97) if "a" <= c <= "z" else c for c in text),
        lambda text: "\u202d" + text.replace("e", "e\u2060"),
    ],
)
def test_marks_survive_hostile_characters(book: Book, text: str, attack: object) -> None:
    attacked = attack(text)  # type: ignore[operator]
    finding = book.detector.detect(TENANT, Query(text=attacked, evidence=True))
    assert finding.verdict == "detected" and finding.key_id == "acme.chat@1"
    assert finding.per_key[0].reading == "cleaned"
    assert {"cleaned_reading", "unusual_characters"} <= set(finding.cautions)
    assert finding.n_readings == 2 and "Bonferroni" in finding.method
    # What is shown is the text as it was sent.
    (span,) = finding.spans
    assert span.start_char is not None and span.stop_char is not None
    assert span.stop_char - span.start_char > 0.9 * len(attacked)
    assert finding.heat is not None and finding.heat.offsets is not None
    assert int(finding.heat.offsets.max()) <= len(attacked)


def test_a_second_reading_is_paid_for_and_a_first_one_stays_free(book: Book, text: str) -> None:
    plain = book.detector.detect(TENANT, Query(text=text))
    assert plain.n_readings == 1 and plain.n_tests == 8 and plain.unusual == ()
    ended = book.detector.detect(TENANT, Query(text=text + " \u00a0"))
    assert ended.n_readings == 2 and ended.n_tests == 16
    assert "cleaned_reading" not in ended.cautions or ended.per_key[0].reading == "cleaned"
    # Four tests, Bonferroni, instead of two keys, Sidak: a factor of two, and of nothing else.
    best = ended.per_key[0]
    assert ended.log_pvalue == pytest.approx(best.log_pvalue + math.log(4), rel=1e-9)


def test_unmarked_hostile_text_stays_inconclusive(book: Book, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    letters = "".join(chr(c) for c in rng.integers(97, 123, 400))
    finding = book.detector.detect(TENANT, Query(text=ZWSP.join(letters)))
    assert finding.verdict == "inconclusive" and "unusual_characters" in finding.cautions
    assert finding.unusual == ("invisible",)
