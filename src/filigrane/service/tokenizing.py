"""Texts to token ids with character offsets, by a tokenizer's name or its fingerprint.

Knows nothing of keys. Tokenizers are loaded when they are first needed and kept; "bytes" is built
in: its ids are the text's UTF-8 bytes. A text is read in NFC, the form that its hash is of. Where
the settings hold exactly one tokenizer, it reads what names none.
"""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from filigrane.contexts import TokenIds
from filigrane.errors import ModelError
from filigrane.service.contents import canonical

__all__ = ["BYTES_SHA256", "Encoded", "NoTokenizer", "Tokenizers"]


class NoTokenizer(ModelError):
    """A text cannot be read for want of a tokenizer. The message says what to do, by names that
    the operator or the tenant gave: nothing of a request is in it.
    """


def _bytes_sha256() -> str:
    """What `adapters.models.fingerprint` is of 256 tokens that are single bytes."""
    digest = hashlib.sha256(b"filigrane/v1/tokenizer")
    for number in range(256):
        token = f"<0x{number:02X}>".encode("ascii")
        digest.update(number.to_bytes(4, "big") + len(token).to_bytes(4, "big") + token)
    return digest.hexdigest()


BYTES_SHA256: Final = _bytes_sha256()
"""Fingerprint of the built-in tokenizer "bytes"."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """A text as one tokenizer writes it.

    ids: (n,) int64; offsets: (n, 2) int64, the characters of the text that each token covers, half
    open; name, sha256: which tokenizer.
    """

    ids: TokenIds
    offsets: npt.NDArray[np.int64]
    name: str
    sha256: str


class _Bytes:
    def encode(self, text: str) -> tuple[TokenIds, npt.NDArray[np.int64]]:
        data = text.encode("utf-8")
        ids = np.frombuffer(data, np.uint8).astype(np.int64)
        if len(data) == len(text):
            starts = np.arange(len(data), dtype=np.int64)
        else:
            # A byte that continues a character belongs to the character that began it.
            starts = np.cumsum((ids & 0xC0) != 0x80) - 1
        return ids, np.stack([starts, starts + 1], axis=1)


class _Fast:
    """A tokenizer of transformers, without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def encode(self, text: str) -> tuple[TokenIds, npt.NDArray[np.int64]]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # Below transformers, which sets truncation and padding on a shared object and so is
            # not safe in threads; neither is set here.
            read = backend.encode(text, add_special_tokens=False)
            ids, offsets = read.ids, read.offsets
        else:
            with self._lock:
                ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            offsets = [(0, len(text))] * len(ids)
        return (
            np.asarray(ids, dtype=np.int64),
            np.asarray(offsets, dtype=np.int64).reshape(-1, 2),
        )


class Tokenizers:
    """The tokenizers that a service was set up with.

    sources: name -> alias, folder, GGUF file or hub id, as `adapters.models.load_tokenizer` takes
    it. Methods may be called from several threads.
    """

    def __init__(self, sources: Mapping[str, str] | None = None) -> None:
        self._sources = dict(sources or {})
        if "bytes" in self._sources:
            raise ModelError('the tokenizer "bytes" is built in; give yours another name.')
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[_Bytes | _Fast, str]] = {"bytes": (_Bytes(), BYTES_SHA256)}

    def names(self) -> tuple[str, ...]:
        """The names that can be asked for."""
        return ("bytes", *sorted(self._sources))

    @property
    def only(self) -> str | None:
        """The name of the settings' tokenizer, if they have exactly one; "bytes" is none."""
        return next(iter(self._sources)) if len(self._sources) == 1 else None

    def load(self) -> dict[str, str]:
        """Load all of them; name -> fingerprint, 64 hex digits. Raises ModelError."""
        return {name: self._get(name)[1] for name in self.names()}

    def name_of(self, which: str) -> str:
        """The name of a tokenizer given by name or fingerprint. Raises NoTokenizer if unknown."""
        if which in self._loaded or which in self._sources:
            return which
        for name, (_, sha256) in list(self._loaded.items()):
            if sha256 == which:
                return name
        for name in self._sources:
            if self._get(name)[1] == which:
                return name
        raise NoTokenizer(
            f"this service has no such tokenizer; it has {', '.join(self.names())}. Have it added "
            "to [tokenizers] of the service's settings, or do without it: token ids need none."
        )

    def sha256(self, which: str) -> str:
        """The fingerprint of a tokenizer given by name or fingerprint. Raises ModelError."""
        return self._get(self.name_of(which))[1]

    def encode(self, text: str, which: str) -> Encoded:
        """The ids of a text's NFC form, with offsets into the text as it is given.

        Raises ModelError if unknown, TokenError for what is no Unicode (`contents.content_hash`).
        """
        name = self.name_of(which)
        tokenizer, sha256 = self._get(name)
        form = canonical(text)
        ids, offsets = tokenizer.encode(form.text)
        return Encoded(ids=ids, offsets=form.origins[offsets], name=name, sha256=sha256)

    def _get(self, name: str) -> tuple[_Bytes | _Fast, str]:
        found = self._loaded.get(name)
        if found is not None:
            return found
        with self._lock:
            if name not in self._loaded:
                from filigrane.adapters.models import load_tokenizer

                try:
                    loaded = load_tokenizer(self._sources[name])
                except ModelError as error:
                    raise ModelError(f"[tokenizers] {name}: {error}") from None
                self._loaded[name] = (_Fast(loaded.tokenizer), loaded.tokenizer_sha256)
            return self._loaded[name]
