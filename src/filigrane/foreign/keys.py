"""Keys of other tools: plain numbers, in the form that each tool writes them.

They are short (64 bits at best), their owners keep them in configuration files, and some are public
defaults; here they are secrets all the same. Two ways lead to one: the tool's own number, read from
a file, or numbers derived from a filigrane key, so that one root key can drive another engine:

    root key    number i = Expand(secret, "filigrane/v1/foreign" || lp(profile name) || u8(i), 32)
    parents     parent i = Expand(secret, "filigrane/v1/foreign-users" || lp(profile) || u8(i), 32)
    user key    number i = Expand(parent i, "filigrane/v1/user" || u64be(index), 32)

each cut to its first bits, read big endian. Whoever learns such a number can forge that profile's
mark, and learns nothing about the root key, other profiles or other users.
"""

import enum
import hmac
import os
import re
from typing import TYPE_CHECKING, Final, Self, final

from filigrane.errors import KeyFormatError
from filigrane.keys import (
    Key,
    MarkingKey,
    UserKey,
    _expand,
    _read_file,
    _Sealed,
    _Secret,
)

if TYPE_CHECKING:
    from filigrane.foreign.base import Profile

__all__ = ["ForeignKey", "KeyForm"]

MAX_NUMBERS: Final = 128
_PARENTS: Final = {
    "root": b"filigrane/v1/foreign",
    "users": b"filigrane/v1/foreign-users",
}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/-]{0,127}")
_DECIMAL: Final = re.compile(r"-?[0-9]{1,20}")
_PREFIXED: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}")
_HEX: Final = re.compile(r"(0[xX])?[0-9a-fA-F]{1,16}")


class KeyForm(enum.Enum):
    """How a tool writes its keys."""

    UINT64 = "uint64"
    """One integer from 0 to 2**64 - 1, decimal or with 0x (vLLM)."""
    HEX = "hex"
    """1 to 16 hex digits, with or without 0x (SGLang)."""
    HEX_PAIR = "hex-pair"
    """Two of these, `key` and `key_b`, in this order (SGLang with two keys)."""
    INTEGER = "integer"
    """One integer from -2**63 to 2**64 - 1, decimal (green lists, TextSeal, three_bricks)."""
    INTEGERS = "integers"
    """One to 128 integers of 64 bits with a sign, decimal (SynthID's layers)."""


_FORMS: Final = {
    KeyForm.UINT64: (1, 1, 0, 2**64 - 1, "one integer from 0 to 2**64 - 1, such as 12345"),
    KeyForm.HEX: (1, 1, 0, 2**64 - 1, "1 to 16 hex digits, such as 0123456789abcdef"),
    KeyForm.HEX_PAIR: (2, 2, 0, 2**64 - 1, "two keys of 1 to 16 hex digits, key and key_b"),
    KeyForm.INTEGER: (1, 1, -(2**63), 2**64 - 1, "one integer of 64 bits, such as 12345"),
    KeyForm.INTEGERS: (1, MAX_NUMBERS, -(2**63), 2**63 - 1, "integers of 64 bits, such as 5, 7, 9"),
}
"""Of each form: how many numbers, their range, and what to write."""


@final
class ForeignKey(_Sealed):
    """The numbers of another tool's key, with a public name; shown as name and form only.

    Made by ForeignKey.from_text, .load or .derive. Immutable, never pickled.
    """

    __slots__ = ("__form", "__name", "__numbers")

    __form: KeyForm
    __name: str
    __numbers: _Secret[tuple[int, ...]]

    def __new__(cls) -> Self:
        """Refuse: there is no default key, and a secret is never an argument."""
        raise TypeError(
            "read a key with ForeignKey.load(path, form) or ForeignKey.from_text, "
            "or derive one from a filigrane key with ForeignKey.derive"
        )

    @classmethod
    def __build(cls, name: str, form: KeyForm, numbers: _Secret[tuple[int, ...]]) -> Self:
        self = object.__new__(cls)
        object.__setattr__(self, "_ForeignKey__name", name)
        object.__setattr__(self, "_ForeignKey__form", form)
        object.__setattr__(self, "_ForeignKey__numbers", numbers)
        return self

    @classmethod
    def from_text(cls, text: str, form: KeyForm, name: str = "foreign") -> Self:
        """The key written as text: numbers separated by white space or commas, [ ] around allowed.

        Empty lines and lines that start with # are skipped. name: public, 1 to 128 of
        A-Z a-z 0-9 . _ @ / -. Raises KeyFormatError, never with the numbers; TypeError if text is
        not a str.
        """
        held = _Secret(text)
        del text
        form = _known_form(form)
        if not isinstance(held.reveal(), str):
            raise TypeError(f"a key's text is a str, not {type(held.reveal()).__name__}")
        parsed = _parse(held, form)
        if isinstance(parsed, str):
            raise KeyFormatError(parsed)
        return cls.__build(_checked_name(name), form, parsed)

    @classmethod
    def load(cls, path: str | os.PathLike[str], form: KeyForm, name: str | None = None) -> Self:
        """The key of a file, which nobody but its owner may read (mode 0600 on POSIX).

        name: public; the file's name without ending if not given. Raises KeyFormatError if the file
        is missing, unreadable, open to others, or holds something else than this form.
        """
        where = os.fspath(path)
        form = _known_form(form)
        if not os.path.exists(where):
            raise KeyFormatError(
                f"{where}: there is no such file; write the tool's key into one that only you can "
                "read"
            )
        read = _read_file(path)
        parsed = read if isinstance(read, str) else _parse(read, form)
        if isinstance(parsed, str):
            raise KeyFormatError(f"{where}: {parsed}")
        if name is None:
            stem = os.path.splitext(os.path.basename(os.fsdecode(where)))[0]
            name = stem if _NAME.fullmatch(stem) else "foreign"
        return cls.__build(_checked_name(name), form, parsed)

    @classmethod
    def derive(cls, key: MarkingKey, profile: "Profile") -> Self:
        """The key that a filigrane key, or one of its users, has for a profile (SPEC 1.2).

        The profile's name, key_form, key_count and key_bits decide; its other parameters do not
        enter, so two profiles that differ in those only share their numbers.
        """
        if isinstance(key, Key):
            numbers = _derived(key, None, profile.name, profile.key_count, profile.key_bits)
        elif isinstance(key, UserKey):
            numbers = _derived(
                key.root, key.index, profile.name, profile.key_count, profile.key_bits
            )
        else:
            raise TypeError(f"derive from a Key or key.user(i), not {type(key).__name__}")
        return cls.__build(key.name, profile.key_form, numbers)

    @property
    def name(self) -> str:
        """The key's public name."""
        return self.__name

    @property
    def form(self) -> KeyForm:
        """How the tool writes such a key."""
        return self.__form

    def reveal(self) -> tuple[int, ...]:
        """The numbers. They are secret: do not log or store them."""
        return self.__numbers.reveal()

    def export_text(self) -> str:
        """The key as the tool's configuration wants it; whoever reads it can mark and forge."""
        if self.__form in (KeyForm.HEX, KeyForm.HEX_PAIR):
            return " ".join(f"{number:016x}" for number in self.__numbers.reveal())
        return ", ".join(str(number) for number in self.__numbers.reveal())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ForeignKey):
            return NotImplemented
        one, two = (str(key.__numbers.reveal()).encode("ascii") for key in (self, other))
        same = hmac.compare_digest(one, two)
        return same and (self.__form, self.__name) == (other.__form, other.__name)

    def __hash__(self) -> int:
        # Not of the numbers: a hash of 64 bits of secret would tell them.
        return hash((self.__form, self.__name))

    def __repr__(self) -> str:
        return f"<ForeignKey {self.__name} form={self.__form.value}>"


def _known_form(form: object) -> KeyForm:
    try:
        return KeyForm(form)
    except ValueError:
        known = ", ".join(f"KeyForm.{known.name}" for known in KeyForm)
        raise KeyFormatError(f"a key's form is one of {known}.") from None


def _checked_name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a key's name is a str, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        # Not repeated: it may be the key itself, passed in the wrong place.
        raise KeyFormatError("this cannot be a key's name; use 1 to 128 of A-Z a-z 0-9 . _ @ / -")
    return name


def _derived(
    root: Key, user: int | None, profile: str, count: int, bits: int
) -> _Secret[tuple[int, ...]]:
    purpose = _PARENTS["root" if user is None else "users"]
    numbers: _Secret[list[int]] = _Secret([])
    for i in range(count):
        block = root._foreign_block(purpose, profile, i)
        if user is not None:
            block = _expand(block, b"filigrane/v1/user" + user.to_bytes(8, "big"), 32)
        numbers.reveal().append(int.from_bytes(block.reveal(), "big") >> (256 - bits))
    return _Secret(tuple(numbers.reveal()))


# Returns what is wrong instead of raising it, like its kin in filigrane.keys: an exception raised
# while another is handled carries frames that hold the secret.


def _parse(text: _Secret[str], form: KeyForm) -> _Secret[tuple[int, ...]] | str:
    """The numbers of a key's text, or what is wrong with it."""
    least, most, low, high, wanted = _FORMS[form]
    lines = _Secret([ln for ln in text.reveal().splitlines() if not ln.lstrip().startswith("#")])
    words = _Secret(re.split(r"[\s,]+", " ".join(lines.reveal()).strip(" \t,")))
    if words.reveal()[0].startswith(("[", "(")) and words.reveal()[-1].endswith(("]", ")")):
        inner = " ".join(words.reveal())[1:-1].strip(" ,")
        words = _Secret(inner.split())
        del inner
    given = [word for word in words.reveal() if word]
    count = len(given)
    del given
    if count == 0:
        return f"there is no key here; this profile's is written as {wanted}"
    if any(word.startswith("filigrane-key-") for word in words.reveal()):
        return (
            "this is a filigrane key, not a number of another tool; derive that profile's key from "
            "it with ForeignKey.derive"
        )
    if not least <= count <= most:
        return f"there are {count} numbers here; this profile's key is {wanted}"
    numbers: _Secret[list[int]] = _Secret([])
    for position in range(count):
        word = _Secret(words.reveal()[position].strip("\"'"))
        value = _number(word, form)
        if value is None:
            return f"number {position + 1} is not of this form; this profile's key is {wanted}"
        if not low <= value.reveal() <= high:
            return f"number {position + 1} is out of range; this profile's key is {wanted}"
        numbers.reveal().append(value.reveal())
    return _Secret(tuple(numbers.reveal()))


def _number(word: _Secret[str], form: KeyForm) -> _Secret[int] | None:
    if form in (KeyForm.HEX, KeyForm.HEX_PAIR):
        return _Secret(int(word.reveal(), 16)) if _HEX.fullmatch(word.reveal()) else None
    if form is KeyForm.UINT64 and _PREFIXED.fullmatch(word.reveal()):
        return _Secret(int(word.reveal(), 16))
    return _Secret(int(word.reveal())) if _DECIMAL.fullmatch(word.reveal()) else None


def load_any(path: str | os.PathLike[str], name: str | None = None) -> Key | tuple[ForeignKey, ...]:
    """What a key file can be read as: the filigrane key in it, or one ForeignKey per form.

    For callers that do not know which tool a key belongs to. Raises KeyFormatError if it is
    nothing.
    """
    read = _read_file(path)
    if not isinstance(read, str):
        if any(line.startswith("filigrane-key-") for line in read.reveal().split()):
            return Key.load(path)
        fitting = [form for form in KeyForm if not isinstance(_parse(read, form), str)]
        if fitting:
            return tuple(ForeignKey.load(path, form, name) for form in fitting)
        read = "this is not a key of any form; see docs/interop.md for how tools write theirs"
    raise KeyFormatError(f"{os.fspath(path)}: {read}")
