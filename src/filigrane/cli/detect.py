"""filigrane detect."""

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text as Styled

from filigrane.cli import render, texts
from filigrane.cli.foreign import AnyScheme, ForeignOptions, ProfileTag, detect_foreign
from filigrane.cli.options import (
    Files,
    Format,
    Joint,
    Json,
    KeyFile,
    Keyring,
    Retokenize,
    Tokenizer,
    User,
    VocabSize,
)
from filigrane.cli.secrets import for_user, read_key
from filigrane.errors import FiligraneError, TooShort
from filigrane.schemes import from_tag

if TYPE_CHECKING:
    from filigrane.detection import DetectionResult

_VERDICTS = {
    True: ("mark found", "green"),
    False: ("no mark found", ""),
    None: ("too short", "yellow"),
}


@dataclass(frozen=True, slots=True)
class _Row:
    label: str
    where: dict[str, object]
    n_tokens: int
    result: "DetectionResult | None"  # None: too short to be tested

    def found(self, alpha: float) -> bool | None:
        return None if self.result is None else self.result.log_pvalue <= math.log(alpha)


def detect(
    files: Files = None,
    scheme: AnyScheme = None,
    profile: ProfileTag = None,
    key_file: KeyFile = None,
    keyring: Keyring = None,
    user: User = None,
    alpha: Annotated[
        float,
        typer.Option("--alpha", help="A mark is found if p is at most this; per text."),
    ] = 1e-6,
    joint: Joint = False,
    tokenizer: Tokenizer = None,
    retokenize: Retokenize = False,
    vocab_size: VocabSize = None,
    form: Format = "auto",
    json: Json = False,
) -> None:
    """Test texts for a key's mark, with an exact p-value for each.

    The mark is one of filigrane's (--scheme) or another tool's (--profile); for the latter a key
    file holds that tool's own key, or a filigrane key from which it was derived.

    --alpha holds for each text on its own. With several texts there is also a column "Holm": log10
    p corrected for all texts of the run.

    Exit codes: 0 a mark in every text; 1 at least one text without (or too short); 2 bad usage, or
    nothing could be read; 3 some records could not be read, the others were tested; 130
    interrupted.
    """
    check_alpha(alpha)
    if (scheme is None) == (profile is None):
        raise FiligraneError(
            "name one mark: --scheme TAG for filigrane's own (`filigrane schemes` lists them), or "
            "--profile NAME for another tool's (docs/interop.md lists them; auto tries all)."
        )
    if profile is not None:
        detect_foreign(
            profile,
            texts.sources(files),
            ForeignOptions(
                key_file=key_file,
                keyring=keyring,
                user=user,
                alpha=alpha,
                joint=joint,
                tokenizer=tokenizer,
                retokenize=retokenize,
                vocab_size=vocab_size,
                form=form,
                json=json,
            ),
        )
        return
    test = from_tag(scheme or "")
    inputs = texts.sources(files)
    root = read_key(key_file, keyring)
    key = for_user(root, user)
    reader = texts.Reader(test, tokenizer=tokenizer, vocab_size=vocab_size, retokenize=retokenize)
    from filigrane.detection import detect as run

    batch = texts.Batch(reader, inputs, form, joint=joint)
    rows: list[_Row] = []
    interrupted = False
    with render.progress("texts") as report:
        try:
            for label, members in batch.claims([root.fingerprint], [key.name], hint="--user {}"):
                where = texts.as_json(label, members)
                result = None
                with contextlib.suppress(TooShort):
                    result = run(texts.tokens_of(members), key, test)
                size = sum(len(text.tokens) for text in members)
                rows.append(_Row(label, where, size, result))
                report(len(rows), None, label)
        except KeyboardInterrupt:
            interrupted = True
    head = {
        "command": "detect",
        "key": key.name,
        "key_fingerprint": root.fingerprint,
        "scheme": test.tag,
        "alpha": alpha,
    }
    if rows or json:
        _show(rows, batch, head, alpha, json=json, complete=not interrupted)
    if interrupted:
        raise KeyboardInterrupt
    if not rows:
        raise FiligraneError("no text could be tested; what was wrong with each is said above.")
    if batch.problems:
        raise typer.Exit(3)
    if not all(row.found(alpha) for row in rows):
        raise typer.Exit(1)


def check_alpha(alpha: float) -> None:
    """Raise FiligraneError unless 0 < alpha < 1."""
    if not 0.0 < alpha < 1.0:
        raise FiligraneError(f"--alpha must be inside (0, 1), got {alpha}; a usual value is 1e-6.")


def _show(
    rows: list[_Row],
    batch: texts.Batch,
    head: dict[str, object],
    alpha: float,
    *,
    json: bool,
    complete: bool,
) -> None:
    from filigrane.stats import holm

    logs = [row.result.log_pvalue for row in rows if row.result is not None]
    adjusted = iter([float(value) / math.log(10) for value in holm(logs)] if logs else [])
    after = [None if row.result is None else next(adjusted) for row in rows]
    found = [row.found(alpha) for row in rows]
    n_holm = sum(value is not None and value <= math.log10(alpha) for value in after)
    if json:
        results = [
            row.where | _fields(row, value, verdict)
            for row, value, verdict in zip(rows, after, found, strict=True)
        ]
        summary = {
            "texts": len(rows),
            "tested": len(logs),
            "found": found.count(True),
            "found_after_holm": n_holm,
            "not_found": found.count(False),
            "too_short": found.count(None),
            "errors": len(batch.problems),
            "complete": complete,
        }
        errors = [problem.as_json() for problem in batch.problems]
        render.dump(head | {"results": results, "errors": errors, "summary": summary})
        return
    out = render.stdout()
    several = len(logs) > 1
    columns = ["text", "tokens", "scored", "statistic", "log10 p"]
    columns += ["Holm"] if several else []
    grid = render.table(*columns, "verdict", right=columns[1:])
    width = max(16, out.width - (66 if several else 57))
    for row, value, verdict in zip(rows, after, found, strict=True):
        words, style = _VERDICTS[verdict]
        cells = [render.shorten(row.label, width), str(row.n_tokens)]
        if row.result is None or value is None:
            cells += ["0", "", ""] + [""] * several
        else:
            result = row.result
            cells += [str(result.n_scored), f"{result.statistic:.1f}"]
            cells += [render.log10(result.log10_pvalue)] + [render.log10(value)] * several
        grid.add_row(*map(Styled, cells), Styled(words, style=style))
    out.print(grid)
    parts = [f"{len(logs)} tested", f"{found.count(True)} with a mark at alpha {alpha:g} per text"]
    if several:
        parts.append(f"{n_holm} after Holm")
    if len(logs) < len(rows):
        parts.append(f"{len(rows) - len(logs)} too short")
    if batch.problems:
        parts.append(f"{len(batch.problems)} not readable")
    parts.append(f"key {head['key']}")
    out.print(Styled(", ".join(parts), style="dim"))


def _fields(row: _Row, after: float | None, verdict: bool | None) -> dict[str, object]:
    result = row.result
    words = _VERDICTS[verdict][0]
    if result is None:
        return {"tokens": row.n_tokens, "scored": 0, "found": False, "verdict": words}
    return {
        "tokens": result.n_tokens,
        "scored": result.n_scored,
        "repeated": result.n_repeated,
        "statistic": result.statistic,
        "log10_pvalue": result.log10_pvalue + 0.0,
        "log10_pvalue_holm": None if after is None else after + 0.0,
        "slot_log10_pvalues": [value / math.log(10) + 0.0 for value in result.slot_log_pvalues],
        "method": result.method,
        "found": bool(verdict),
        "verdict": words,
    }
