"""filigrane bench tradeoff."""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from filigrane.cli import records, render
from filigrane.cli.options import Form, Format, Json
from filigrane.errors import FiligraneError, RecordError

if TYPE_CHECKING:
    from filigrane.bench.tradeoff import Prompt

_WHAT = "What is written"
_SAMPLING = "Sampling"
# name: or name@scheme: begins a method; parameter=value alone goes on with the one before.
_PARAMETER = re.compile(r"\s*\w+\s*=")


def tradeoff(
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="MODEL",
            help="Whose text it is: smollm2, a .gguf file, a transformers folder or a hub id.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Run directory: new, or of the same settings, to go on with it.",
            show_default=False,
        ),
    ],
    draft: Annotated[
        str,
        typer.Option(
            "--draft",
            metavar="MODEL|ngram|skip:LAYERS",
            help="A smaller model of the same vocabulary; the text so far; or the target without "
            "some layers, as skip:5,12,17,26.",
        ),
    ] = "ngram",
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help="Methods: otmc, or with a parameter pfr:drafts=4, or a scheme mws@tournament.",
            rich_help_panel=_WHAT,
        ),
    ] = "watermark,plain,mws,mse,skt,otmc",
    draft_lengths: Annotated[
        str,
        typer.Option(
            "--draft-lengths",
            metavar="K,...",
            help="Draft tokens per target call.",
            rich_help_panel=_WHAT,
        ),
    ] = "1,2,3,4",
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="summarise|open-ended|FILE",
            help="Built-in prompts, or a file as for `embed --prompts`.",
            rich_help_panel=_WHAT,
        ),
    ] = "open-ended",
    form: Format = "auto",
    prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts",
            min=1,
            help="Use the first N of them; all if not given.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", min=1, help="Texts per prompt, each with a key.", rich_help_panel=_WHAT
        ),
    ] = 1,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, rich_help_panel=_SAMPLING)
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, rich_help_panel=_SAMPLING)
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 is off.", rich_help_panel=_SAMPLING)] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="1 is off.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Texts written at a time.")
    ] = 8,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option("--dtype", help="The checkpoint's own if not given.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where the models run.")] = "cpu",
    replay: Annotated[
        int,
        typer.Option(
            "--replay",
            min=0,
            metavar="N",
            help="Also decide N positions of the texts anew, under much noise: strength without "
            "the luck of the draw. 0 is off.",
        ),
    ] = 0,
    json: Json = False,
) -> None:
    """Measure speed against strength: the same prompts and keys through every method.

    Methods and draft lengths take turns. --out keeps every text with its record, the key, the
    tables (summary.md, summary.json) and the plots; the same command goes on with a run that was
    stopped, and makes tables and plots anew of one that is done. plain and watermark are what the
    others are compared with.

    Exit codes: 0 done, 2 bad usage or a package is missing, 130 interrupted (what was written is
    kept).
    """
    names, lengths = _methods(methods), _lengths(draft_lengths)
    from filigrane.adapters.drafts import check_draft
    from filigrane.bench import tradeoff as experiment
    from filigrane.bench import tradeoff_plots, tradeoff_replay, tradeoff_summary

    tradeoff_plots.require()
    check_draft(draft)
    chosen = _prompts(task, form, prompts)
    settings = experiment.Settings(
        target=target,
        draft=draft,
        methods=names,
        draft_lengths=lengths,
        task=task,
        prompts=len(chosen),
        seeds=seeds,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    # What is wrong with methods and sampling is said before anything is loaded.
    experiment.plan(settings)
    directory = experiment.RunDirectory(out)
    directory.open(settings, chosen)
    models = None
    if experiment.missing(settings, chosen, directory):
        models = _write(settings, chosen, directory, out)
    again = directory.path / tradeoff_replay.REPLAY
    if replay and not again.exists():
        models = models or _load(settings, chosen)
        with render.progress("positions") as report:
            tradeoff_replay.run(settings, chosen, models, directory, replay, report)
    rows = [experiment.as_row(record) for record in directory.records()]
    replayed = tradeoff_summary.read_replay(again)
    summary = tradeoff_summary.summarise(rows, directory.settings, replayed)
    experiment.write(directory.path / "summary.json", tradeoff_summary.as_json(summary))
    experiment.write(directory.path / "summary.md", tradeoff_summary.markdown(summary))
    tradeoff_plots.draw(summary["rows"], directory.path)
    if json:
        render.dump(summary)
        return
    _show(summary["rows"])
    render.notice(f"{len(rows)} texts; tables and plots are in {out}")


def _methods(text: str) -> tuple[str, ...]:
    """Methods separated by commas, which may hold commas between parameters."""
    found: list[str] = []
    for part in text.split(","):
        if found and _PARAMETER.match(part):
            found[-1] += f",{part.strip()}"
        else:
            found.append(part.strip())
    if "" in found:
        raise FiligraneError("--methods takes names separated by commas, e.g. plain,otmc,skt.")
    return tuple(found)


def _lengths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 4 for part in parts):
        raise FiligraneError("--draft-lengths takes numbers separated by commas, e.g. 1,2,4.")
    return tuple(map(int, parts))


def _prompts(task: str, form: Form, count: int | None) -> "list[Prompt]":
    from filigrane.bench.tradeoff import TASKS, builtin_prompts

    found = builtin_prompts(task) if task in TASKS else _from_file(task, form)
    if count is not None and count > len(found):
        raise FiligraneError(f"--prompts {count}: {task} has {len(found)} prompts; ask for fewer.")
    return found[:count]


def _from_file(path: str, form: Form) -> "list[Prompt]":
    """Prompts of a file; unlike `embed`, which writes what it can, a run wants all of them."""
    from filigrane.bench.tradeoff import Prompt

    found: list[Prompt] = []
    for number, item in enumerate(records.read([path], form, plain="prompt", by_line=True)):
        if isinstance(item, records.Problem):
            raise RecordError(f"{item}; --task takes summarise, open-ended or a file of prompts.")
        name, text = records.name_field(item), records.text_field(item, "prompt")
        for field in (name, text):
            if isinstance(field, records.Problem):
                raise RecordError(f"{field}; mend it, or take it out.")
        if not isinstance(text, str) or not text.strip():
            raise RecordError(f'{item.place}: has no "prompt"; add one, or take it out.')
        assert not isinstance(name, records.Problem)
        found.append(Prompt(number if name is None else name, text))
    if len({prompt.id for prompt in found}) < len(found):
        raise RecordError(f'{path}: two prompts have the same "id"; give each its own.')
    return found


def _load(settings: Any, prompts: "list[Prompt]") -> Any:
    from filigrane.bench.tradeoff_models import load_models

    render.notice(f"loading {settings.target} and {settings.draft}")
    return load_models(settings, prompts)


def _write(settings: Any, prompts: "list[Prompt]", directory: Any, out: str) -> Any:
    """Write what is missing; returns the models, which took long to load."""
    from filigrane.bench.tradeoff import write_texts

    models = _load(settings, prompts)
    key = directory.begin(models)
    try:
        with render.progress("texts") as report:
            write_texts(settings, prompts, models, directory, key, report)
    except BaseException:
        render.notice(f"what was written is safe in {out}; the same command continues from there")
        raise
    return models


def _show(rows: list[dict[str, Any]]) -> None:
    """What fits a terminal; intervals of differences and ratios are in summary.md."""
    from rich.text import Text

    from filigrane.bench.tradeoff_summary import half, number

    shown = ("method", "K", "AATPS", "- plain", "ANLPPT-U", "/ watermark", "TPR")
    grid = render.table(*shown, right=shown[1:])
    for row in rows:
        versus = row.get("aatps_minus_plain", {}).get("value")
        cells = (
            render.shorten(row["method"], 18),
            str(row["draft_length"] or "–"),
            half(row["aatps"], 2),
            "–" if versus is None else f"{versus:+.3f}",
            number(row["anlppt_u"]["value"], 3),
            number(row.get("anlppt_u_over_watermark", {}).get("value"), 3),
            number(row["tpr"]["value"], 2),
        )
        grid.add_row(*map(Text, cells))
    render.stdout().print(grid)
