"""filigrane embed."""

import hashlib
import json as jsonlib
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import numpy as np
import typer

from filigrane.cli import records, render
from filigrane.cli.options import Form, Format, Json, KeyFile, Keyring, User
from filigrane.cli.records import Place, Problem
from filigrane.cli.secrets import for_user, looks_like_key, read_key, refuse_unused_key
from filigrane.embedding import MarkedSampler, Sampling, embed_batch, refuse_unmarkable, stream
from filigrane.errors import FiligraneError, RecordError
from filigrane.keys import MarkingKey
from filigrane.schemes import Gumbel, Scheme, from_tag

if TYPE_CHECKING:
    from filigrane.adapters.models import LoadedModel
    from filigrane.adapters.transformers import TransformersModel

_SAMPLING = "Sampling"
_RECORD_START = b'{"id": '
_SETTINGS = (
    "scheme",
    "key",
    "key_fingerprint",
    "sampling",
    "model",
    "tokenizer_sha256",
    "vocab_size",
)


def embed(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="smollm2, a .gguf file, a transformers folder or a hub id.",
            show_default=False,
        ),
    ],
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            "-s",
            metavar="TAG",
            help="The scheme of the mark, e.g. gumbel; see `filigrane schemes`.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One prompt.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='One prompt a line, or JSON Lines with "prompt" and perhaps "id"; - or nothing '
            "reads stdin.",
            show_default=False,
        ),
    ] = None,
    form: Format = "auto",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt itself: no chat template.")
    ] = False,
    key_file: KeyFile = None,
    keyring: Keyring = None,
    user: User = None,
    unmarked: Annotated[
        bool, typer.Option("--unmarked", help="Write without a mark, as a control.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, rich_help_panel=_SAMPLING)
    ] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 is greedy.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 is off.", rich_help_panel=_SAMPLING)] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="1 is off.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Makes the private randomness repeatable; fresh if not given.",
            rich_help_panel=_SAMPLING,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Prompts written at a time.")
    ] = 8,
    device: Annotated[str, typer.Option("--device", help="Where the model runs.")] = "cpu",
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="JSON Lines file to append to; what is in it already is not written again.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write marked text with a language model.

    --prompt streams to the terminal; --out FILE collects records with tokens, text and everything
    that a detector needs, and continues where an interrupted run stopped. With --json and without
    --out, the records go to stdout, one a line. Neither holds the secret.

    Exit codes: 0 everything written; 2 bad usage, or nothing could be written; 3 some prompts could
    not be read, the others were written; 130 interrupted.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    test, key, fingerprint = _mark(scheme, key_file, keyring, user, unmarked)
    if key is not None:
        refuse_unmarkable(test, sampling)
    if out == "-":
        raise FiligraneError("--out takes a file; --json without --out writes records to stdout.")
    if out is not None and not os.path.isdir(folder := os.path.dirname(out) or "."):
        raise FiligraneError(f"{out}: there is no folder {folder}; make it first.")
    todo, problems = _prompts(prompt, prompts, form)
    facts: dict[str, object] = {
        "scheme": None if key is None else test.tag,
        "key": None if key is None else key.name,
        "key_fingerprint": fingerprint,
        "sampling": {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "chat_template": not raw,
        },
    }
    n_prompts = len(todo)
    made = _Made.read(out) if out is not None else _Made()
    made.check(facts)
    todo = [item for item in todo if item.identity not in made.done]
    skipped = n_prompts - len(todo)
    if skipped:
        render.notice(f"{skipped} of {n_prompts} prompts are in {out} already and are skipped")
    written = 0
    if todo:
        from filigrane.adapters.models import load

        loaded = load(model, device=device)
        from filigrane.adapters.transformers import TransformersModel

        lm = TransformersModel(loaded)
        facts |= {
            "model": loaded.name,
            "tokenizer_sha256": loaded.tokenizer_sha256,
            "vocab_size": loaded.vocab_size,
        }
        made.check(facts)
        writer = _Writer(loaded, lm, test, key, sampling, max_new_tokens, raw, facts)
        if out is None and not json and prompt is not None:
            # Fresh entropy if there is no seed.
            writer.show(todo[0], np.random.default_rng(seed))
            written = 1
        else:
            with _sink(out, made, json=json) as sink:
                written = _write(writer, todo, seed, batch_size, sink, out)
    if json and out is not None:
        render.dump(
            {
                "command": "embed",
                "out": out,
                "written": written,
                "skipped": skipped,
                "errors": [problem.as_json() for problem in problems],
            }
        )
    elif out is not None:
        render.notice(f"{written} {'record' if written == 1 else 'records'} written to {out}")
    if problems:
        raise typer.Exit(3)


def _mark(
    scheme: str | None, key_file: str | None, keyring: str | None, user: int | None, unmarked: bool
) -> tuple[Scheme, MarkingKey | None, str | None]:
    """Scheme, key and the root key's fingerprint; the scheme of no key is never used."""
    if unmarked:
        refuse_unused_key(key_file, keyring)
        if scheme is not None or user is not None:
            raise FiligraneError("--unmarked leaves no mark; drop --scheme and --user.")
        render.warn("--unmarked: no key is used, this text carries no mark")
        return Gumbel(), None, None
    if scheme is None:
        raise FiligraneError("which mark? Pass --scheme, e.g. --scheme gumbel, or --unmarked.")
    test = from_tag(scheme)
    root = read_key(key_file, keyring)
    return test, for_user(root, user), root.fingerprint


# ---------------------------------------------------------------- prompts


@dataclass(frozen=True, slots=True)
class _Prompt:
    number: int
    id: int | str
    text: str
    from_json: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    @property
    def identity(self) -> tuple[int | str, str]:
        return self.id, self.sha256


def _prompts(
    prompt: str | None, path: str | None, form: Form
) -> tuple[list[_Prompt], list[Problem]]:
    if prompt is not None:
        if path is not None:
            raise FiligraneError("--prompt and --prompts both name prompts; use one of them.")
        if not prompt.strip():
            raise FiligraneError("the prompt is empty; say what the model should answer.")
        return [_Prompt(0, 0, prompt, from_json=False)], []
    if path is None and sys.stdin.isatty():
        raise FiligraneError("no prompt: use --prompt TEXT, --prompts FILE, or pipe prompts in.")
    found: list[_Prompt] = []
    problems: list[Problem] = []
    seen: set[int | str] = set()
    # Numbers count what could not be read too: mending a line does not move the others.
    for number, item in enumerate(records.read([path or "-"], form, plain="prompt", by_line=True)):
        checked = item if isinstance(item, Problem) else _prompt(number, item)
        if isinstance(checked, _Prompt) and checked.id in seen:
            assert not isinstance(item, Problem)
            checked = Problem(item.place, '"id" is that of an earlier prompt')
        if isinstance(checked, Problem):
            render.warn(str(checked))
            problems.append(checked)
        else:
            seen.add(checked.id)
            found.append(checked)
    if not found:
        raise RecordError("no prompt could be read; what was wrong with each is said above.")
    return found, problems


def _prompt(number: int, record: records.Record) -> _Prompt | Problem:
    name = records.name_field(record)
    text = records.text_field(record, "prompt")
    if isinstance(name, Problem):
        return name
    if isinstance(text, Problem):
        return text
    if text is None or not text.strip():
        return Problem(record.place, 'has no "prompt"')
    if looks_like_key(text):
        return Problem(record.place, "holds the text of a key; it is not shown to a model")
    return _Prompt(number, number if name is None else name, text, record.from_json)


# ---------------------------------------------------------------- what was made before


class _Made:
    """The records that an output file holds already."""

    def __init__(self) -> None:
        self.done: set[tuple[int | str, str]] = set()
        self._settings: list[tuple[Place, dict[str, object]]] = []
        self._keep: int | None = None
        self._newline = False
        self._path = ""
        self._lines = 0

    @classmethod
    def read(cls, path: str) -> "_Made":
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


# ---------------------------------------------------------------- writing


class _Writer:
    """A model, a mark and the settings they are used with."""

    def __init__(
        self,
        loaded: "LoadedModel",
        lm: "TransformersModel",
        scheme: Scheme,
        key: MarkingKey | None,
        sampling: Sampling,
        max_new_tokens: int,
        raw: bool,
        facts: Mapping[str, object],
    ) -> None:
        self._loaded, self._lm = loaded, lm
        self._scheme, self._key, self._sampling = scheme, key, sampling
        self._max_new_tokens, self._raw, self._facts = max_new_tokens, raw, facts
        # A chat model ends its turn with a token that its tokenizer knows and its weights may not.
        ends = {loaded.tokenizer.eos_token_id, *lm.stop_ids} - {None}
        self._stop = tuple(sorted(ends))

    def _ids(self, text: str) -> Any:
        from filigrane.adapters.models import chat_prompt

        if self._raw:
            return np.asarray(self._loaded.tokenizer(text)["input_ids"], dtype=np.int64)
        return chat_prompt(self._loaded, text)

    def _decode(self, tokens: Any) -> str:
        text: str = self._loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def show(self, prompt: _Prompt, rng: np.random.Generator) -> None:
        """Stream one text to stdout."""
        sampler = MarkedSampler(self._scheme, [self._key], sampling=self._sampling, rng=rng)
        tokens: list[int] = []
        shown = ""
        try:
            for step in stream(
                self._lm, [self._ids(prompt.text)], self._max_new_tokens, sampler, stop=self._stop
            ):
                tokens.append(int(step[0]))
                text = self._decode(tokens)
                # A character may take several tokens; it is shown when it is whole.
                if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    sys.stdout.write(render.clean(text[len(shown) :], keep="\n\t"))
                    sys.stdout.flush()
                    shown = text
            rest = self._decode(tokens)
            sys.stdout.write(render.clean(rest.removeprefix(shown), keep="\n\t"))
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        mark = "no mark"
        n_marked = sum(sampler.marked[0])
        if self._key is not None:
            mark = f"{n_marked} marked, {self._scheme.tag}, key {self._key.name}"
        render.notice(f"{len(tokens)} tokens, {mark}")
        _warn_of_bare(int(self._key is not None and n_marked == 0), 1)

    def batch(
        self, prompts: Sequence[_Prompt], rng: np.random.Generator
    ) -> Iterator[dict[str, object]]:
        """Records of one batch."""
        texts = embed_batch(
            self._lm,
            [self._ids(prompt.text) for prompt in prompts],
            self._max_new_tokens,
            [self._key] * len(prompts),
            self._scheme,
            rng=rng,
            sampling=self._sampling,
            stop=self._stop,
        )
        for prompt, written in zip(prompts, texts, strict=True):
            tokens = written.tokens.tolist()
            stopped = bool(tokens) and tokens[-1] in self._stop
            yield {
                "id": prompt.id,
                "prompt_sha256": prompt.sha256,
                **({"prompt": prompt.text} if prompt.from_json else {}),
                "text": self._decode(tokens),
                "tokens": tokens,
                "n_marked": written.n_marked,
                **self._facts,
                "finish_reason": "stop" if stopped else "length",
            }


def _progress(out: str | None) -> AbstractContextManager[render.Report]:
    """A bar, unless the texts themselves appear in the same terminal."""
    if out is None and sys.stdout.isatty():
        return nullcontext(lambda done, total, what: None)
    return render.progress("prompts")


def _write(
    writer: _Writer,
    todo: Sequence[_Prompt],
    seed: int | None,
    batch_size: int,
    sink: "_Sink",
    out: str | None,
) -> int:
    written = bare = 0
    entropy = secrets.randbits(128) if seed is None else seed
    try:
        with _progress(out) as report:
            report(0, len(todo), "writing")
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                # By number, so that a run that continues does not repeat what the first one drew.
                rng = np.random.default_rng([entropy, batch[0].number])
                made = list(writer.batch(batch, rng))
                sink.put(made)
                written += len(batch)
                bare += sum(row["key"] is not None and row["n_marked"] == 0 for row in made)
                report(written, len(todo), "writing")
    except BaseException:
        if out is not None:
            render.notice(
                f"{written} of {len(todo)} records were written and are safe in {out}; the same "
                "command continues from there"
            )
        raise
    _warn_of_bare(bare, written)
    return written


def _warn_of_bare(bare: int, total: int) -> None:
    """Say it if texts that should carry a mark do not."""
    if bare:
        render.warn(
            f"{bare} of {total} texts carry no mark at all: no token of theirs was marked; "
            "allow more tokens (--max-new-tokens)"
            if total > 1
            else "this text carries no mark at all: no token of it was marked; allow more tokens "
            "(--max-new-tokens)"
        )


class _Sink:
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
def _sink(path: str | None, made: _Made, *, json: bool) -> Iterator[_Sink]:
    if path is None:
        yield _Sink(None, json=json)
        return
    with open(path, "ab") as file:
        made.prepare(file)
        yield _Sink(file, json=json)
