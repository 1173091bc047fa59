"""What a text is called, and what is unusual about its characters. Knows no keys and no tokenizer.

    content hash    SHA-256 of the UTF-8 of the NFC text, or, for ids, of
                    "filigrane/v1/ids" || u64le(n) || ids as little-endian int64

Invisible characters, look-alikes and the like break up tokens and with them marks; editors insert
some, attackers others. `cleaned` is what the text would be without them: a second reading of the
same text, to be tried beside the first and to be paid for.

What is tested is what is hashed: every reading starts from the NFC form, so that canonically equal
texts have one hash and one answer. Normalising takes quadratic time in runs of combining marks;
texts with more of them in a row than any writing has (UAX #15, section 13) are refused before.
"""

import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from filigrane.contexts import TokenIds, as_token_ids
from filigrane.errors import TokenError

__all__ = ["Canonical", "Cleaned", "canonical", "cleaned", "content_hash", "ids_hash"]

MAX_MARKS: Final = 30
"""Combining marks in a row, of the stream-safe format of UAX #15."""

_INVISIBLE: Final = frozenset(
    [
        *(0x00AD, 0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180E, 0x180F),
        *(0x200B, 0x2060, 0x2061, 0x2062, 0x2063, 0x2064, 0x206A, 0x206B, 0x206C, 0x206D, 0x206E),
        *(0x206F, 0x3164, 0xFEFF, 0xFFA0, 0xFFF9, 0xFFFA, 0xFFFB),
        *range(0xE0000, 0xE0080),
        *range(0xE0100, 0xE01F0),
    ]
)
_SELECTORS: Final = frozenset(range(0xFE00, 0xFE10))
_JOINERS: Final = frozenset([0x200C, 0x200D])
_BIDI: Final = frozenset(
    [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
)
_SPACES: Final = frozenset(
    [0x00A0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000, 0x2028, 0x2029, 0x0085]
)
_CONTROLS: Final = frozenset(set(range(0x20)) - {0x09, 0x0A, 0x0D} | {0x7F, *range(0x80, 0xA0)}) - {
    0x85
}
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_WORD: Final = re.compile(r"[^\W\d_]+")
# Letters that look the same; a short list of what attacks on detectors use, not all of UTS 39.
_TO_LATIN: Final = dict(
    zip(
        "аеорсухіјѕһԁԛԝӏАВЕКМНОРСТУХІЈЅԚԜ"  # Cyrillic
        "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧον"  # Greek
        "օսոցհ",  # Armenian
        "aeopcyxijshdqwlABEKMHOPCTYXIJSQW" + "ABEZHIKMNOPTYXov" + "ounqh",
        strict=True,
    )
)
_TO_CYRILLIC: Final = dict(zip("aeopcyxijsABEKMHOPCTYX", "аеорсухіјѕАВЕКМНОРСТУХ", strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Canonical:
    """A text in NFC. origins: (len(text) + 1,) int64, for each character of `text`, and for its
    end, where it starts in the given text.
    """

    text: str
    origins: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """A text without what is unusual in it.

    given: the text in NFC with nothing taken out; text: NFC; unusual: what was found, as sorted
    codes: "bidi", "controls", "homoglyphs", "invisible", "non_nfc", "presentation_forms", "spaces";
    origins: as those of Canonical. All but unusual is the same for all canonically equal texts.
    """

    given: Canonical
    text: str
    unusual: tuple[str, ...]
    origins: npt.NDArray[np.int64]


def content_hash(content: str | npt.ArrayLike) -> str:
    """The content hash, 64 hex digits, of a text or of token ids (n,).

    Texts that differ in Unicode's normalisation alone have one hash. Raises TokenError for ids that
    are none, for a text with lone surrogates, which is no Unicode, and for one with more than
    MAX_MARKS combining marks in a row.
    """
    if isinstance(content, str):
        return hashlib.sha256(_nfc(content).encode("utf-8")).hexdigest()
    return ids_hash(as_token_ids(content))


def ids_hash(ids: TokenIds) -> str:
    """`content_hash` of ids that were checked, (n,) int64."""
    head = b"filigrane/v1/ids" + ids.shape[0].to_bytes(8, "little")
    return hashlib.sha256(head + ids.astype("<i8").tobytes()).hexdigest()


def canonical(text: str) -> Canonical:
    """The NFC form of a text, for which its content hash stands. Raises as `content_hash` does."""
    whole = _nfc(text)
    if whole == text:
        return Canonical(text=text, origins=np.arange(len(text) + 1, dtype=np.int64))
    where = _places(text, range(len(text)), whole)
    return Canonical(text=whole, origins=np.asarray([*where, len(text)], dtype=np.int64))


def cleaned(text: str) -> Cleaned:
    """The text without invisible characters, bidi controls, look-alikes and odd spaces, in NFC.

    Joiners stay where scripts and emoji need them, letters of a text's own script stay, and so does
    all of a text in which nothing is unusual. Raises TokenError as `content_hash` does.
    """
    given = canonical(text)
    found: set[str] = set() if given.text == text else {"non_nfc"}
    if text.isascii() and not _has_controls(text):
        return Cleaned(given=given, text=text, unusual=(), origins=given.origins)
    characters, origins = _without_marks(given.text, found)
    _letters(characters, found)
    bare = "".join(characters)
    whole = _nfc(bare)
    if whole != bare:
        # Marks that something invisible kept apart.
        found.add("non_nfc")
        origins = _places(bare, origins, whole)
    return Cleaned(
        given=given,
        text=whole,
        unusual=tuple(sorted(found)),
        origins=given.origins[np.asarray([*origins, len(given.text)], dtype=np.int64)],
    )


def _nfc(text: str) -> str:
    """The NFC form, in linear time."""
    if text.isascii():
        return text
    if _SURROGATE.search(text):
        raise TokenError("this text holds lone surrogates and is no Unicode; send valid UTF-8.")
    if _too_many_marks().search(text):
        raise TokenError(
            f"this text has more than {MAX_MARKS} combining marks in a row, as no writing has; "
            "take them out."
        )
    return unicodedata.normalize("NFC", text)


@functools.cache
def _too_many_marks() -> re.Pattern[str]:
    """What begins with a mark when decomposed: a few Tibetan vowels are none themselves."""
    marks = [
        chr(code)
        for code in range(0x300, 0x20000)
        if unicodedata.combining(chr(code))
        or (
            unicodedata.decomposition(chr(code))
            and unicodedata.combining(unicodedata.normalize("NFD", chr(code))[0])
        )
    ]
    return re.compile(f"[{''.join(map(re.escape, marks))}]{{{MAX_MARKS + 1}}}")


def _has_controls(text: str) -> bool:
    return any(ord(character) in _CONTROLS for character in set(text))


def _without_marks(text: str, found: set[str]) -> tuple[list[str], list[int]]:
    """Characters without what cannot be seen, and where each of them was."""
    kept: list[str] = []
    origins: list[int] = []
    for place, character in enumerate(text):
        code = ord(character)
        if (code < 0x7F and code >= 0x20) or code in (0x09, 0x0A, 0x0D):
            pass
        elif code in _INVISIBLE:
            found.add("invisible")
            continue
        elif code in _BIDI:
            found.add("bidi")
            continue
        elif code in _CONTROLS:
            found.add("controls")
            continue
        elif code in _JOINERS | _SELECTORS and not _joins(text, place):
            found.add("invisible")
            continue
        elif code in _SPACES:
            found.add("spaces")
            character = "\n" if code in (0x85, 0x2028, 0x2029) else " "
        elif _is_presentation(code):
            folded = unicodedata.normalize("NFKC", character)
            if folded.isalnum() or folded.isascii():
                found.add("presentation_forms")
                for one in folded:
                    kept.append(one)
                    origins.append(place)
                continue
        kept.append(character)
        origins.append(place)
    return kept, origins


def _joins(text: str, place: int) -> bool:
    """Whether a joiner or selector does something here: after emoji and symbols, in scripts."""
    if place == 0:
        return False
    before = text[place - 1]
    if ord(text[place]) in _SELECTORS:
        # After a base that has variants: symbols, digits of keycaps, ideographs; never letters.
        return (
            unicodedata.category(before)[0] == "S"
            or before in "0123456789#*"
            or (_script(before) in ("CJK", "MYANMAR", "MONGOLIAN", "PHAGS-PA", "MANICHAEAN"))
        )
    if _script(before) in ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "DIGIT"):
        return False
    return unicodedata.category(before)[0] in "LMS" or ord(before) in _SELECTORS


def _is_presentation(code: int) -> bool:
    """Full-width and mathematical forms of letters and digits, ligatures of Latin."""
    return (
        0xFF01 <= code <= 0xFF5E
        or 0x1D400 <= code <= 0x1D7FF
        or 0xFB00 <= code <= 0xFB06
        or 0x24B6 <= code <= 0x24E9
    )


def _script(character: str) -> str:
    if character.isascii():
        return "LATIN" if character.isalpha() else "DIGIT" if character.isdigit() else "COMMON"
    return unicodedata.name(character, "COMMON").partition(" ")[0]


def _letters(characters: list[str], found: set[str]) -> None:
    """Put back, in place, letters of the text's script where others only look like them."""
    text = "".join(characters)
    words = [match.span() for match in _WORD.finditer(text)]
    counts = Counter(
        {character: n for character, n in Counter(text).items() if character.isalpha()}
    )
    scripts: Counter[str] = Counter()
    for character, n in counts.items():
        scripts[_script(character)] += n
    if not scripts:
        return
    main = scripts.most_common(1)[0][0]
    table = {"LATIN": _TO_LATIN, "CYRILLIC": _TO_CYRILLIC}.get(main)
    if table is None or not any(character in table for character in counts):
        return
    for start, stop in words:
        word = text[start:stop]
        if not any(character in table for character in word):
            continue
        others = [character for character in word if _script(character) != main]
        # A word of another script is left alone, unless every letter of it is a look-alike.
        if len(others) < len(word) or all(character in table for character in word):
            for place in range(start, stop):
                if _script(text[place]) != main:
                    new = table.get(text[place])
                    if new is not None:
                        characters[place] = new
                        found.add("homoglyphs")


def _places(text: str, origins: Sequence[int], whole: str) -> list[int]:
    """Where each character of `whole`, the NFC form of `text`, was: origins are of `text`."""
    where: list[int] = []
    pieces: list[str] = []
    start = 0
    for stop in range(1, len(text) + 1):
        if stop < len(text) and _continues(text[stop]):
            continue
        piece = unicodedata.normalize("NFC", text[start:stop])
        pieces.append(piece)
        where += [origins[start]] * len(piece)
        start = stop
    if "".join(pieces) != whole:  # pragma: no cover - a rule of composition unknown here
        last = origins[-1] if origins else 0
        return (where + [last] * len(whole))[: len(whole)]
    return where


def _continues(character: str) -> bool:
    """Whether a character may compose with what precedes it."""
    code = ord(character)
    if code < 0x300:
        return False
    jamo = 0x1161 <= code <= 0x1175 or 0x11A8 <= code <= 0x11C2
    return jamo or unicodedata.category(character)[0] == "M"
