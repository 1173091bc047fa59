"""Evidence on disk: readings in a folder, piece by piece, and k-gram filters; never pickles.

    ReadingFolder    what a suspect was read with, and what came out, so that a run can go on
    save_filter, load_filter

Everything is written beside its place and moved there, so that what has a name is whole.
"""

import contextlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from filigrane.errors import EvidenceError, RecordError
from filigrane.radioactivity.evidence import Reading
from filigrane.radioactivity.filter import WindowFilter

SETTINGS: Final = "reading.json"
_PIECE: Final = re.compile(r"documents-(\d{7})-(\d{7})\.npz")
_FORMAT: Final = 1


class ReadingFolder:
    """A folder with one reading: its settings, and pieces that cover documents one after another.

    path: the folder, made if there is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def settings(self) -> dict[str, Any]:
        """What `begin` wrote. Raises RecordError if this is not such a folder."""
        try:
            found = json.loads((self.path / SETTINGS).read_text("utf-8"))
        except OSError as error:
            raise RecordError(
                f"{self.path} holds no {SETTINGS}: it is not a folder that "
                f"`filigrane radioactivity read` wrote ({error.strerror})."
            ) from error
        except ValueError as error:
            raise RecordError(
                f"{self.path / SETTINGS} is damaged; read the texts again into a new folder."
            ) from error
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise RecordError(f"{self.path / SETTINGS} is of another version; read the texts anew.")
        return found

    def begin(self, settings: Mapping[str, Any]) -> int:
        """Start, or go on with, a reading of these settings; returns the documents done already.

        Raises RecordError if the folder holds a reading with other settings.
        """
        wanted = json.loads(json.dumps({"format": _FORMAT, **settings}))
        if (self.path / SETTINGS).exists():
            held = self.settings
            for name in sorted({*held, *wanted}):
                if held.get(name) != wanted.get(name):
                    raise RecordError(
                        f"{self.path} holds a reading with {name} {json.dumps(held.get(name))}, "
                        f"now it is {json.dumps(wanted.get(name))}; choose another --out folder."
                    )
            return self.done
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.path / SETTINGS) as file:
            file.write(json.dumps(wanted, indent=1).encode())
        return 0

    def note(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep something that was only known at the end."""
        with replacing(self.path / f"{name}.json") as file:
            file.write(json.dumps(value, indent=1).encode())

    @property
    def notes(self) -> dict[str, Any]:
        """What `note` kept, by name."""
        files = sorted(path for path in self.path.glob("*.json") if path.name != SETTINGS)
        return {path.stem: json.loads(path.read_text("utf-8")) for path in files}

    @property
    def done(self) -> int:
        """Documents whose readings are in the folder, from the first one on without a gap."""
        return max((after for _, after, _ in self._pieces()), default=0)

    def add(self, reading: Reading, after: int) -> None:
        """Keep the reading of the documents from `done` up to `after`."""
        arrays: dict[str, Any] = {
            "windows": reading.windows,
            "documents": reading.documents,
            "starts": reading.starts,
            "tokens": reading.tokens,
            "suspect": reading.suspect,
            "rules": np.array(list(reading.ledger), dtype=np.str_),
            "dropped": np.array(list(reading.ledger.values()), dtype=np.int64),
            "vocab_size": np.int64(reading.vocab_size or 0),
        }
        if reading.base is not None:
            arrays["base"] = reading.base
        with replacing(self.path / f"documents-{self.done:07d}-{after:07d}.npz") as file:
            np.savez(file, **arrays)

    def load(self) -> Reading:
        """All pieces as one. Raises RecordError for a damaged one, EvidenceError for none."""
        return Reading.join([_load(path) for _, _, path in self._pieces()])

    def _pieces(self) -> list[tuple[int, int, Path]]:
        found: list[tuple[int, int, Path]] = []
        for path in sorted(self.path.glob("documents-*.npz")):
            match = _PIECE.fullmatch(path.name)
            # A gap would mean that a file was taken away; what follows it is not used.
            if match and int(match[1]) == (found[-1][1] if found else 0):
                found.append((int(match[1]), int(match[2]), path))
        return found


def _load(path: Path) -> Reading:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            rules, dropped = data["rules"].tolist(), data["dropped"].tolist()
            return Reading(
                windows=data["windows"],
                documents=data["documents"],
                starts=data["starts"],
                tokens=data["tokens"],
                suspect=data["suspect"],
                base=data.get("base"),
                vocab_size=int(data["vocab_size"]) or None,
                ledger=dict(zip(rules, dropped, strict=True)),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RecordError(
            f"{path} cannot be read as a reading; delete it and read its documents again."
        ) from error


def save_filter(window_filter: WindowFilter, path: str | os.PathLike[str]) -> None:
    """Write a filter: windows, counts and what they were made from."""
    about = {
        "format": _FORMAT,
        "documents": window_filter.documents,
        "tokens": window_filter.tokens,
        "vocab_size": window_filter.vocab_size,
        "tokenizer_sha256": window_filter.tokenizer_sha256,
    }
    with replacing(Path(path)) as file:
        np.savez_compressed(
            file,
            windows=window_filter.windows,
            counts=window_filter.counts,
            about=np.str_(json.dumps(about)),
        )


def load_filter(path: str | os.PathLike[str]) -> WindowFilter:
    """Read what `save_filter` wrote. Raises RecordError for anything else."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            about = json.loads(str(data["about"]))
            if about.pop("format") != _FORMAT:
                raise RecordError(f"{path} is a filter of another version; build it anew.")
            return WindowFilter(windows=data["windows"], counts=data["counts"], **about)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(
            f"{path} is not a filter; build one with `filigrane radioactivity filter`."
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place, whole and on disk, if the block ends well; else it vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def require_match(window_filter: WindowFilter, width: int, tokenizer_sha256: str | None) -> None:
    """Raise EvidenceError for a filter of another window width or tokenizer."""
    if window_filter.width != width:
        raise EvidenceError(
            f"the filter was made for windows of {window_filter.width} tokens, the scheme looks at "
            f"{width}; build it again with that scheme."
        )
    mine = window_filter.tokenizer_sha256
    if mine and tokenizer_sha256 and mine != tokenizer_sha256:
        raise EvidenceError(
            "the filter was made with another tokenizer; build it again from texts of the model "
            "whose mark is tested."
        )
