"""filigrane radioactivity test."""

import contextlib
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from filigrane.cli import render
from filigrane.cli.detect import check_alpha
from filigrane.cli.options import Json, KeyFile, Keyring, SchemeTag, User
from filigrane.cli.radioactivity_inputs import described, each, exchanges
from filigrane.cli.secrets import for_user, read_key
from filigrane.errors import EvidenceError, FiligraneError, RecordError
from filigrane.schemes import from_tag

if TYPE_CHECKING:
    from filigrane.radioactivity.evidence import Tuples, Weighted
    from filigrane.radioactivity.filter import WindowFilter

Statistic = Literal["auto", "argmax", "soft", "differential"]
_HOW = "How"


def test(
    evidence: Annotated[
        list[str],
        typer.Argument(
            metavar="EVIDENCE",
            help="Folders that `radioactivity read` wrote, or answers that `collect` did.",
            show_default=False,
        ),
    ],
    scheme: SchemeTag,
    supervision: Annotated[
        Literal["supervised", "unsupervised"],
        typer.Option(
            "--supervision",
            help="Whether the texts, or the prompts, are logged ones that the suspect may have "
            "been trained on.",
        ),
    ] = "unsupervised",
    key_file: KeyFile = None,
    keyring: Keyring = None,
    user: User = None,
    alpha: Annotated[
        float, typer.Option("--alpha", help="The mark is found if p is at most this.")
    ] = 1e-5,
    statistic: Annotated[
        Statistic,
        typer.Option(
            "--statistic",
            help="Of readings; auto: differential where there is a base model, else argmax. The "
            "others are shown and do not count.",
            rich_help_panel=_HOW,
        ),
    ] = "auto",
    window_filter: Annotated[
        str | None,
        typer.Option(
            "--filter",
            metavar="FILE",
            help="Of answers, score only windows of this filter.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "-t",
            metavar="MODEL",
            help="Of the model whose mark is tested; needed for answers.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    combination: Annotated[
        Literal["none", "holm", "fisher", "stouffer"],
        typer.Option(
            "--combine",
            help="What makes one p-value of several pieces of evidence; holm is always valid, the "
            "others need independent ones.",
            rich_help_panel=_HOW,
        ),
    ] = "none",
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Also follow the e-value of answers: it may be looked at while they come in.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    decoys: Annotated[
        int,
        typer.Option("--decoys", help="Control keys beside the true one.", rich_help_panel=_HOW),
    ] = 200,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the control keys.", rich_help_panel=_HOW)
    ] = 0,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="EVIDENCE",
            help="The same from a model that is known to be clean; its p-values are shown.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="FILE",
            help="What `radioactivity baseline --json` said, for the report.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Keep the whole result as JSON, for `radioactivity report`.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Was the suspect trained on text marked with this key? A p-value, with its controls.

    Choose evidence, statistic, filter and rule of combination before looking: what was chosen
    after a look has no p-value.

    Exit codes: 0 found at --alpha, 1 not found, 2 bad usage or evidence that does not fit.
    """
    check_alpha(alpha)
    if len(evidence) > 1 and combination == "none":
        raise FiligraneError(
            f"{len(evidence)} pieces of evidence need a rule, declared now: --combine holm."
        )
    test_scheme = from_tag(scheme)
    root = read_key(key_file, keyring)
    key = for_user(root, user)
    from filigrane.radioactivity import follow, testing
    from filigrane.radioactivity.evidence import Tuples
    from filigrane.study import documents

    loader = _Loader(test_scheme.context_width, tokenizer, window_filter, statistic)
    pieces = [loader.load(path, "evidence") for path in each(evidence)]
    controls = [loader.load(path, "control") for path in each(control or [])]
    found = None if baseline is None else _baseline(baseline)
    first = pieces[0]
    for path, piece in zip(evidence, pieces, strict=True):
        if piece.owners and root.fingerprint not in piece.owners:
            render.warn(f"the texts of {path} say that they were marked with another key")
    kinds = {piece.suspect["access"] for piece in pieces}
    if len({str((piece.suspect, piece.base)) for piece in pieces}) > len(kinds):
        raise EvidenceError(
            "these pieces of evidence are of different suspects or base models; test each suspect "
            "on its own."
        )
    if combination in ("fisher", "stouffer") and _overlap([piece.tests[0] for piece in pieces]):
        raise EvidenceError(
            f"these pieces of evidence share windows and tokens, so their p-values are not "
            f"independent, which {combination} needs; use --combine holm."
        )
    results: list[dict[str, Any]] = []
    clean: list[dict[str, Any]] = []
    total = sum(len(piece.tests) for piece in [*pieces, *controls])
    with render.progress("tests") as report:
        for place, piece in [*((results, p) for p in pieces), *((clean, p) for p in controls)]:
            for number, item in enumerate(piece.tests):
                report(len(results) + len(clean), total, item.name)
                outcome = testing.test(item, key, test_scheme, decoys=decoys, seed=seed)
                sequence = None
                if sequential and isinstance(item, Tuples) and item.name.startswith("answer"):
                    sequence = follow(item, key, test_scheme)
                place.append(
                    documents.result(outcome, alpha, primary=number == 0, sequence=sequence)
                )
    document = documents.document(
        results,
        alpha=alpha,
        combination=combination,
        key={"name": key.name, "fingerprint": root.fingerprint},
        scheme=test_scheme.tag,
        suspect=first.suspect,
        base=first.base,
        supervision=supervision,
        inputs=[*loader.inputs],
        control=clean,
        baseline=found,
        alignment=first.alignment,
        retokenized=any(piece.retokenized for piece in pieces),
        seed=seed,
    )
    if out is not None:
        from filigrane.adapters.evidence import replacing

        with replacing(Path(out)) as file:
            file.write(jsonlib.dumps(document, indent=1, allow_nan=False).encode())
    if json:
        render.dump(document)
    else:
        _show(document)
        if out is not None:
            render.notice(f"kept in {out}; next: filigrane radioactivity report {out}")
    if not document["verdict"]:
        raise typer.Exit(1)


class _Piece:
    """One piece of evidence: its tests, the one that counts first, and what it is from."""

    def __init__(self, tests: "list[Tuples | Weighted]") -> None:
        self.tests = tests
        self.suspect: dict[str, Any] = {}
        self.base: dict[str, Any] | None = None
        self.alignment: dict[str, Any] | None = None
        self.retokenized = False
        self.owners: set[str] = set()


class _Loader:
    """Makes tests of folders and files, and remembers what it read."""

    def __init__(
        self, width: int, tokenizer: str | None, filter_path: str | None, statistic: Statistic
    ) -> None:
        self._width, self._statistic = width, statistic
        self._loaded: Any = None
        if tokenizer is not None:
            from filigrane.adapters.models import load_tokenizer

            self._loaded = load_tokenizer(tokenizer)
        self.inputs: list[dict[str, object]] = []
        self._filter: WindowFilter | None = None
        if filter_path is not None:
            from filigrane.adapters.evidence import load_filter, require_match

            self._filter = load_filter(filter_path)
            digest = None if self._loaded is None else self._loaded.tokenizer_sha256
            require_match(self._filter, width, digest)
            self.inputs.append(described(filter_path, len(self._filter), "filter").as_json())

    def load(self, path: str, role: str) -> _Piece:
        if not Path(path).exists():
            raise RecordError(f"{path}: there is no such folder or file.")
        return self._reading(path) if Path(path).is_dir() else self._answers(path, role)

    def _reading(self, path: str) -> _Piece:
        from filigrane import radioactivity as ra
        from filigrane.adapters.evidence import ReadingFolder

        folder = ReadingFolder(path)
        settings = folder.settings
        if "inputs" not in settings:
            raise RecordError(
                f"{path} is a reading of a study, which has tested it already (results.jsonl)."
            )
        reading = folder.load()
        wanted = sum(item["records"] for item in settings["inputs"])
        if folder.done < wanted:
            raise RecordError(
                f"{path} holds {folder.done} of {wanted} texts; finish it with the same "
                "`filigrane radioactivity read` command first."
            )
        if reading.width != self._width:
            raise EvidenceError(
                f"{path} was read for windows of {reading.width} tokens, the scheme looks at "
                f"{self._width}; read the texts again with --scheme of that width."
            )
        if self._filter is not None:
            raise EvidenceError("--filter is for answers; a reading scores windows of the texts.")
        makers: dict[str, Any] = {
            "argmax": ra.argmax,
            "soft": ra.soft,
            "differential": ra.differential,
        }
        first = self._statistic
        if first == "auto":
            first = "argmax" if reading.base is None else "differential"
        piece = _Piece([makers.pop(first)(reading)])
        for maker in makers.values():
            with contextlib.suppress(EvidenceError):  # the others are only shown
                piece.tests.append(maker(reading))
        piece.suspect, piece.base = settings["suspect"], settings["base"]
        piece.alignment = folder.notes.get("alignment")
        piece.owners = set(settings.get("key_fingerprints", ()))
        piece.retokenized = settings.get("encoded", 0) > 0
        self.inputs += settings["inputs"]
        return piece

    def _answers(self, path: str, role: str) -> _Piece:
        from filigrane.radioactivity import answers

        if self._loaded is None:
            raise FiligraneError(
                f"{path} holds answers; name the tokenizer of the model whose mark is tested "
                "(--tokenizer MODEL)."
            )
        found, again, (model, endpoint) = exchanges(path, self._loaded)
        size = self._loaded.tokenizer_size
        highest = max((int(item.answer.max(initial=0)) for item in found), default=0)
        if highest >= size:
            raise EvidenceError(
                f"{path} holds token id {highest}, the tokenizer knows {size}: its ids are of "
                "another tokenizer."
            )
        piece = _Piece([answers(found, self._width, window_filter=self._filter)])
        if self._filter is not None:
            with contextlib.suppress(EvidenceError):
                piece.tests.append(answers(found, self._width))
        piece.retokenized = again > 0
        piece.suspect = {
            "name": model,
            "access": "closed",
            "vocab_size": None,
            "tokenizer_sha256": None,
            "weights_sha256": None,
            "endpoint": endpoint,
        }
        role = "answers" if role == "evidence" else role
        self.inputs.append(described(path, len(found), role).as_json())
        return piece


def _overlap(tests: "list[Tuples | Weighted]") -> bool:
    """Whether two pieces score one token after one window: one keyed number in two p-values."""
    import numpy as np

    from filigrane.radioactivity.evidence import Tuples
    from filigrane.radioactivity.rules import first_rows

    cells = []
    for item in tests:
        if isinstance(item, Tuples):
            cells.append(item.rows)
        else:
            windows = np.repeat(item.windows, np.diff(item.starts), axis=0)
            cells.append(np.concatenate([windows, item.tokens[:, None]], axis=1))
    total = sum(rows.shape[0] for rows in cells)
    return bool(first_rows(np.concatenate(cells)).shape[0] < total)


def _baseline(path: str) -> dict[str, Any]:
    try:
        found = jsonlib.loads(Path(path).read_text("utf-8"))
        return dict(found["result"])
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{path} is not what `filigrane radioactivity baseline --json` writes."
        ) from error


def _effect(row: dict[str, Any]) -> str:
    """Points of a share, or the score's own unit."""
    if row["effect_unit"] == "share of green tokens":
        return f"{100 * row['effect']:+.2f} points"
    return f"{row['effect']:+.4f}"


def _show(document: dict[str, Any]) -> None:
    out = render.stdout()
    columns = ("statistic", "scored", "windows", "effect", "log10 p", "decoys above")
    grid = render.table(*columns, right=columns[1:])
    rows = [("", row) for row in document["results"]]
    rows += [("control: ", row) for row in document["control"]]
    for prefix, row in rows:
        name = prefix + row["statistic"] + ("" if row["primary"] else " (not counted)")
        control = row["decoys"]
        grid.add_row(
            *map(
                Text,
                (
                    name,
                    str(row["n_scored"]),
                    str(row["n_windows"]),
                    _effect(row),
                    render.log10(row["log10_pvalue"]),
                    "" if control is None else f"{control['rank']}/{control['n']}",
                ),
            )
        )
    out.print(grid)
    dropped = ", ".join(
        f"{count} {rule}" for rule, count in document["results"][0]["ledger"].items()
    )
    out.print(Text(f"positions: {dropped}", style="dim"))
    for row in document["results"]:
        if (seen := row["sequential"]) is not None:
            at = "not reached" if seen["decided_at"] is None else f"after {seen['decided_at']}"
            out.print(f"e-value: log10 {seen['log10_e_max']:.1f} at most; 1 / alpha {at} scored")
    combined, alpha = document["combined"], document["alpha"]
    verdict = "found" if document["verdict"] else "not found"
    rule = "" if combined["of"] == 1 else f" ({combined['method']} of {combined['of']})"
    out.print(
        Text(
            f"trace of the key {document['key']['name']} {verdict}: log10 p "
            f"{render.log10(combined['log10_pvalue'])}{rule} at alpha {alpha:g}",
            style="bold green" if document["verdict"] else "bold",
        )
    )
    if not document["verdict"]:
        more = document["results"][0]["needed"]["n_scored"]
        hint = "" if more is None else f"; at this effect it would take about {more} positions"
        render.notice(f"not finding a trace does not show that there is none{hint}")
