"""filigrane embed."""

import hashlib
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from filigrane.cli import records, render
from filigrane.cli.embed_records import DRAFT_SETTINGS, Made, Sink, open_sink
from filigrane.cli.options import Form, Format, Json, KeyFile, Keyring, User
from filigrane.cli.records import Problem
from filigrane.cli.secrets import for_user, looks_like_key, read_key, refuse_unused_key
from filigrane.embedding import (
    Generated,
    MarkedSampler,
    Sampling,
    embed_batch,
    refuse_unmarkable,
    stream,
)
from filigrane.errors import FiligraneError, RecordError
from filigrane.keys import MarkingKey
from filigrane.schemes import Gumbel, Scheme, from_tag

if TYPE_CHECKING:
    from filigrane.adapters.models import LoadedModel
    from filigrane.adapters.transformers import TransformersModel
    from filigrane.cli.embed_drafts import Drafts

_SAMPLING = "Sampling"
_DRAFTS = "Speculative sampling"


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
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="MODEL|ngram|skip:LAYERS",
            help="Write several tokens per call of the model, drafted by a smaller one of the same "
            "vocabulary; by the text so far; or by the model without some layers, as "
            "skip:5,12,17,26.",
            rich_help_panel=_DRAFTS,
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="How drafts are judged, e.g. otmc or pfr:drafts=4. otmc for gumbel, plain for "
            "--unmarked if not given.",
            rich_help_panel=_DRAFTS,
            show_default=False,
        ),
    ] = None,
    draft_length: Annotated[
        int | None,
        typer.Option(
            "--draft-length",
            metavar="K",
            help="Tokens drafted per call of the model, 1 to 64; 4 if not given.",
            rich_help_panel=_DRAFTS,
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
    --out, the records go to stdout, one a line. Neither holds the secret. With --draft the
    model reads several tokens per call; the law of the text and how its mark is found stay the
    same.

    Exit codes: 0 everything written; 2 bad usage, or nothing could be written; 3 some prompts could
    not be read, the others were written; 130 interrupted.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    test, key, fingerprint = _mark(scheme, key_file, keyring, user, unmarked)
    if key is not None:
        refuse_unmarkable(test, sampling)
    from filigrane.cli import embed_drafts

    drafting = embed_drafts.choose(draft, method, draft_length, test, marked=key is not None)
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
    made = Made.read(out) if out is not None else Made()
    # A field that a record lacks is None: no drafts are a setting, too.
    made.check(facts | (dict.fromkeys(DRAFT_SETTINGS) if drafting is None else drafting.settings))
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
        drafts = None if drafting is None else drafting.load(loaded, lm, device)
        if drafts is not None:
            facts |= drafts.settings
        made.check(facts)
        writer = _Writer(loaded, lm, drafts, test, key, sampling, max_new_tokens, raw, facts)
        entropy = secrets.randbits(128) if seed is None else seed
        if out is None and not json and prompt is not None:
            writer.show(todo[0], _randomness(entropy, todo[0]))
            written = 1
        else:
            with open_sink(out, made, json=json) as sink:
                written = _write(writer, todo, entropy, batch_size, sink, out)
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


# ---------------------------------------------------------------- writing


class _Writer:
    """A model, perhaps with a draft, a mark and the settings they are used with."""

    def __init__(
        self,
        loaded: "LoadedModel",
        lm: "TransformersModel",
        drafts: "Drafts | None",
        scheme: Scheme,
        key: MarkingKey | None,
        sampling: Sampling,
        max_new_tokens: int,
        raw: bool,
        facts: Mapping[str, object],
    ) -> None:
        self._loaded, self._lm, self._drafts = loaded, lm, drafts
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
        ids = self._ids(prompt.text)
        speed = ""
        if self._drafts is None:
            sampler = MarkedSampler(self._scheme, [self._key], sampling=self._sampling, rng=rng)
            steps = stream(self._lm, [ids], self._max_new_tokens, sampler, stop=self._stop)
            n_tokens = self._echo([int(step[0])] for step in steps)
            n_marked = sum(sampler.marked[0])
        else:
            session = self._drafts.session(
                [ids], self._max_new_tokens, self._key, rng, self._sampling, self._stop
            )
            n_tokens = self._echo(step[0].tolist() for step in session)
            text = session.results()[0]
            n_marked = text.n_marked
            speed = f", {text.tokens_per_call:.2f} tokens per target call"
        mark = "no mark"
        if self._key is not None:
            mark = f"{n_marked} marked, {self._scheme.tag}, key {self._key.name}"
        render.notice(f"{n_tokens} tokens, {mark}{speed}")
        _warn_of_bare(int(self._key is not None and n_marked == 0), 1)

    def _echo(self, steps: Iterable[list[int]]) -> int:
        """Show tokens as they come; returns how many came."""
        tokens: list[int] = []
        shown = ""
        try:
            for step in steps:
                tokens += step
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
        return len(tokens)

    def batch(
        self, prompts: Sequence[_Prompt], rng: np.random.Generator
    ) -> Iterator[dict[str, object]]:
        """Records of one batch."""
        texts, calls = self._generate([self._ids(prompt.text) for prompt in prompts], rng)
        for prompt, written, speed in zip(prompts, texts, calls, strict=True):
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
                **speed,
                "finish_reason": "stop" if stopped else "length",
            }

    def _generate(
        self, prompts: Sequence[Any], rng: np.random.Generator
    ) -> tuple[Sequence[Generated], list[dict[str, object]]]:
        """Texts, and what else their records say of each."""
        if self._drafts is None:
            texts = embed_batch(
                self._lm,
                prompts,
                self._max_new_tokens,
                [self._key] * len(prompts),
                self._scheme,
                rng=rng,
                sampling=self._sampling,
                stop=self._stop,
            )
            return texts, [{} for _ in texts]
        drafted = self._drafts.generate(
            prompts, self._max_new_tokens, self._key, rng, self._sampling, self._stop
        )
        return drafted, [{"tokens_per_call": text.tokens_per_call} for text in drafted]


def _randomness(entropy: int, first: _Prompt) -> np.random.Generator:
    """Of a batch, by number: a run that continues does not repeat what the first one drew."""
    return np.random.default_rng([entropy, first.number])


def _progress(out: str | None) -> AbstractContextManager[render.Report]:
    """A bar, unless the texts themselves appear in the same terminal."""
    if out is None and sys.stdout.isatty():
        return nullcontext(lambda done, total, what: None)
    return render.progress("prompts")


def _write(
    writer: _Writer,
    todo: Sequence[_Prompt],
    entropy: int,
    batch_size: int,
    sink: Sink,
    out: str | None,
) -> int:
    written = bare = 0
    try:
        with _progress(out) as report:
            report(0, len(todo), "writing")
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                made = list(writer.batch(batch, _randomness(entropy, batch[0])))
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
