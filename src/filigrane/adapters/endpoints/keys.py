"""The key to somebody's API: where it comes from, and that it shows itself nowhere else."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from filigrane.errors import EndpointError

KEY_VARIABLE: Final = "FILIGRANE_API_KEY"
OPENAI_VARIABLE: Final = "OPENAI_API_KEY"

_SECRET: Final = 6  # characters of a key in a row that no message may show


@dataclass(frozen=True, slots=True, eq=False)
class ApiKey:
    """A key for somebody's API, which shows itself to nobody."""

    _text: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self._text.isascii() or not self._text.isprintable() or " " in self._text:
            raise EndpointError(
                "the API key holds spaces, line breaks or characters that no key has; copy it anew."
            )

    def __reduce__(self) -> Any:
        raise EndpointError("an API key is not pickled; read it again where it is needed.")

    def header(self) -> dict[str, str]:
        """The header that shows it to the endpoint."""
        return {"Authorization": f"Bearer {self._text}"}

    def hide(self, text: str) -> str:
        """`text` without any part of the key that is long enough to matter."""
        if len(self._text) <= _SECRET:
            return text.replace(self._text, "[key]")
        out: list[str] = []
        at = 0
        while at < len(text):
            end = at + _SECRET
            if text[at:end] not in self._text or end > len(text):
                out.append(text[at])
                at += 1
                continue
            while end < len(text) and text[at : end + 1] in self._text:
                end += 1
            out.append("[key]")
            at = end
        return "".join(out)

    def sent_back(self, body: bytes) -> bool:
        """Whether an answer holds the key; a short one ("EMPTY") may be a word of any text."""
        return len(self._text) >= 16 and self._text.encode() in body


def read_api_key(url: str, path: str | os.PathLike[str] | None = None) -> ApiKey | None:
    """The key in a file, else in $FILIGRANE_API_KEY or $OPENAI_API_KEY; None if there is none.

    $OPENAI_API_KEY goes to OpenAI's own hosts alone: whoever runs a suspect must not be handed a
    key that was set for somebody else. Raises EndpointError for an unreadable or empty file.
    """
    if path is not None:
        try:
            text = Path(path).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise EndpointError(
                f"the API key file {os.fspath(path)!r} cannot be read: {why}."
            ) from error
        if not text:
            raise EndpointError(f"the API key file {os.fspath(path)!r} is empty.")
        return ApiKey(text)
    if text := os.environ.get(KEY_VARIABLE, "").strip():
        return ApiKey(text)
    host = urlsplit(url).hostname or ""
    text = os.environ.get(OPENAI_VARIABLE, "").strip()
    if text and (host == "openai.com" or host.endswith(".openai.com")):
        return ApiKey(text)
    return None
