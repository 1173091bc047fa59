"""Reading batches: a stream of records and located problems, so that nothing is lost silently.

A text file is one text, or for prompts one prompt a line; a JSON Lines file is one object a line.
Messages say where something is wrong and never quote it.
"""

import codecs
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

from filigrane.cli.options import Form

MAX_BYTES: Final = 1 << 26
"""Longest text or line, 64 MiB: more is a file of another kind, and would fill the memory."""

_JSONL: Final = (".jsonl", ".ndjson")
_BOM: Final = b"\xef\xbb\xbf"
_HEAD: Final = 4096
_BINARY: Final = "is not UTF-8 text (a binary file, or UTF-16)"
_TOO_LONG: Final = f"longer than {MAX_BYTES >> 20} MiB; split it"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record or a problem is; line counts from 1 and is None for a whole file."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that could not be read, and why."""

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"

    def as_json(self) -> dict[str, object]:
        """For --json."""
        return {
            "source": self.place.source,
            "line": self.place.line,
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a JSON Lines file, or one text under the name `plain` was read with."""

    place: Place
    fields: Mapping[str, object]
    from_json: bool


def read(
    sources: Sequence[str], form: Form, *, plain: str, by_line: bool = False
) -> Iterator[Record | Problem]:
    """All records of all sources, in order; "-" is stdin.

    plain: the field that a plain text becomes; by_line: whether each of its lines is a record.
    Never raises for what it reads: what is wrong comes as a Problem in its place.
    """
    for source in sources:
        name = "stdin" if source == "-" else source
        try:
            if source == "-":
                yield from _records(sys.stdin.buffer, name, form, plain, by_line)
            else:
                with open(source, "rb") as stream:
                    yield from _records(stream, name, form, plain, by_line)
        except OSError as error:
            yield Problem(Place(name), f"cannot be read: {error.strerror or error}")


def _records(
    stream: BinaryIO, name: str, form: Form, plain: str, by_line: bool
) -> Iterator[Record | Problem]:
    # What has arrived already, without waiting for more than the first line needs.
    head = stream.peek(_HEAD)[:_HEAD] if isinstance(stream, io.BufferedReader) else b""
    first = stream.readline(MAX_BYTES + 1).removeprefix(_BOM)
    if not first:
        yield Problem(Place(name), "is empty")
    elif b"\0" in first[:_HEAD]:
        yield Problem(Place(name), _BINARY)
    elif form == "jsonl" or (form == "auto" and _looks_like_jsonl(name, first)):
        for place, text in _lines(stream, name, first):
            yield (
                _object(place, text.rstrip("\r\n"))
                if isinstance(text, str)
                else Problem(place, text.why)
            )
    elif by_line and not _is_text(head):
        yield Problem(Place(name), _BINARY)
    elif by_line:
        for place, text in _lines(stream, name, first, skip_blank=True):
            if isinstance(text, str):
                yield Record(place, {plain: text.rstrip("\r\n")}, from_json=False)
            else:
                yield Problem(place, text.why)
    else:
        data = first + stream.read(max(0, MAX_BYTES + 1 - len(first)))
        text = _decode(data)
        if isinstance(text, _Unreadable):
            yield Problem(Place(name), text.why)
        elif not text.strip():
            yield Problem(Place(name), "holds no text")
        else:
            yield Record(Place(name), {plain: text}, from_json=False)


@dataclass(frozen=True, slots=True)
class _Unreadable:
    why: str


def _decode(data: bytes) -> str | _Unreadable:
    if len(data) > MAX_BYTES:
        return _Unreadable(_TOO_LONG)
    if b"\0" in data:
        return _Unreadable("holds NUL bytes; it is not text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return _Unreadable(f"is not UTF-8 (byte {error.start + 1}); convert it first")


def _is_text(head: bytes) -> bool:
    """Whether the beginning of a file, which may end inside a character, is that of a text."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _lines(
    stream: BinaryIO, name: str, first: bytes, *, skip_blank: bool = False
) -> Iterator[tuple[Place, str | _Unreadable]]:
    """The lines of a stream whose first one has been read; blank ones at its end do not count.

    skip_blank: whether those before its end do not count either.
    """
    line, number = first, 1
    blank: list[int] = []
    while line:
        if line.strip():
            for missing in [] if skip_blank else blank:
                yield Place(name, missing), _Unreadable("is an empty line")
            blank.clear()
            yield Place(name, number), _decode(line)
        else:
            blank.append(number)
        while len(line) > MAX_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_BYTES + 1)  # the rest of a line that was refused
        line, number = stream.readline(MAX_BYTES + 1), number + 1
    if len(blank) == number - 1:
        yield Place(name), _Unreadable("holds no text")


def _looks_like_jsonl(name: str, first: bytes) -> bool:
    ending = name[name.rfind(".") :].lower()
    if ending in _JSONL or ending == ".txt":
        return ending in _JSONL
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _object(place: Place, text: str) -> Record | Problem:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return Problem(place, f"is not valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError):
        return Problem(place, "is not valid JSON (a number too long, or nested too deeply)")
    if not isinstance(value, dict):
        return Problem(place, "is not a JSON object; write one {...} a line")
    return Record(place, value, from_json=True)


def text_field(record: Record, name: str) -> str | Problem | None:
    """A field that has to be a string of valid Unicode; None if it is missing or null."""
    value = record.fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        return Problem(record.place, f'"{name}" is not a string')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return Problem(record.place, f'"{name}" is not valid Unicode (a lone surrogate)')
    return value


def integer_field(record: Record, name: str) -> int | Problem | None:
    """A field that has to be a positive integer; None if it is missing or null."""
    value = record.fields.get(name)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        return Problem(record.place, f'"{name}" is not a positive integer')
    return value


def name_field(record: Record) -> int | str | Problem | None:
    """The record's id, if it has one."""
    value = record.fields.get("id")
    if value is None or type(value) is int:
        return value
    if isinstance(value, str):
        return text_field(record, "id")
    return Problem(record.place, '"id" is neither a string nor an integer')
