"""A file of collected answers: what it holds already, and a safe place to append to.

Knows nothing of networks and scores nothing. One JSON object a line, each on the disk before it
counts; how the answers were drawn stands beside them in FILE.run.json.
"""

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from filigrane.adapters.endpoints import Parameters
from filigrane.errors import RecordError

try:
    import fcntl
except ImportError:  # not on Windows, where two runs on one file have to be avoided by hand
    fcntl = None  # type: ignore[assignment]

FORMAT: Final = "filigrane answers 1"
SETTINGS_SUFFIX: Final = ".run.json"

_OTHER_FILE: Final = "choose another file."
_START: Final = b'{"id": '


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the answers of one file have in common."""

    endpoint: str
    model: str
    api: str
    parameters: Parameters

    def as_json(self) -> dict[str, object]:
        """What stands beside the answers."""
        return {
            "format": FORMAT,
            "endpoint": self.endpoint,
            "model": self.model,
            "api": self.api,
            **self.parameters.as_json(),
            "top_logprobs": self.parameters.top_logprobs,
        }


class Answers:
    """A file of answers, opened for one run at a time; use it with `with`.

    done: prompts by id; model: what the endpoint called itself; dropped: bytes of an unfinished
    last line, which a run that was killed had left, now in FILE.part. Raises RecordError for a file
    of other settings, of something else, or in use; nothing in a file that is refused is touched.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Settings) -> None:
        self.path = Path(path)
        self.settings_path = self.path.with_name(self.path.name + SETTINGS_SUFFIX)
        self.done: dict[str, tuple[str, str | None]] = {}
        self.model: str | None = None
        self.dropped = 0
        self._settings = settings
        self._file = -1
        self._end = 0

    def __enter__(self) -> "Answers":
        # Not truncated, and not created before the settings are known to fit.
        existed = self.path.exists()
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise RecordError(
                f"{self.path}: cannot be opened for writing ({error.strerror}); {_OTHER_FILE}"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise RecordError(f"{self.path} is a device or a pipe; {_OTHER_FILE}")
            self._lock()
            tail = self._read()
            self._check_settings()
            self._begin(tail)
        except BaseException:
            os.close(self._file)
            if not existed:
                with contextlib.suppress(OSError):
                    self.path.unlink()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordError(
                f"{self.path}: another run is writing to it; wait for it, or choose another file."
            ) from None
        except OSError:
            pass  # a file system without locks

    # ------------------------------------------------------------ what is there

    def _read(self) -> bytes:
        """Take in all answers; returns the unfinished last line, or nothing."""
        number = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    # A whole object without its line break is kept: only that one byte is missing.
                    if self._take(line, number, whole=False):
                        self._end += len(line)
                        return b""
                    return line
                self._take(line, number, whole=True)
                self._end += len(line)
        return b""

    def _take(self, line: bytes, number: int, *, whole: bool) -> bool:
        place = f"{self.path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            # Half a record; or, after a loss of power, space that was never filled.
            if not whole and (_START.startswith(line[: len(_START)]) or not line.strip(b"\0")):
                return False
            raise RecordError(f"{place} is no answer that was collected; {_OTHER_FILE}") from None
        fields = record if isinstance(record, dict) else {}
        name, prompt, model = (fields.get(key) for key in ("id", "prompt", "model"))
        system = fields.get("system")
        if not (isinstance(name, str) and isinstance(prompt, str) and isinstance(model, str)):
            raise RecordError(f"{place} is no answer that was collected; {_OTHER_FILE}")
        if self.model not in (None, model):
            raise RecordError(f"{place} is of another model than the lines before; {_OTHER_FILE}")
        self.model = model
        self.done[name] = (prompt, system if isinstance(system, str) else None)
        return True

    def _check_settings(self) -> None:
        if not self.done:
            return
        try:
            found = json.loads(self.settings_path.read_text("utf-8"))
        except FileNotFoundError:
            raise RecordError(
                f"{self.path} holds answers, but {self.settings_path.name} is not beside it, which "
                "says how they were drawn; put it back, or choose another file."
            ) from None
        except (OSError, ValueError) as error:
            raise RecordError(
                f"{self.settings_path}: cannot be read ({type(error).__name__}); choose another "
                "file for the answers."
            ) from error
        wanted = self._settings.as_json()
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise RecordError(
                f"{self.settings_path} was not written by this version; {_OTHER_FILE}"
            )
        for name, value in wanted.items():
            if found.get(name) != value:
                raise RecordError(
                    f"{self.path} was collected with {name} {json.dumps(found.get(name))}, now it "
                    f"is {json.dumps(value)}; choose another file, or go back to those settings."
                )

    def _begin(self, tail: bytes) -> None:
        """Make the end of the file a place to append to, and write down the settings."""
        if tail:
            # Moved, not lost: somebody may have paid for it.
            self.path.with_name(self.path.name + ".part").write_bytes(tail)
            os.ftruncate(self._file, self._end)
            self.dropped = len(tail)
        elif self._end and os.pread(self._file, 1, self._end - 1) != b"\n":
            self._write(b"\n")
        if not self.done:
            text = json.dumps(self._settings.as_json(), indent=1) + "\n"
            scratch = self.settings_path.with_name(self.settings_path.name + ".new")
            with open(scratch, "wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.settings_path)

    # ------------------------------------------------------------ what is added

    def add(self, record: Mapping[str, object]) -> None:
        """Append one answer; when this returns it is on the disk.

        Raises OSError, with the file's name, if the disk is full or fails; the file then ends with
        the answer before.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        self._write(line + b"\n")

    def _write(self, data: bytes) -> None:
        at = 0
        try:
            while at < len(data):
                at += os.write(self._file, data[at:])
            os.fsync(self._file)
        except BaseException as error:
            # Half a line is worse than none; this needs no space, and works on a full disk.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise
        self._end += len(data)
