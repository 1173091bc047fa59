"""Secret keys: made once, kept as one line of text, and the only source of every mark's randomness.

A root Key is 256 random bits with a name and a number of slots (independent key streams that one
mark takes turns with). Everything else is derived with RFC 5869 HKDF-Expand and SHA-256, one block
of 32 bytes, lp(x) = u16be(len(x)) || x:

    scheme key, slot s   Expand(secret, "filigrane/v1/mark" || lp(label) || u8(s))
    users' parent        Expand(secret, "filigrane/v1/users" || lp(label) || u8(s))
    user key, slot s     Expand(users' parent of slot s, "filigrane/v1/user" || u64be(index))
    check value          Expand(secret, "filigrane/v1/check"), 8 bytes

and the text form is filigrane-key-1:<name>:<slots>:<body>, its body the base32 (RFC 4648, lower
case, no padding) of the secret and the first 4 bytes of
SHA-256("filigrane/v1/key-text" || lp(name) || u8(slots) || secret).

Key.generate is the only function in filigrane that asks for randomness. Secrets never appear in a
repr, an error or a pickle; inside this module they travel in a _Secret, so that a traceback that
shows local variables shows `<secret>`.
"""

import base64
import contextlib
import hashlib
import hmac
import operator
import os
import re
import secrets
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Generic, Never, Self, TypeVar, final, overload

import numpy as np
from numpy.typing import NDArray

from filigrane.errors import KeyFormatError, SchemeError, SecretLeakError
from filigrane.private_files import new_file, open_to_others, why_not

__all__ = ["Key", "MarkingKey", "UserKey", "UserKeys"]

MAX_SLOTS = 64
MAX_LABEL_BYTES = 200
MAX_INDEX = 2**64 - 1

_SECRET_BYTES = 32
_SUM_BYTES = 4
_BODY_CHARS = 58  # base32 of 36 bytes: 288 bits in 57.6 characters of 5
_PREFIX = "filigrane-key-"
_VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SLOTS = re.compile(r"[1-9][0-9]?")
_NOT_BASE32 = re.compile(r"[^a-z2-7]")
_NAME_RULE = "1 to 64 of A-Z a-z 0-9 . _ @ -, the first a letter or digit"
_MAX_FILE_BYTES = 65536

_T = TypeVar("_T")


class _Secret(Generic[_T]):
    """A value that must not be shown: whatever prints it prints `<secret>`."""

    __slots__ = ("__value",)

    def __init__(self, value: _T) -> None:
        self.__value = value

    def reveal(self) -> _T:
        return self.__value

    def __repr__(self) -> str:
        return "<secret>"

    def __reduce_ex__(self, protocol: object) -> Never:
        raise SecretLeakError("a secret cannot be pickled; export it by name: key.export_text()")


class _Sealed:
    """What all keys share: no attribute can be set, copies are the object itself, no pickling."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError(
            f"{type(self).__name__} is immutable; make another key instead of changing {name!r}"
        )

    def __delattr__(self, name: str) -> Never:
        raise AttributeError(f"{type(self).__name__} is immutable; {name!r} cannot be deleted")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> Never:
        raise SecretLeakError(
            f"{type(self).__name__} cannot be pickled, it would spill its secret; pass "
            "the text of Key.export_text() where the key is needed and read it there with "
            "Key.from_text, or share a key file and use Key.load"
        )

    def __reduce__(self) -> Never:
        self.__reduce_ex__(2)

    def __getstate__(self) -> Never:
        self.__reduce_ex__(2)


class SecretWords(np.ndarray[Any, np.dtype[np.uint32]]):
    """Words of keys: an ordinary uint32 array that does not show itself and cannot be pickled.

    Code between the key and the kernels holds it in locals, which some tracebacks print.
    """

    def __repr__(self) -> str:
        return f"<secret words, shape {self.shape}>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce_ex__(self, protocol: object) -> Never:
        raise SecretLeakError(
            "words of a key cannot be pickled; hand over the key's text (key.export_text())."
        )


class MarkingKey(_Sealed, ABC):
    """A key that can mark text or test for a mark: a root Key, or one user's UserKey."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """The key's public name."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many independent key streams the key has, 1 to 64."""

    @abstractmethod
    def prf_keys(self, label: str) -> NDArray[np.uint32]:
        """The scheme keys of all slots, (slots, 8) uint32: 32 bytes as 8 little-endian words.

        label: the scheme's, as f"{scheme.name}/{scheme.context_width}"; 1 to 200 bytes of UTF-8.
        Raises SchemeError for any other label. The words are secret: do not log or store them.
        """


@final
class Key(MarkingKey):
    """A root key: 256 secret bits, a public name and a number of slots.

    Made by Key.generate, Key.from_text or Key.load. Immutable; shown as its name, its slots and its
    fingerprint. The secret alone decides the marks: the name does not enter them, and a key with
    fewer slots has the first slots of one with more.
    """

    __slots__ = ("__fingerprint", "__name", "__secret", "__slots")

    __fingerprint: str
    __name: str
    __secret: _Secret[bytes]
    __slots: int

    def __new__(cls) -> Self:
        """Refuse: there is no default key, and a secret is never an argument."""
        raise TypeError(
            "make a key with Key.generate(name), or read one with Key.from_text or Key.load"
        )

    @classmethod
    def __build(cls, name: str, slots: int, secret: _Secret[bytes]) -> Self:
        # Derived first: a fault here must not meet a half-made key that cannot even be shown.
        check = _expand(secret, b"filigrane/v1/check", 8).reveal().hex()
        self = object.__new__(cls)
        object.__setattr__(self, "_Key__name", name)
        object.__setattr__(self, "_Key__slots", slots)
        object.__setattr__(self, "_Key__secret", secret)
        object.__setattr__(self, "_Key__fingerprint", check)
        return self

    @classmethod
    def generate(cls, name: str, *, slots: int = 8) -> Self:
        """A new key with 256 bits from the operating system's random source.

        name: 1 to 64 of A-Z a-z 0-9 . _ @ -, the first a letter or digit. slots: 1 to 64.
        Raises KeyFormatError for values outside these, TypeError for other types.
        """
        if not isinstance(name, str):
            raise TypeError(f"a key's name is a str, not {type(name).__name__}")
        if not _NAME.fullmatch(name):
            raise KeyFormatError(f"{name!r} cannot be a key's name; use {_NAME_RULE}")
        slots = _integer(slots, "slots")
        if not 1 <= slots <= MAX_SLOTS:
            raise KeyFormatError(f"slots = {slots} is out of range; use 1 to {MAX_SLOTS}")
        return cls.__build(name, slots, _Secret(secrets.token_bytes(_SECRET_BYTES)))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The key written as text by export_text or save.

        Surrounding white space, empty lines and lines that start with # are skipped.
        Raises KeyFormatError, each kind of mistake with its own message and none with the secret
        part; TypeError if text is not a str.
        """
        held = _Secret(text)
        del text
        if not isinstance(held.reveal(), str):
            raise TypeError(f"a key's text is a str, not {type(held.reveal()).__name__}")
        parsed = _parse(held)
        if isinstance(parsed, str):
            raise KeyFormatError(parsed)
        return cls.__build(*parsed)

    @classmethod
    def _of_secret(cls, name: str, slots: int, secret: _Secret[bytes]) -> Self:
        """A key derived elsewhere in filigrane (`filigrane.custody.hierarchy`); name is checked."""
        if not _NAME.fullmatch(name) or not 1 <= slots <= MAX_SLOTS:
            raise KeyFormatError(f"{name!r} with {slots} slots cannot be a key; use {_NAME_RULE}")
        return cls.__build(name, slots, secret)

    def _expand(self, info: bytes) -> _Secret[bytes]:
        """32 bytes of HKDF-Expand(secret, info), for derivations that SPEC.md names."""
        return _expand(self.__secret, info, 32)

    def export_text(self) -> str:
        """The key as one line of text, secret included: whoever reads it can mark and forge."""
        tail = _checksum(self.__name, self.__slots, self.__secret)
        body = _Secret(base64.b32encode(self.__secret.reveal() + tail).decode("ascii"))
        head = f"{_PREFIX}{_VERSION}:{self.__name}:{self.__slots}:"
        return head + body.reveal().rstrip("=").lower()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The one key of a key file, as written by save.

        Raises KeyFormatError if the file is missing, unreadable, empty, not UTF-8 text, holds no
        key or several, or (POSIX) lets anyone but its owner in.
        """
        read = _read_file(path)
        if isinstance(read, str):
            raise KeyFormatError(f"{os.fspath(path)}: {read}")
        parsed = _parse(read)
        if isinstance(parsed, str):
            raise KeyFormatError(f"{os.fspath(path)}: {parsed}")
        return cls.__build(*parsed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a new file that only its owner can read (mode 0600).

        Raises KeyFormatError if the file exists (it is never overwritten) or cannot be made.
        """
        text = _Secret(
            f"# filigrane key {self.__name}: {self.__slots} slots, "
            f"fingerprint {self.__fingerprint}\n"
            f"# made {datetime.now(UTC):%Y-%m-%d}; keep secret: whoever reads this file can mark "
            "and forge\n"
            f"{self.export_text()}\n"
        )
        try:
            with new_file(path) as out:
                out.write(text.reveal().encode("utf-8"))
        except OSError as error:
            raise KeyFormatError(f"{os.fspath(path)}: {why_not(error)}") from None

    @property
    def name(self) -> str:
        """The key's public name."""
        return self.__name

    @property
    def slots(self) -> int:
        """How many independent key streams the key has, 1 to 64."""
        return self.__slots

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell keys apart and are safe to publish."""
        return self.__fingerprint

    def prf_keys(self, label: str) -> NDArray[np.uint32]:
        """The scheme keys of all slots, (slots, 8) uint32: 32 bytes as 8 little-endian words.

        label: the scheme's, as f"{scheme.name}/{scheme.context_width}"; 1 to 200 bytes of UTF-8.
        Raises SchemeError for any other label. The words are secret: do not log or store them.
        """
        return _words(self._slot_keys(b"filigrane/v1/mark", label))

    def _user_parents(self, label: str) -> list[_Secret[bytes]]:
        """What users' keys of a label are derived from; it never marks anything itself."""
        return self._slot_keys(b"filigrane/v1/users", label)

    def _foreign_block(self, purpose: bytes, profile: str, number: int) -> _Secret[bytes]:
        """What a number of another tool's key is cut from (`filigrane.foreign.keys`)."""
        info = purpose + _lp(profile.encode("ascii")) + bytes([number])
        return _expand(self.__secret, info, 32)

    def _slot_keys(self, purpose: bytes, label: str) -> list[_Secret[bytes]]:
        info = purpose + _lp(_label_bytes(label))
        return [_expand(self.__secret, info + bytes([s]), 32) for s in range(self.__slots)]

    def user(self, index: int) -> "UserKey":
        """The key of one user, 0 to 2**64 - 1. Raises ValueError outside, TypeError for no int."""
        index = _integer(index, "a user's index")
        if not 0 <= index <= MAX_INDEX:
            raise ValueError(f"user index {index} is out of range; use 0 to 2**64 - 1")
        return UserKey._of(self, index)

    def users(self, which: int | range) -> "UserKeys":
        """The keys of users 0 to which - 1, or of a range of users with step 1; nothing is derived.

        Raises ValueError for indices outside 0 to 2**64 - 1 or another step.
        """
        if not isinstance(which, range):
            count = _integer(which, "the number of users")
            if count < 0:
                raise ValueError(f"{count} users are too few; use 0 or more")
            which = range(count)
        if which.step != 1:
            raise ValueError(f"{which} leaves users out; use a range with step 1")
        if which and (which[0] < 0 or which[-1] > MAX_INDEX):
            raise ValueError(f"{which} leaves the user indices; they are 0 to 2**64 - 1")
        return UserKeys._of(self, which)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        same = hmac.compare_digest(self.__secret.reveal(), other.__secret.reveal())
        return same and (self.__name, self.__slots) == (other.__name, other.__slots)

    def __hash__(self) -> int:
        return hash((self.__name, self.__slots, self.__fingerprint))

    def __repr__(self) -> str:
        return f"<Key {self.__name} slots={self.__slots} fingerprint={self.__fingerprint}>"


@final
class UserKey(MarkingKey):
    """The key of one user of a root key, as Key.user makes it."""

    __slots__ = ("__index", "__root")

    __index: int
    __root: Key

    def __new__(cls) -> Self:
        """Refuse: a user's key comes from its root."""
        raise TypeError("make a user's key with key.user(index)")

    @classmethod
    def _of(cls, root: Key, index: int) -> Self:
        self = object.__new__(cls)
        object.__setattr__(self, "_UserKey__root", root)
        object.__setattr__(self, "_UserKey__index", index)
        return self

    @property
    def root(self) -> Key:
        """The root key."""
        return self.__root

    @property
    def index(self) -> int:
        """The user's index, 0 to 2**64 - 1."""
        return self.__index

    @property
    def name(self) -> str:
        """The root key's name, a slash and the index."""
        return f"{self.__root.name}/{self.__index}"

    @property
    def slots(self) -> int:
        """The root key's number of slots."""
        return self.__root.slots

    def prf_keys(self, label: str) -> NDArray[np.uint32]:
        """The user's keys of all slots, (slots, 8) uint32: 32 bytes as 8 little-endian words.

        label: as for Key.prf_keys; raises SchemeError likewise. The words are secret.
        """
        info = b"filigrane/v1/user" + self.__index.to_bytes(8, "big")
        return _words([_expand(key, info, 32) for key in self.__root._user_parents(label)])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UserKey):
            return NotImplemented
        return self.__index == other.__index and self.__root == other.__root

    def __hash__(self) -> int:
        return hash((self.__root, self.__index))

    def __repr__(self) -> str:
        root = self.__root
        return f"<UserKey {self.name} slots={root.slots} root={root.fingerprint}>"


@final
class UserKeys(_Sealed):
    """Consecutive users of a root key, as Key.users makes them; keys are derived when asked for.

    Positions count from 0 inside the range; position p is the user of index indices[p].
    """

    __slots__ = ("__indices", "__root")

    __indices: range
    __root: Key

    def __new__(cls) -> Self:
        """Refuse: users' keys come from their root."""
        raise TypeError("make users' keys with key.users(how_many) or key.users(range(a, b))")

    @classmethod
    def _of(cls, root: Key, indices: range) -> Self:
        self = object.__new__(cls)
        object.__setattr__(self, "_UserKeys__root", root)
        object.__setattr__(self, "_UserKeys__indices", indices)
        return self

    @property
    def root(self) -> Key:
        """The root key."""
        return self.__root

    @property
    def indices(self) -> range:
        """The users' indices."""
        return self.__indices

    @property
    def slots(self) -> int:
        """The root key's number of slots."""
        return self.__root.slots

    def name(self, position: int) -> str:
        """The name of the user at a position; raises IndexError outside the range."""
        return f"{self.__root.name}/{self.__indices[_integer(position, 'a position')]}"

    def prf_keys(self, label: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint32]:
        """The keys of positions start to stop - 1 (default: all), (stop - start, slots, 8) uint32.

        Equal to stacking UserKey.prf_keys(label), about 0.1 s per million keys and slot on one
        core, without the GIL. label: as for Key.prf_keys; raises SchemeError likewise, IndexError
        for positions outside 0 <= start <= stop <= len. The words are secret.
        """
        first, count = self.__span(start, stop)
        keys = _Secret(_words(self.__root._user_parents(label)))
        out = np.empty((count, self.slots, 8), np.uint32)
        if count:
            from filigrane.kernels.hkdf import expand_users

            expand_users(np.asarray(keys.reveal()), first, out)
        return out.view(SecretWords)

    def prf_key_words(
        self, label: str, slot: int, start: int = 0, stop: int | None = None
    ) -> NDArray[np.uint32]:
        """One slot's keys of positions start to stop - 1, word by word: (8, stop - start) uint32.

        The transpose of prf_keys(label, start, stop)[:, slot], in C order, for scans that run over
        users. Raises as prf_keys does, and IndexError for a slot outside 0 to slots - 1.
        """
        slot = _integer(slot, "a slot")
        if not 0 <= slot < self.slots:
            raise IndexError(
                f"slot {slot} is out of range; the key has slots 0 to {self.slots - 1}"
            )
        first, count = self.__span(start, stop)
        keys = _Secret(_words(self.__root._user_parents(label)))
        out = np.empty((8, count), np.uint32)
        if count:
            from filigrane.kernels.hkdf import expand_users

            expand_users(np.asarray(keys.reveal())[slot : slot + 1], first, out.T[:, None, :])
        return out.view(SecretWords)

    def __span(self, start: int, stop: int | None) -> tuple[np.uint64, int]:
        indices = self.__indices
        low = _integer(start, "start")
        # Not len(): that stops at 2**63 - 1, and a range may be longer.
        size = indices.stop - indices.start if indices else 0
        high = size if stop is None else _integer(stop, "stop")
        if not 0 <= low <= high <= size:
            raise IndexError(
                f"positions {low} to {high} are out of range; use 0 <= start <= stop <= {size}"
            )
        # An empty span may begin past the last index; it is never read.
        return np.uint64((indices.start + low) & MAX_INDEX), high - low

    def __len__(self) -> int:
        return len(self.__indices)

    @overload
    def __getitem__(self, position: int) -> UserKey: ...
    @overload
    def __getitem__(self, position: slice) -> "UserKeys": ...
    def __getitem__(self, position: int | slice) -> "UserKey | UserKeys":
        if isinstance(position, slice):
            return self.__root.users(self.__indices[position])
        return UserKey._of(self.__root, self.__indices[_integer(position, "a position")])

    def __iter__(self) -> Iterator[UserKey]:
        return (UserKey._of(self.__root, index) for index in self.__indices)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, UserKey) and key.index in self.__indices and key.root == self.__root

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UserKeys):
            return NotImplemented
        return self.__indices == other.__indices and self.__root == other.__root

    def __hash__(self) -> int:
        return hash((self.__root, self.__indices))

    def __repr__(self) -> str:
        root, indices = self.__root, self.__indices
        return (
            f"<UserKeys {root.name}/{indices.start}..{indices.stop} slots={root.slots} "
            f"root={root.fingerprint}>"
        )


def _integer(value: Any, what: str) -> int:
    """An int from an int or a NumPy integer; True is an int to Python but never meant as one."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} is an int, not {type(value).__name__}")
    return operator.index(value)


def _lp(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def _label_bytes(label: str) -> bytes:
    if not isinstance(label, str):
        raise TypeError(f"a label is a str, not {type(label).__name__}")
    data = label.encode("utf-8", "surrogatepass")
    if not 1 <= len(data) <= MAX_LABEL_BYTES:
        raise SchemeError(
            f"a label has 1 to {MAX_LABEL_BYTES} bytes of UTF-8, this one has {len(data)}; "
            'use the scheme\'s own, such as "gumbel/4"'
        )
    if re.search("[\ud800-\udfff]", label):
        raise SchemeError("a label must be valid Unicode; this one holds a lone surrogate")
    return data


def _expand(key: _Secret[bytes], info: bytes, length: int) -> _Secret[bytes]:
    """RFC 5869, section 2.3, HKDF-Expand with SHA-256."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    return _Secret(HKDFExpand(SHA256(), length, info).derive(key.reveal()))


def _words(keys: list[_Secret[bytes]]) -> NDArray[np.uint32]:
    raw = _Secret(b"".join(key.reveal() for key in keys))
    words = np.frombuffer(raw.reveal(), "<u4").astype(np.uint32).reshape(len(keys), 8)
    return words.view(SecretWords)


def _checksum(name: str, slots: int, secret: _Secret[bytes]) -> bytes:
    head = b"filigrane/v1/key-text" + _lp(name.encode("ascii")) + bytes([slots])
    return hashlib.sha256(head + secret.reveal()).digest()[:_SUM_BYTES]


# The functions below return what is wrong instead of raising it: an exception raised while another
# is handled carries the first one along, and with it frames and arguments that hold the secret.


def _parse(text: _Secret[str]) -> tuple[str, int, _Secret[bytes]] | str:
    """Name, slots and secret of a key's text, or what is wrong with it."""
    lines = _Secret(
        [
            line.strip()
            for line in text.reveal().splitlines()
            if line.strip() and not line.lstrip().startswith("#")
        ]
    )
    count = len(lines.reveal())
    if count == 0:
        return f"there is no key here; a key is a line that starts with {_PREFIX}{_VERSION}:"
    keys = sum(line.startswith(_PREFIX) for line in lines.reveal())
    if keys > 1:
        return f"there are {keys} keys here; give one key, and keep one per file"
    if count > 1:
        return (
            f"there are {count} lines here; a key is one line, join it if it was broken, and "
            "start notes with #"
        )
    if keys == 0:
        return f"this is not a key; a key is a line that starts with {_PREFIX}{_VERSION}:"
    fields = _Secret(lines.reveal()[0].removeprefix(_PREFIX).split(":"))
    if fields.reveal()[0] != _VERSION:
        return (
            f"this key has a format version other than {_VERSION}, the only one known here; "
            "check its first field, or use a newer release"
        )
    if len(fields.reveal()) != 4:
        return (
            f"this key has {len(fields.reveal())} fields between colons instead of 4; copy the "
            f"whole line {_PREFIX}{_VERSION}:name:slots:secret"
        )
    name, slots_text = fields.reveal()[1:3]
    body = _Secret(fields.reveal()[3])
    if not _NAME.fullmatch(name):
        return f"this key's name (second field) is not a name; it has {_NAME_RULE}"
    if not _SLOTS.fullmatch(slots_text) or int(slots_text) > MAX_SLOTS:
        return f"this key's slots (third field) are out of range; they are 1 to {MAX_SLOTS}"
    slots, size = int(slots_text), len(body.reveal())
    bad = _NOT_BASE32.search(body.reveal())
    if bad is not None:
        return (
            f"character {bad.start() + 1} of this key's secret part (last field) is not one of a-z "
            "(lower case) and 2-7; copy the key again"
        )
    if size < _BODY_CHARS:
        return (
            f"this key is cut short: its secret part has {size} characters instead of "
            f"{_BODY_CHARS}; copy the whole line"
        )
    if size > _BODY_CHARS:
        return (
            f"this key is too long: its secret part has {size} characters instead of "
            f"{_BODY_CHARS}; copy the key again"
        )
    both = _Secret(base64.b32decode(body.reveal().upper() + "======"))
    secret = _Secret(both.reveal()[:_SECRET_BYTES])
    # The last character has two bits to spare; b32decode ignores them, a key does not.
    spare = "abcdefghijklmnopqrstuvwxyz234567".index(body.reveal()[-1]) & 3
    tail = both.reveal()[_SECRET_BYTES:]
    if spare or not hmac.compare_digest(tail, _checksum(name, slots, secret)):
        return (
            "this key's checksum does not fit: some character of its name, slots or secret part "
            "was changed; copy the key again"
        )
    return name, slots, secret


def _read_file(path: str | os.PathLike[str]) -> _Secret[str] | str:
    """The text of a key file, or what is wrong with it."""
    try:
        # Opened first and looked at after, so that what is checked is what is read.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        return "there is no such file; check the path, or make a key with Key.generate and save it"
    except IsADirectoryError:
        return "this is a directory; give the path of a key file"
    except OSError as error:
        return f"this file cannot be opened ({error.strerror}); check its owner and permissions"
    try:
        about = os.fstat(file)
        if stat.S_ISDIR(about.st_mode):
            return "this is a directory; give the path of a key file"
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISFIFO(about.st_mode)):
            return "this is a device, not a file; give the path of a key file"
        exposed = open_to_others(path, about)
        if exposed is not None:
            return f"{exposed}; and if somebody may have read it, make a new key"
        with open(file, "rb", closefd=False) as stream:
            data = _Secret(stream.read(_MAX_FILE_BYTES + 1))
    except OSError as error:
        return f"this file cannot be read ({error.strerror}); check the disk and try again"
    finally:
        os.close(file)
    if len(data.reveal()) > _MAX_FILE_BYTES:
        return "this file is too long for a key file; give the path of a file that save wrote"
    if not data.reveal().strip():
        return "this file is empty; give the path of a file that save wrote"
    text: _Secret[str] | None = None
    with contextlib.suppress(UnicodeDecodeError):
        text = _Secret(data.reveal().decode("utf-8-sig"))
    if text is None or "\0" in text.reveal():
        return "this is not a text file (UTF-8); give the path of a file that save wrote"
    return text
