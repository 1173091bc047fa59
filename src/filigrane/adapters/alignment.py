"""A suspect with another tokenizer: where both tokenizers cut, and which tokens spell the same.

Knows nothing of keys, schemes or models. Windows and marks live on the writer's tokens, predictions
on the suspect's. What precedes a prediction is tokenised with both, without what follows (see
`reading`: what follows is marked, and must not choose what counts); where a token of the writer
ends at the same byte as one of the suspect, the suspect's law stands for a law on the writer's
tokens: each of those gets the probability of the suspect's tokens with the very same bytes. What
has no counterpart is left out, which costs power and never validity.

Bytes come from the vocabularies themselves, because offsets count characters and a token may hold
a part of one.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from filigrane.adapters.models import LoadedModel, LoadedTokenizer
from filigrane.contexts import TokenIds, as_token_ids
from filigrane.errors import EvidenceError

__all__ = ["Aligned", "Alignment", "AlignmentReport", "Vocabulary"]

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_INSTEAD: Final = (
    "Test the suspect's answers instead (closed mode), re-tokenised with the writer's tokenizer."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentReport:
    """How much of the text and of the suspect's laws has survived.

    positions, aligned: tokens of the writer that were read, and those that end where one of the
    suspect ends; mass: mean probability, over the positions read, of the suspect's tokens that have
    a counterpart, None if none was read yet.
    """

    positions: int
    aligned: int
    mass: float | None

    @property
    def rate(self) -> float:
        """Share of positions that are aligned; 0 for no text."""
        return self.aligned / self.positions if self.positions else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Aligned:
    """One text in the suspect's tokens.

    tokens: (m,) the suspect's ids; rows: (n,) int64, for each token of the writer the index in
    `tokens` of the last one that ends where it does, -1 if there is none.
    """

    tokens: TokenIds
    rows: npt.NDArray[np.int64]


class Vocabulary:
    """The bytes that each id of a fast tokenizer stands for.

    spelled: id -> bytes, special tokens left out; special: id -> what a special token is called.
    Raises EvidenceError for tokenizers whose tokens cannot be spelled in bytes.
    """

    __slots__ = ("pads_first", "size", "special", "spelled")

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise EvidenceError(
                "alignment takes a fast tokenizer, with a tokenizer.json; this one has none. "
                + _INSTEAD
            )
        description = json.loads(backend.to_str())
        spell = _Spelling(description)
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        vocabulary = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
        self.special: dict[int, str] = {
            i: token.content for i, token in added.items() if token.special
        }
        self.special |= {
            int(i): str(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.all_special_ids
        }
        self.spelled: dict[int, bytes] = {}
        for token, number in vocabulary.items():
            if number in self.special:
                continue
            if number in added:
                self.spelled[number] = added[number].content.encode("utf-8", "replace")
            elif (data := spell(token)) is not None:
                self.spelled[number] = data
        self.size = max(vocabulary.values(), default=-1) + 1
        self.pads_first = spell.marker is not None


class _Spelling:
    """How the strings in a tokenizer's vocabulary stand for bytes, read off its decoder."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.marker: str | None = None
        self._bytewise = self._fallback = False
        model = description.get("model") or {}
        for decoder in _flat(description.get("decoder")):
            kind = decoder.get("type")
            if kind == "ByteLevel":
                self._bytewise = True
            elif kind == "Metaspace":
                self.marker = decoder.get("replacement", "▁")
            elif kind == "Replace" and decoder.get("content") == " ":
                self.marker = (decoder.get("pattern") or {}).get("String")
            elif kind == "ByteFallback":
                self._fallback = True
        self._fallback |= bool(model.get("byte_fallback"))
        if not self._bytewise and self.marker is None:
            raise EvidenceError(
                f"alignment knows byte-level and sentencepiece tokenizers; this one "
                f"({model.get('type')}) is neither. {_INSTEAD}"
            )

    def __call__(self, token: str) -> bytes | None:
        if self._bytewise:
            try:
                return bytes(_BYTES[character] for character in token)
            except KeyError:
                return None
        if self._fallback and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace(self.marker or "▁", " ").encode("utf-8", "replace")


def _flat(decoder: Any) -> list[dict[str, Any]]:
    if not decoder:
        return []
    if decoder.get("type") == "Sequence":
        return [inner for part in decoder["decoders"] for inner in _flat(part)]
    return [decoder]


def _byte_characters() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable bytes are themselves, others follow 255."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + number): byte for number, byte in enumerate(rest)
    }


_BYTES: Final = _byte_characters()


class Alignment:
    """Two tokenizers side by side; it also counts what was read through it.

    writer: the tokenizer of the model whose mark is tested; suspect: that of the model that is
    read. vocab_size: of the writer's ids (default: the width of its logits if writer is a loaded
    model, else the size of its tokenizer). limit: share of positions that must be aligned.
    mapping: (V_B,) int64, the writer's id for each id of the suspect, vocab_size where there is
    none; an ordinary token that the writer has twice counts as its lowest id.
    """

    def __init__(
        self,
        writer: LoadedTokenizer | LoadedModel,
        suspect: LoadedTokenizer | LoadedModel,
        *,
        vocab_size: int | None = None,
        limit: float = 0.5,
    ) -> None:
        if not 0.0 <= limit <= 1.0:
            raise ValueError(f"limit is a share of positions, 0 to 1; got {limit}.")
        own = writer.vocab_size if isinstance(writer, LoadedModel) else writer.tokenizer_size
        self.vocab_size = vocab_size or own
        self.writer_sha256, self.suspect_sha256 = (
            writer.tokenizer_sha256,
            suspect.tokenizer_sha256,
        )
        self.limit = limit
        self._tokenizer = suspect.tokenizer
        self._mine, self._theirs = Vocabulary(writer.tokenizer), Vocabulary(suspect.tokenizer)
        shared = set(self._mine.special.values()) & set(self._theirs.special.values())
        # A special token that both have is shown to the suspect as such; others it would only read
        # as odd characters, so they are left out.
        self._pieces = {
            number: name.encode() if name in shared else b""
            for number, name in self._mine.special.items()
        } | self._mine.spelled
        self.mapping = self._map()
        self._positions = self._aligned = self._read = 0
        self._mass = 0.0

    def _map(self) -> npt.NDArray[np.int64]:
        ordinary: dict[bytes, int] = {}
        for number, data in sorted(self._mine.spelled.items(), reverse=True):
            if data and number < self.vocab_size:
                ordinary[data] = number
        named = {
            name: number
            for number, name in sorted(self._mine.special.items(), reverse=True)
            if number < self.vocab_size
        }
        mapping = np.full(self._theirs.size, self.vocab_size, dtype=np.int64)
        for number, data in self._theirs.spelled.items():
            mapping[number] = ordinary.get(data, self.vocab_size)
        for number, name in self._theirs.special.items():
            if number < mapping.shape[0]:
                mapping[number] = named.get(name, self.vocab_size)
        return mapping

    def align(self, tokens: npt.ArrayLike) -> Aligned:
        """Tokenise a text of the writer, (n,) ids, anew with the suspect's tokenizer."""
        ids = as_token_ids(tokens)
        pieces = [self._pieces.get(token, b"") for token in ids.tolist()]
        if self._mine.pads_first:
            # The space before the first word is a convention of this family, not part of the text.
            first = next((i for i, piece in enumerate(pieces) if ids[i] in self._mine.spelled), -1)
            if first >= 0 and pieces[first].startswith(b" "):
                pieces[first] = pieces[first][1:]
        ends = np.cumsum([len(piece) for piece in pieces]).astype(np.int64)
        text, origin = _decode(b"".join(pieces))
        theirs, borders = self._encode(text)
        inside = origin[np.maximum(borders, 0)]
        borders = np.where(borders < 0, -1, inside)
        last = np.full(int(ends[-1]) + 1 if ends.size else 1, -1, dtype=np.int64)
        valid = np.flatnonzero(borders >= 0)
        np.maximum.at(last, borders[valid], valid)
        return Aligned(tokens=theirs, rows=last[ends] if ends.size else np.empty(0, np.int64))

    def _encode(self, text: str) -> tuple[TokenIds, npt.NDArray[np.int64]]:
        """The suspect's ids (m,) and the byte at which each ends, -1 where that is not sure."""
        encoded = self._tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        raw = text.encode()
        borders: list[int] = []
        end, begun = 0, 0
        for number, token in enumerate(ids):
            piece = self._theirs.spelled.get(token)
            if piece is None:  # special, or an id without bytes
                name = self._theirs.special.get(token, "").encode()
                if name and raw.startswith(name, end) and offsets[number][1] > offsets[number][0]:
                    end += len(name)
            elif raw.startswith(piece, end):
                end += len(piece)
            elif piece[:1] == b" " and raw.startswith(piece[1:], end):
                end += len(piece) - 1  # a space that the tokenizer put before a word
            else:
                break  # it has changed the text
            borders.append(end)
            if end > (borders[-2] if number else 0):
                begun = number + 1
        if len(borders) < len(ids) or end != len(raw):
            return _ids(ids), _by_offsets(offsets, text)
        # What was put after the text (an end-of-text token) is not for the suspect to see.
        kept = begun or len(ids)
        return _ids(ids[:kept]), np.asarray(borders[:kept], dtype=np.int64)

    def require(self, texts: Sequence[npt.ArrayLike]) -> None:
        """Raise EvidenceError if fewer positions of these texts than `limit` can be aligned."""
        positions = aligned = 0
        for text in texts:
            rows = self.align(text).rows
            positions += rows.shape[0]
            aligned += int((rows >= 0).sum())
        self._positions, self._aligned = positions, aligned
        if positions and aligned < self.limit * positions:
            raise EvidenceError(
                f"only {aligned / positions:.1%} of the positions can be aligned with the "
                f"suspect's tokenizer; at least {self.limit:.0%} are asked for. {_INSTEAD}"
            )

    def count(self, positions: int, mass: float) -> None:
        """Remember that laws were read, and how much of them in sum has a counterpart."""
        self._read += positions
        self._mass += mass

    def summary(self) -> AlignmentReport:
        """What the texts that `require` saw last, and all laws that were counted, came to."""
        return AlignmentReport(
            positions=self._positions,
            aligned=self._aligned,
            mass=self._mass / self._read if self._read else None,
        )


def _ids(tokens: Sequence[int]) -> TokenIds:
    return np.asarray(tokens, dtype=np.int64)


def _decode(data: bytes) -> tuple[str, npt.NDArray[np.int64]]:
    """The text of bytes, and for each byte of its UTF-8 form where it stood in `data`.

    Returns (len + 1,) int64; what is no UTF-8 (generated text may end inside a character) becomes
    replacement characters, and -1 inside them.
    """
    parts: list[str] = []
    origin: list[npt.NDArray[np.int64]] = []
    begin = 0
    while begin < len(data):
        try:
            parts.append(data[begin:].decode())
            origin.append(np.arange(begin, len(data), dtype=np.int64))
            break
        except UnicodeDecodeError as error:
            good, bad = begin + error.start, begin + error.end
        parts += [data[begin:good].decode(), "\N{REPLACEMENT CHARACTER}"]
        origin += [np.arange(begin, good, dtype=np.int64), np.array([good, -1, -1])]
        begin = bad
    origin.append(np.array([len(data)]))
    return "".join(parts), np.concatenate(origin)


def _by_offsets(offsets: Sequence[tuple[int, int]], text: str) -> npt.NDArray[np.int64]:
    """Where tokens end, in bytes, if the tokenizer has changed the text before it cut it.

    A border counts if no other token holds a part of the same character.
    """
    sizes = np.cumsum([0] + [len(character.encode()) for character in text])
    borders = np.full(len(offsets), -1, dtype=np.int64)
    for number, (start, end) in enumerate(offsets):
        following = [begin for begin, stop in offsets[number + 1 : number + 2] if stop > begin]
        if end > start and all(begin >= end for begin in following):
            borders[number] = sizes[end]
    return borders
