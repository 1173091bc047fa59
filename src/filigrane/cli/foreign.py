"""filigrane detect --profile: marks that other tools wrote."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text as Styled

from filigrane.cli import render, texts
from filigrane.cli.options import Form
from filigrane.cli.records import Problem
from filigrane.cli.secrets import FILE_VARIABLE, looks_like_key, read_key
from filigrane.errors import FiligraneError, KeyFormatError, VocabularyMismatch

if TYPE_CHECKING:
    from filigrane.foreign import AutoResult, ForeignKey, ForeignResult, Profile
    from filigrane.keys import Key, MarkingKey

AnyScheme = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        "-s",
        metavar="TAG",
        help="The scheme of the mark, e.g. gumbel or greenlist:gamma=0.5,delta=3; "
        "see `filigrane schemes`.",
        show_default=False,
    ),
]
ProfileTag = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="TAG",
        help="Another tool's mark, e.g. vllm-gumbel or synthid-hf:ngram_len=5; auto tries all that "
        "fit the key and corrects for it.",
        show_default=False,
    ),
]

_AUTO: Final = "auto"
_NUMBER: Final = re.compile(r"(0x)?[0-9a-fA-F, ]{1,400}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignOptions:
    """What `filigrane detect` was told, for a mark of another tool."""

    key_file: str | None
    keyring: str | None
    user: int | None
    alpha: float
    joint: bool
    tokenizer: str | None
    retokenize: bool
    vocab_size: int | None
    form: Form
    json: bool


@dataclass(frozen=True, slots=True)
class _Row:
    label: str
    where: dict[str, object]
    n_tokens: int
    reading: "ForeignResult"
    log_pvalue: float
    n_candidates: int
    skipped: Mapping[str, str]

    def verdict(self, alpha: float) -> str:
        if not self.reading.n_scored:
            return "too short"
        return "mark found" if self.found(alpha) else "no mark found"

    def found(self, alpha: float) -> bool:
        return self.reading.n_scored > 0 and self.log_pvalue <= math.log(alpha)


def detect_foreign(tag: str, files: list[str], options: ForeignOptions) -> None:
    """Test texts for another tool's mark; exit codes as for `filigrane detect`."""
    from filigrane.foreign import from_tag

    profile = None if tag.strip() == _AUTO else from_tag(tag, vocab_size=options.vocab_size)
    keys = _keys(options, profile)
    root = _root(options)
    reader = texts.Reader(
        None,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        retokenize=options.retokenize,
    )
    batch = texts.Batch(reader, files, options.form, joint=options.joint)
    rows: list[_Row] = []
    interrupted = False
    fingerprints = [] if root is None else [root.fingerprint]
    with render.progress("texts") as report:
        try:
            for label, members in batch.claims(fingerprints, None, hint="--user {}"):
                row = _row(label, members, profile, keys, options, batch)
                if row is not None:
                    rows.append(row)
                report(len(rows), None, label)
        except KeyboardInterrupt:
            interrupted = True
    if rows or options.json:
        _show(rows, batch, tag, root, options, complete=not interrupted)
    if interrupted:
        raise KeyboardInterrupt
    if not rows:
        raise FiligraneError("no text could be tested; what was wrong with each is said above.")
    if batch.problems:
        raise typer.Exit(3)
    if not all(row.found(options.alpha) for row in rows):
        raise typer.Exit(1)


def _row(
    label: str,
    members: list[texts.Text],
    profile: "Profile | None",
    keys: "list[ForeignKey] | list[MarkingKey]",
    options: ForeignOptions,
    batch: texts.Batch,
) -> _Row | None:
    from filigrane.foreign import Written, read_auto

    where = texts.as_json(label, members)
    size = sum(len(text.tokens) for text in members)
    claim = [Written(tokens=text.tokens, prompt=text.prompt) for text in members]
    try:
        if profile is None:
            auto: AutoResult = read_auto(claim, keys, vocab_size=options.vocab_size)
            return _Row(
                label, where, size, auto.best, auto.log_pvalue, auto.n_candidates, auto.skipped
            )
        reading = profile.read(claim, keys[0])  # type: ignore[arg-type]
    except VocabularyMismatch as error:
        batch.reject(Problem(members[0].place, str(error)))
        return None
    return _Row(label, where, size, reading, reading.log_pvalue, 1, {})


def _path(options: ForeignOptions) -> str | None:
    """The key file that is named, by option or environment."""
    if options.key_file is not None and options.keyring is not None:
        raise KeyFormatError("--key-file and --keyring both name a key; use one of them.")
    if options.key_file is not None or options.keyring is not None:
        return options.key_file
    return os.environ.get(FILE_VARIABLE) or None


def _root(options: ForeignOptions) -> "Key | None":
    """The filigrane key that is named, if it is one."""
    from filigrane.foreign.keys import load_any
    from filigrane.keys import Key

    path = _path(options)
    if path is None:
        return read_key(None, options.keyring)
    if not os.path.exists(path):
        # A number instead of a path may be the key itself: it is not repeated.
        shown = "the key file" if looks_like_key(path) or _NUMBER.fullmatch(path) else path
        raise KeyFormatError(
            f"{shown}: there is no such file; a key is never an argument, write it into a file "
            "that only you can read (chmod 600) and pass its path"
        )
    loaded = load_any(path)
    return loaded if isinstance(loaded, Key) else None


def _keys(
    options: ForeignOptions, profile: "Profile | None"
) -> "list[ForeignKey] | list[MarkingKey]":
    from filigrane.cli.secrets import for_user
    from filigrane.foreign import ForeignKey
    from filigrane.foreign.keys import load_any

    root = _root(options)
    if root is not None:
        key = for_user(root, options.user)
        return [key] if profile is None else [ForeignKey.derive(key, profile)]
    if options.user is not None:
        raise KeyFormatError(
            "--user goes with a filigrane key, and this file holds another tool's; drop --user."
        )
    path = _path(options)
    assert path is not None  # else there was a root, or an error
    if profile is not None:
        return [ForeignKey.load(path, profile.key_form)]
    found = load_any(path)
    if isinstance(found, tuple):
        return list(found)
    marking: list[MarkingKey] = [found]
    return marking


def _show(
    rows: list[_Row],
    batch: texts.Batch,
    tag: str,
    root: "Key | None",
    options: ForeignOptions,
    *,
    complete: bool,
) -> None:
    from filigrane.stats import holm

    alpha = options.alpha
    tested = [row for row in rows if row.reading.n_scored]
    logs = [row.log_pvalue for row in tested]
    adjusted = holm(logs).tolist() if logs else []
    after = {id(row): value / math.log(10) for row, value in zip(tested, adjusted, strict=True)}
    found = [row.found(alpha) for row in rows]
    n_holm = sum(value <= math.log10(alpha) for value in after.values())
    if options.json:
        summary = {
            "texts": len(rows),
            "tested": len(tested),
            "found": found.count(True),
            "found_after_holm": n_holm,
            "not_found": len(tested) - found.count(True),
            "too_short": len(rows) - len(tested),
            "errors": len(batch.problems),
            "complete": complete,
        }
        head: dict[str, object] = {
            "command": "detect",
            "key": None if root is None else root.name,
            "key_fingerprint": None if root is None else root.fingerprint,
            "profile": tag,
            "alpha": alpha,
        }
        results = [row.where | _fields(row, after.get(id(row)), alpha) for row in rows]
        errors = [problem.as_json() for problem in batch.problems]
        render.dump(head | {"results": results, "errors": errors, "summary": summary})
        return
    out = render.stdout()
    several = len(tested) > 1
    columns = ["text", "tokens", "scored", "log10 p"]
    columns += ["Holm"] if several else []
    numbers = columns[1:]
    columns += ["profile"] if tag.strip() == _AUTO else []
    grid = render.table(*columns, "verdict", right=numbers)
    for row in rows:
        cells = [render.shorten(row.label, 30), str(row.n_tokens), str(row.reading.n_scored)]
        cells.append(render.log10(row.log_pvalue / math.log(10)) if row.reading.n_scored else "")
        if several:
            cells.append(render.log10(after[id(row)]) if id(row) in after else "")
        if tag.strip() == _AUTO:
            cells.append(row.reading.profile.partition(":")[0])
        words = row.verdict(alpha)
        style = {"mark found": "green", "too short": "yellow"}.get(words, "")
        grid.add_row(*map(Styled, cells), Styled(words, style=style))
    out.print(grid)
    for warning in dict.fromkeys(w for row in rows for w in row.reading.warnings):
        render.warn(warning)
    if tag.strip() == _AUTO:
        # "No mark found" must not stand for profiles that were never read.
        left_out = dict.fromkeys(
            n for row in rows for n, why in row.skipped.items() if "vocab" in why
        )
        if left_out:
            render.warn(
                f"not tried: {', '.join(left_out)}; these need --vocab-size, the width of the "
                "model's logits."
            )
    parts = [
        f"{len(tested)} tested",
        f"{found.count(True)} with a mark at alpha {alpha:g} per text",
    ]
    if several:
        parts.append(f"{n_holm} after Holm")
    if len(tested) < len(rows):
        parts.append(f"{len(rows) - len(tested)} too short")
    if batch.problems:
        parts.append(f"{len(batch.problems)} not readable")
    if tag.strip() == _AUTO:
        parts.append(f"{max(row.n_candidates for row in rows)} profiles and keys tried, corrected")
    parts.append(f"key {rows[0].reading.key}")
    out.print(Styled(", ".join(parts), style="dim"))
    out.print(Styled(f"a foreign mark {rows[0].reading.assurance}", style="dim"))


def _fields(row: _Row, after: float | None, alpha: float) -> dict[str, object]:
    reading = row.reading
    return {
        "tokens": row.n_tokens,
        "scored": reading.n_scored,
        "dropped": dict(reading.dropped),
        "statistic": reading.statistic,
        "log10_pvalue": row.log_pvalue / math.log(10) + 0.0,
        "log10_pvalue_holm": None if after is None else after + 0.0,
        "n_candidates": row.n_candidates,
        "not_tried": dict(row.skipped),
        "profile": reading.profile,
        "key": reading.key,
        "tool_reports": dict(reading.compat),
        "warnings": list(reading.warnings),
        "method": reading.method,
        "assurance": reading.assurance,
        "found": row.found(alpha),
        "verdict": row.verdict(alpha),
    }
