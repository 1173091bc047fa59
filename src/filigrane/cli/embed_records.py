"""The output of `embed`: the records a file holds already, and where new ones go.

Records are appended so that a run that was killed can go on; settings that differ are refused, so
that a file never holds texts of two kinds. Knows nothing of models and keys.
"""

import json as jsonlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Final

from filigrane.cli import records, render
from filigrane.cli.records import Place, Problem
from filigrane.errors import RecordError

DRAFT_SETTINGS: Final = ("method", "draft", "draft_length")
"""What the records of texts written with drafts say of them; those of others lack it."""

_RECORD_START: Final = b'{"id": '
_SETTINGS: Final = (
    "scheme",
    "key",
    "key_fingerprint",
    "sampling",
    "model",
    "tokenizer_sha256",
    "vocab_size",
    *DRAFT_SETTINGS,
)


class Made:
    """The records that an output file holds already."""

    def __init__(self) -> None:
        self.done: set[tuple[int | str, str]] = set()
        self._settings: list[tuple[Place, dict[str, object]]] = []
        self._keep: int | None = None
        self._newline = False
        self._path = ""
        self._lines = 0

    @classmethod
    def read(cls, path: str) -> "Made":
        """Raises RecordError if the file holds anything but records that embed wrote."""
        made = cls()
        made._path = path
        if not os.path.exists(path) or os.path.getsize(path) == 0:
            return made
        made._find_tail(path)
        for item in records.read([path], "jsonl", plain="text"):
            if isinstance(item, Problem):
                if made._keep is not None and item.place.line == made._lines:
                    continue  # the half record that `prepare` is going to drop
                raise RecordError(f"{item}; --out is not a file that embed wrote. Choose another.")
            name, digest = records.name_field(item), item.fields.get("prompt_sha256")
            if not isinstance(name, int | str) or not isinstance(digest, str):
                raise RecordError(
                    f"{item.place}: --out is not a file that embed wrote. Choose another."
                )
            made.done.add((name, digest))
            settings = {field: item.fields.get(field) for field in _SETTINGS}
            if not made._settings or made._settings[-1][1] != settings:
                made._settings.append((item.place, settings))
        return made

    def _find_tail(self, path: str) -> None:
        """A run that was killed may have left half a line: remember where it begins."""
        end, tail = 0, b""
        with open(path, "rb") as file:
            for line in file:
                self._lines += 1
                tail = b"" if line.endswith(b"\n") else line
                end += len(line)
        if tail:
            try:
                jsonlib.loads(tail)
                self._newline = True
            except ValueError:
                if tail.startswith(_RECORD_START):
                    self._keep = end - len(tail)

    def check(self, facts: Mapping[str, object]) -> None:
        """Raise RecordError if the file was made with other settings, as far as they are known."""
        for place, settings in self._settings:
            for name, value in facts.items():
                if settings[name] != value:
                    raise RecordError(
                        f"{place} was made with {name} {jsonlib.dumps(settings[name])}, now it is "
                        f"{jsonlib.dumps(value)}; choose another --out file."
                    )

    def prepare(self, file: BinaryIO) -> None:
        """Make the end of the file a place to append to."""
        if self._keep is not None:
            file.truncate(self._keep)
            render.notice(f"{self._path}: dropped the unfinished last line of an earlier run")
        elif self._newline:
            file.write(b"\n")


class Sink:
    """Where records go: a file that is appended to, stdout as JSON, or stdout for people."""

    def __init__(self, file: BinaryIO | None, *, json: bool) -> None:
        self._file, self._json = file, json

    def put(self, batch: Sequence[Mapping[str, object]]) -> None:
        """Write records so that they survive whatever comes next."""
        if self._file is not None:
            for record in batch:
                line = jsonlib.dumps(record, ensure_ascii=False, allow_nan=False)
                self._file.write(line.encode("utf-8") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            return
        for record in batch:
            if self._json:
                render.dump(record)
            else:
                text = render.clean(str(record["text"]), keep="\n\t")
                sys.stdout.write(f"--- {render.clean(str(record['id']))}\n{text}\n\n")
                sys.stdout.flush()


@contextmanager
def open_sink(path: str | None, made: Made, *, json: bool) -> Iterator[Sink]:
    """The sink for a file that holds `made` already, or for stdout."""
    if path is None:
        yield Sink(None, json=json)
        return
    with open(path, "ab") as file:
        made.prepare(file)
        yield Sink(file, json=json)
