"""From records to token ids for detect and trace, with the checks that prevent silent failure.

Ids mean nothing without their tokenizer, and a mark nothing without its scheme: a record that says
what it was made with is held to it.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from filigrane.cli import records, render
from filigrane.cli.options import Form
from filigrane.cli.records import Place, Problem, Record
from filigrane.cli.secrets import looks_like_key
from filigrane.contexts import Corpus, TokenIds, as_token_ids
from filigrane.errors import FiligraneError, SchemeError, TokenError
from filigrane.schemes import Scheme, from_tag

_KEY_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}(/[0-9]{1,20})?")


@dataclass(frozen=True, slots=True)
class Text:
    """One text to test; prompt: the ids before it, if the record has them."""

    place: Place
    id: int | str | None
    tokens: TokenIds
    key: str | None
    key_fingerprint: str | None
    prompt: TokenIds | None = None


def sources(files: Sequence[str] | None) -> list[str]:
    """The inputs named, or stdin; raises FiligraneError if that would wait for a keyboard."""
    if files:
        return list(files)
    if sys.stdin.isatty():
        raise FiligraneError("no input: name files, pipe text in, or give - to type it.")
    return ["-"]


class Reader:
    """Reads texts; tokenizer is a model's name, loaded once (without weights), or None.

    scheme: what records are held to; None for marks of other tools, whose prompts are read as well.
    """

    def __init__(
        self,
        scheme: Scheme | None,
        *,
        tokenizer: str | None,
        vocab_size: int | None,
        retokenize: bool,
    ) -> None:
        self._scheme = scheme
        self._vocab_size = vocab_size
        self._retokenize = retokenize
        self._loaded: Any = None
        if tokenizer is not None:
            from filigrane.adapters.models import load_tokenizer

            self._loaded = load_tokenizer(tokenizer)

    def read(self, files: Sequence[str], form: Form) -> Iterator[Text | Problem]:
        """All texts, in order, and what could not be read."""
        for item in records.read(files, form, plain="text"):
            yield item if isinstance(item, Problem) else self._text(item)

    def _text(self, record: Record) -> Text | Problem:
        name = records.name_field(record)
        size = records.integer_field(record, "vocab_size")
        text = records.text_field(record, "text")
        fingerprint = records.text_field(record, "key_fingerprint")
        for field in (name, size, text, fingerprint, self._mismatch(record)):
            if isinstance(field, Problem):
                return field
        # Servers call them token_ids (return_token_ids).
        given = record.fields.get("tokens", record.fields.get("token_ids"))
        before = record.fields.get("prompt_tokens") if self._scheme is None else None
        try:
            prompt = None if before is None else _ids(before, size, "prompt_tokens")  # type: ignore[arg-type]
            if given is not None and not (self._retokenize and isinstance(text, str)):
                tokens = _ids(given, _smaller(size, self._vocab_size))
            elif not isinstance(text, str):
                return Problem(record.place, 'has neither "tokens" nor "text"')
            elif self._loaded is None:
                return Problem(
                    record.place, "is text; name the model's tokenizer (--tokenizer MODEL)"
                )
            else:
                tokens = as_token_ids(self._encode(text), _smaller(size, self._vocab_size))
        except TokenError as error:
            return Problem(record.place, str(error))
        return Text(record.place, name, tokens, _key_name(record), fingerprint, prompt)  # type: ignore[arg-type]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._loaded.tokenizer(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def _mismatch(self, record: Record) -> Problem | None:
        """What the record says it was made with, against what is used here."""
        place = record.place
        tag = records.text_field(record, "scheme")
        digest = records.text_field(record, "tokenizer_sha256")
        size = record.fields.get("vocab_size")
        for field in (tag, digest):
            if isinstance(field, Problem):
                return field
        if isinstance(tag, str):
            try:
                other = from_tag(tag)
            except SchemeError:
                return Problem(place, '"scheme" is not one that is known here')
            if self._scheme is None:
                return Problem(
                    place, f"was marked by filigrane itself: pass --scheme {other.tag} instead"
                )
            if not same_test(other, self._scheme):
                return Problem(
                    place,
                    f"was marked with another scheme: pass --scheme {other.tag} "
                    f"(now {self._scheme.tag})",
                )
        if self._loaded is not None and digest not in (None, self._loaded.tokenizer_sha256):
            return Problem(
                place,
                f"was made with another tokenizer than {self._loaded.name}'s: pass the --tokenizer "
                "of its own model",
            )
        if self._vocab_size is not None and size not in (None, self._vocab_size):
            return Problem(
                place, f"states a vocabulary of {size}, --vocab-size is {self._vocab_size}"
            )
        return None


def _ids(value: object, vocab_size: int | None, field: str = "tokens") -> TokenIds:
    # JSON knows no token ids: true, 1.0 and "1" would all convert to one.
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise TokenError(f'"{field}" is not a list of integers')
    return as_token_ids(value, vocab_size)


def _key_name(record: Record) -> str | None:
    """The name of the key that a record says it was written for, if it is one."""
    value = record.fields.get("key")
    # It is going to be shown: nothing but a name will do, and a key's text least of all.
    if not isinstance(value, str) or not _KEY_NAME.fullmatch(value) or looks_like_key(value):
        return None
    return value


def _forgotten(counts: Mapping[str, int], names: Sequence[str], hint: str) -> str:
    """What to say if records were written for keys, by name, that are not tested."""
    first = next(iter(counts))
    others = f" and {len(counts) - 1} others" if len(counts) > 1 else ""
    root, _, index = first.rpartition("/")
    add = f" (add {hint.format(index)})" if [root] == list(names) and not others else ""
    return (
        f"{sum(counts.values())} of the records say that they were written for {first}{others}; "
        f"this run tests {', '.join(names)}{add}"
    )


def _smaller(first: object, second: int | None) -> int | None:
    given = [size for size in (first, second) if isinstance(size, int)]
    return min(given, default=None)


def same_test(one: Scheme, other: Scheme) -> bool:
    """Whether two schemes are tested in the same way; a green list's delta does not matter."""
    a, b = one.statistic, other.statistic
    return (
        one.label == other.label
        and (a.kind, a.threshold) == (b.kind, b.threshold)
        and np.array_equal(a.table, b.table)
    )


class Batch:
    """The texts of one run, tested one by one or together, and the problems met on the way."""

    def __init__(self, reader: Reader, files: Sequence[str], form: Form, *, joint: bool) -> None:
        self._reader, self._files, self._form, self._joint = reader, files, form, joint
        self.problems: list[Problem] = []

    def claims(
        self, fingerprints: Sequence[str], names: Sequence[str] | None, *, hint: str
    ) -> Iterator[tuple[str, list[Text]]]:
        """What is to be tested as one: a label and its texts. Problems are told and collected.

        fingerprints and names: of the keys in use; a warning says if texts name others. names is
        None if those of users are not known yet; hint: the option to add, {} for the user.
        """
        together: list[Text] = []
        others: dict[str, int] = {}
        forgotten: dict[str, int] = {}
        for item in self._reader.read(self._files, self._form):
            if isinstance(item, Problem):
                self.reject(item)
                continue
            if item.key_fingerprint is not None and item.key_fingerprint not in fingerprints:
                others[item.key_fingerprint] = others.get(item.key_fingerprint, 0) + 1
            elif names is not None and item.key is not None and item.key not in names:
                forgotten[item.key] = forgotten.get(item.key, 0) + 1
            if self._joint:
                together.append(item)
            else:
                yield str(item.place), [item]
        if together:
            noun = "text" if len(together) == 1 else "texts"
            yield f"{len(together)} {noun} as one claim", together
        for fingerprint, count in others.items():
            render.warn(
                f"{count} of the records say that they were written under another key "
                f"(fingerprint {fingerprint})"
            )
        if forgotten and names is not None:
            render.warn(_forgotten(forgotten, names, hint))

    def reject(self, problem: Problem) -> None:
        """Tell and remember a problem."""
        # Remembered first: an interruption while it is told must not lose it.
        self.problems.append(problem)
        render.warn(str(problem))


def tokens_of(texts: Sequence[Text]) -> TokenIds | Corpus:
    """What the core takes: one text, or several as one claim."""
    return texts[0].tokens if len(texts) == 1 else Corpus(text.tokens for text in texts)


def as_json(label: str, texts: Sequence[Text]) -> dict[str, object]:
    """Where a claim came from, for --json."""
    if len(texts) == 1:
        place = texts[0].place
        return {"source": place.source, "line": place.line, "id": texts[0].id}
    return {"source": label, "line": None, "id": None, "texts": len(texts)}
