"""filigrane trace."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text as Styled

from filigrane.cli import render, texts
from filigrane.cli.detect import check_alpha
from filigrane.cli.options import (
    Files,
    Format,
    Joint,
    Json,
    KeyFiles,
    Keyring,
    Retokenize,
    SchemeTag,
    Tokenizer,
    VocabSize,
)
from filigrane.cli.secrets import read_keys
from filigrane.errors import FiligraneError, TooShort
from filigrane.keys import MAX_INDEX, MarkingKey, UserKeys
from filigrane.schemes import from_tag

if TYPE_CHECKING:
    from filigrane.tracing import TraceResult

_SHOWN = 3
_MOST: Final = 10**12  # years of work for one machine, and sizes that still fit everywhere


@dataclass(frozen=True, slots=True)
class _Row:
    label: str
    where: dict[str, object]
    n_tokens: int
    result: "TraceResult | None"  # None: too short to be tested

    def named(self, alpha: float) -> tuple[str, ...]:
        return () if self.result is None else self.result.named(alpha)


def trace(
    scheme: SchemeTag,
    files: Files = None,
    key_file: KeyFiles = None,
    keyring: Keyring = None,
    users: Annotated[
        str | None,
        typer.Option(
            "--users",
            metavar="N|A:B",
            help="Candidates: users 0 to N-1, or A to B-1, of the root key. Without it the keys of "
            "several --key-file are the candidates.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            "--alpha",
            help="Chance that anybody innocent is named, whole list of candidates; per text.",
        ),
    ] = 1e-6,
    joint: Joint = False,
    tokenizer: Tokenizer = None,
    retokenize: Retokenize = False,
    vocab_size: VocabSize = None,
    form: Format = "auto",
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Threads; all processors if not given."),
    ] = None,
    json: Json = False,
) -> None:
    """Find who, among many candidates, a text was written for, or say that it was nobody.

    Every p-value is corrected for all candidates.

    Exit codes: 0 somebody is named for every text; 1 nobody for at least one (or too short); 2 bad
    usage, or nothing could be read; 3 some records could not be read, the others were traced; 130
    interrupted.
    """
    check_alpha(alpha)
    test = from_tag(scheme)
    inputs = texts.sources(files)
    roots = read_keys(key_file or [], keyring)
    keys: UserKeys | Sequence[MarkingKey] = roots
    if users is not None:
        if len(roots) > 1:
            raise FiligraneError("--users are those of one root key; pass one --key-file.")
        keys = roots[0].users(_range(users))
    fingerprints = [root.fingerprint for root in roots]
    # With --users, which of them it was is the question.
    names = [root.name for root in roots] if users is None else None
    reader = texts.Reader(test, tokenizer=tokenizer, vocab_size=vocab_size, retokenize=retokenize)
    from filigrane.tracing import trace as run

    batch = texts.Batch(reader, inputs, form, joint=joint)
    rows: list[_Row] = []
    interrupted = False
    with render.progress("keys") as report:
        try:
            for label, members in batch.claims(fingerprints, names, hint="--users N"):
                where = texts.as_json(label, members)
                result = None

                def show(done: int, total: int, what: str = label) -> None:
                    report(done, total, what)

                with contextlib.suppress(TooShort):
                    tokens = texts.tokens_of(members)
                    result = run(tokens, keys, test, workers=jobs, progress=show)
                size = sum(len(text.tokens) for text in members)
                rows.append(_Row(label, where, size, result))
        except KeyboardInterrupt:
            interrupted = True
    head: dict[str, object] = {
        "command": "trace",
        "keys": len(keys),
        "key_fingerprints": fingerprints,
        "scheme": test.tag,
        "alpha": alpha,
    }
    # Without --users a name need not be unique, a fingerprint is.
    marks = [] if users is not None else fingerprints
    if json:
        _dump(rows, batch, head, alpha, marks, complete=not interrupted)
    elif rows:
        _show(rows, batch, len(keys), alpha, marks)
    if interrupted:
        raise KeyboardInterrupt
    if not rows:
        raise FiligraneError("no text could be traced; what was wrong with each is said above.")
    if batch.problems:
        raise typer.Exit(3)
    if not all(row.named(alpha) for row in rows):
        raise typer.Exit(1)


def _range(text: str) -> range:
    first, colon, last = text.partition(":")
    ends = [first, last] if colon else ["0", first]
    if not all(end.strip().isascii() and end.strip().isdigit() for end in ends):
        raise FiligraneError("--users takes a number N or a range A:B (A to B-1), e.g. 100000.")
    start, stop = (int(end) if len(end) < 40 else MAX_INDEX + 2 for end in ends)
    if not start < stop <= MAX_INDEX + 1:
        raise FiligraneError(
            f"--users {text} has nobody in it or leaves the indices 0 to 2**64 - 1."
        )
    if stop - start > _MOST:
        raise FiligraneError(
            f"--users {text} are more than {_MOST} keys at once; trace them in ranges (A:B)."
        )
    return range(start, stop)


def _dump(
    rows: list[_Row],
    batch: texts.Batch,
    head: dict[str, object],
    alpha: float,
    marks: list[str],
    *,
    complete: bool,
) -> None:
    results: list[dict[str, object]] = []
    for row in rows:
        fields: dict[str, object] = {"tokens": row.n_tokens, "scored": 0, "verdict": "too short"}
        result = row.result
        if result is not None:
            names = result.named(alpha)
            fields = {
                "tokens": result.n_tokens,
                "scored": result.n_scored,
                "repeated": result.n_repeated,
                "method": result.method,
                "verdict": "named" if names else "nobody",
            }
        candidates = [
            {
                "name": candidate.name,
                "log10_pvalue": candidate.log_pvalue / math.log(10) + 0.0,
                "statistic": candidate.statistic,
            }
            | ({"key_fingerprint": marks[candidate.index]} if marks else {})
            for candidate in ([] if result is None else result.candidates)
        ]
        named = list(row.named(alpha))
        results.append(row.where | fields | {"named": named, "candidates": candidates})
    n_named = sum(bool(row.named(alpha)) for row in rows)
    summary = {
        "texts": len(rows),
        "named": n_named,
        "nobody": sum(row.result is not None for row in rows) - n_named,
        "too_short": sum(row.result is None for row in rows),
        "errors": len(batch.problems),
        "complete": complete,
    }
    errors = [problem.as_json() for problem in batch.problems]
    render.dump(head | {"results": results, "errors": errors, "summary": summary})


def _show(
    rows: list[_Row], batch: texts.Batch, n_keys: int, alpha: float, marks: list[str]
) -> None:
    out = render.stdout()
    for row in rows:
        result = row.result
        label = render.shorten(row.label, max(16, out.width - 40))
        if result is None:
            out.print(Styled(f"{label}: "), Styled("too short", style="yellow"), sep="")
            continue
        names = row.named(alpha)
        verdict = Styled(", ".join(map(render.clean, names)) or "nobody")
        verdict.stylize("bold green" if names else "bold")
        out.print(Styled(f"{label}: "), verdict, sep="", soft_wrap=True)
        out.print(Styled(f"  {result.n_tokens} tokens, {result.n_scored} scored", style="dim"))
        columns = ["candidate", "statistic", "log10 p, corrected"]
        columns += ["fingerprint"] if marks else []
        grid = render.table("", *columns, "", right=columns[1:3])
        # All that are named, even if they are more than are usually shown.
        for rank, candidate in enumerate(result.candidates[: max(_SHOWN, len(names))]):
            cells = [
                f"  {rank + 1}",
                render.shorten(candidate.name, max(16, out.width - 56)),
                f"{candidate.statistic:.1f}",
                render.log10(candidate.log_pvalue / math.log(10)),
                *([marks[candidate.index]] if marks else []),
            ]
            word = Styled("named", style="green") if rank < len(names) else Styled("")
            grid.add_row(*map(Styled, cells), word)
        out.print(grid)
        if len(names) == len(result.candidates) < n_keys:
            render.warn(f"{row.label}: everybody shown is named; there may be more")
    n_named = sum(bool(row.named(alpha)) for row in rows)
    n_tested = sum(row.result is not None for row in rows)
    parts = [
        f"{n_tested} traced among {n_keys} {'key' if n_keys == 1 else 'keys'}",
        f"{n_named} with a name at family-wise alpha {alpha:g} per text",
    ]
    if n_tested < len(rows):
        parts.append(f"{len(rows) - n_tested} too short")
    if batch.problems:
        parts.append(f"{len(batch.problems)} not readable")
    out.print(Styled(", ".join(parts), style="dim"))
