"""What the radioactivity commands read: texts of the marked model, and answers of a suspect.

Files are hashed as they are, so that a report can say what was tested. A prompt that is not known
cannot be kept off the tape, so a text without its prompt is refused rather than scored.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from filigrane.cli import records
from filigrane.cli.records import Problem, Record
from filigrane.cli.texts import same_test
from filigrane.contexts import TokenIds, as_token_ids
from filigrane.errors import FiligraneError, RecordError, SchemeError, TokenError
from filigrane.radioactivity.evidence import Exchange
from filigrane.schemes import Scheme, from_tag

Context = Literal["prompt", "none"]


@dataclass(frozen=True, slots=True)
class Input:
    """A file that went into a test, named without its folder."""

    name: str
    sha256: str
    records: int
    role: str

    def as_json(self) -> dict[str, object]:
        """For results."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "records": self.records,
            "role": self.role,
        }


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text of the marked model; prompt: ids it was asked with, None if there was no prompt."""

    id: int | str
    tokens: TokenIds
    prompt: TokenIds | None
    text: str | None
    vocab_size: int | None
    tokenizer_sha256: str | None
    key_fingerprint: str | None
    encoded: bool
    """Whether its ids had to be made of its text: the writer's may have been others."""


def sha256_of(path: str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}.") from error


def described(path: str, count: int, role: str) -> Input:
    """What a result says of an input file."""
    return Input(Path(path).name, sha256_of(path), count, role)


class Texts:
    """Reads texts; tokenizer: what `load_tokenizer` returned, or None if all records hold ids.

    prompts: a file of the prompts, for records that only hold their hash, as `embed` writes them
    for prompts of a plain text file. scheme: what they are to be tested for; records that say they
    were marked otherwise are refused.
    """

    def __init__(self, tokenizer: Any, prompts: str | None, scheme: Scheme | None = None) -> None:
        self._loaded = tokenizer
        self._scheme = scheme
        self._prompts: dict[str, str] = {}
        if prompts is not None:
            for item in records.read([prompts], "auto", plain="prompt", by_line=True):
                text = _checked(item).fields.get("prompt")
                if isinstance(text, str):
                    self._prompts[hashlib.sha256(text.encode("utf-8")).hexdigest()] = text

    def read(self, path: str, *, prompts: bool = True) -> list[MarkedText]:
        """All texts of a file. Raises RecordError for the first that cannot be used.

        prompts: False where they do not matter; then they may be unknown.
        """
        return [
            self._text(number, _checked(item), prompts)
            for number, item in enumerate(records.read([path], "auto", plain="text"))
        ]

    def _text(self, number: int, record: Record, prompts: bool) -> MarkedText:
        fields, place = record.fields, record.place
        name = _fine(records.name_field(record))
        digest = _fine(records.text_field(record, "tokenizer_sha256"))
        text = _fine(records.text_field(record, "text"))
        self._require_scheme(record)
        owner = _fine(records.text_field(record, "key_fingerprint"))
        size = _fine(records.integer_field(record, "vocab_size"))
        if self._loaded is not None and digest not in (None, self._loaded.tokenizer_sha256):
            raise RecordError(
                f"{place}: was made with another tokenizer than {self._loaded.name}'s; pass the "
                "--tokenizer of the model that wrote it."
            )
        given = fields.get("tokens")
        if given is None and text is None:
            raise RecordError(f'{place}: has neither "tokens" nor "text".')
        if given is None and self._loaded is None:
            raise RecordError(
                f"{place}: is text; name the tokenizer of the model that wrote it (--tokenizer)."
            )
        ids = ids_of(given, size, place) if given is not None else self._encode(str(text))
        prompt = self._prompt(record, size) if prompts else None
        name = number if name is None else name
        return MarkedText(name, ids, prompt, text, size, digest, owner, given is None)

    def _require_scheme(self, record: Record) -> None:
        tag = _fine(records.text_field(record, "scheme"))
        if tag is None or self._scheme is None:
            return
        try:
            other = from_tag(tag)
        except SchemeError as error:
            raise RecordError(f"{record.place}: its scheme is not one that is known here.") from (
                error
            )
        if not same_test(other, self._scheme):
            raise RecordError(
                f"{record.place}: was marked with another scheme; pass --scheme {other.tag} "
                f"(now {self._scheme.tag})."
            )

    def _prompt(self, record: Record, size: int | None) -> TokenIds | None:
        given = record.fields.get("prompt_tokens")
        if given is not None:
            return ids_of(given, size, record.place)
        if not {"prompt", "prompt_sha256"} & record.fields.keys():
            raise RecordError(
                f"{record.place}: says nothing of its prompt, and what the writer saw there must "
                'not be scored. Add "prompt", or "prompt": null if there was none.'
            )
        prompt = _fine(records.text_field(record, "prompt"))
        digest = _fine(records.text_field(record, "prompt_sha256"))
        if prompt is None and digest is not None:
            prompt = self._prompts.get(digest)
            if prompt is None:
                raise RecordError(
                    f"{record.place}: its prompt is not known, and what the writer saw there must "
                    "not be scored. Pass the prompts (--prompts FILE)."
                )
        if prompt is None:
            return None
        if self._loaded is None:
            raise RecordError(
                f"{record.place}: its prompt is text; name the tokenizer of the model that wrote "
                "it (--tokenizer)."
            )
        from filigrane.adapters.models import chat_prompt

        return chat_prompt(self._loaded, prompt)

    def _encode(self, text: str) -> TokenIds:
        return encode(self._loaded, text)


def encode(loaded: Any, text: str) -> TokenIds:
    """A text's ids, without special tokens."""
    return as_token_ids(
        loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    )


def exchanges(path: str, loaded: Any) -> tuple[list[Exchange], int, tuple[str, Any]]:
    """Answers of a suspect as ids of the marked model, how many had to be tokenised again, and who.

    loaded: the marked model's tokenizer. Ids that an endpoint gave are used where that tokenizer
    reads them as the very answer; otherwise its text is encoded. The request's windows are those
    of system prompt and prompt, encoded as the start of a text and as its continuation.
    """
    found: list[Exchange] = []
    suspects: dict[tuple[str, Any], None] = {}
    again = 0
    for item in records.read([path], "jsonl", plain="answer"):
        record = _checked(item)
        answer = _fine(records.text_field(record, "answer"))
        if answer is None:
            raise RecordError(
                f'{record.place}: has no "answer"; this is not a file that `filigrane '
                "radioactivity collect` wrote."
            )
        suspects[str(record.fields.get("model")), record.fields.get("endpoint")] = None
        asked = [
            encode(loaded, before + text)
            for field in ("system", "prompt")
            if (text := _fine(records.text_field(record, field)))
            for before in ("", " ")
        ]
        sent = record.fields.get("prompt_tokens")
        if sent is not None:
            asked.append(ids_of(sent, None, record.place))
        given = record.fields.get("tokens")
        ids = None if given is None else ids_of(given, None, record.place)
        if ids is None or loaded.tokenizer.decode(ids, skip_special_tokens=True) != answer:
            ids, again = encode(loaded, answer), again + 1
        prompt = np.concatenate(asked) if asked else np.empty(0, dtype=np.int64)
        found.append(Exchange(prompt=prompt, answer=ids))
    if not found:
        raise RecordError(f"{path} holds no answers; collect some first.")
    if len(suspects) > 1:
        names = ", ".join(sorted({model for model, _ in suspects}))
        raise RecordError(
            f"{path} holds answers of {len(suspects)} suspects ({names}); test each on its own."
        )
    return found, again, next(iter(suspects))


def ids_of(value: object, vocab_size: int | None, place: object) -> TokenIds:
    """A JSON list as ids. Raises RecordError."""
    # JSON knows no token ids: true, 1.0 and "1" would all convert to one.
    if not isinstance(value, list) or any(type(token) is not int for token in value):
        raise RecordError(f"{place}: its tokens are not a list of integers.")
    try:
        return as_token_ids(value, vocab_size)
    except TokenError as error:
        raise RecordError(f"{place}: {error}") from error


def _checked(item: Record | Problem) -> Record:
    if isinstance(item, Problem):
        raise RecordError(f"{item}; mend it or take it out: a test is of all of a file or of none.")
    return item


def _fine(value: Any) -> Any:
    if isinstance(value, Problem):
        raise RecordError(f"{value}.")
    return value


def each(files: Sequence[str]) -> Iterator[str]:
    """The files, refusing stdin: what is hashed has to stay."""
    for path in files:
        if path == "-":
            raise FiligraneError("stdin cannot be named in a report; pass a file.")
        yield path
