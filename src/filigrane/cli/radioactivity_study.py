"""filigrane radioactivity study."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from filigrane.cli import render
from filigrane.cli.options import Json
from filigrane.errors import FiligraneError

_GRID = "Grid (each may be a list, separated by ;)"
_SIZE = "Size"


def study(
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder of the study: new, or of the same settings, to go on with it.",
            show_default=False,
        ),
    ],
    alice: Annotated[
        str, typer.Option("--alice", metavar="MODEL", help="Who writes the marked pairs.")
    ] = "smollm2",
    bobs: Annotated[
        str,
        typer.Option(
            "--bobs", metavar="MODEL;...", help="Base models of suspects.", rich_help_panel=_GRID
        ),
    ] = "smollm2",
    schemes: Annotated[
        str, typer.Option("--schemes", metavar="TAG;...", rich_help_panel=_GRID)
    ] = "greenlist:context_width=1,gamma=0.25,delta=3.0",
    rhos: Annotated[
        str,
        typer.Option(
            "--rhos",
            metavar="SHARE;...",
            help="Shares of marked pairs in Bob's data.",
            rich_help_panel=_GRID,
        ),
    ] = "0;0.1;0.5;1",
    learning_rates: Annotated[
        str, typer.Option("--learning-rates", metavar="RATE;...", rich_help_panel=_GRID)
    ] = "5e-4",
    epochs: Annotated[str, typer.Option("--epochs", metavar="N;...", rich_help_panel=_GRID)] = "2",
    languages: Annotated[
        str,
        typer.Option(
            "--languages",
            metavar="en;fr;de;es",
            help="Of prompts: Bob trains on the first, and is asked in all.",
            rich_help_panel=_GRID,
        ),
    ] = "en",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Repetitions.", rich_help_panel=_GRID)
    ] = 1,
    pairs: Annotated[
        int, typer.Option("--pairs", min=8, help="Of Bob's data.", rich_help_panel=_SIZE)
    ] = 400,
    known: Annotated[
        float,
        typer.Option(
            "--known", help="Share of Alice's logs that Bob used (d).", rich_help_panel=_SIZE
        ),
    ] = 1.0,
    fresh: Annotated[
        int,
        typer.Option(
            "--fresh", min=4, help="New marked texts, and prompts to ask.", rich_help_panel=_SIZE
        ),
    ] = 160,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=16, rich_help_panel=_SIZE)
    ] = 96,
    method: Annotated[
        Literal["full", "last_layers", "lora"],
        typer.Option("--method", help="How Bob trains.", rich_help_panel=_SIZE),
    ] = "last_layers",
    layers: Annotated[
        int,
        typer.Option("--layers", min=1, help="Top layers that train.", rich_help_panel=_SIZE),
    ] = 6,
    keys: Annotated[
        int,
        typer.Option(
            "--keys", min=0, help="Clean runs with new keys; 0 is none.", rich_help_panel=_SIZE
        ),
    ] = 200,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option("--dtype")] = "bfloat16",
    device: Annotated[str, typer.Option("--device", help="Where the models run.")] = "cpu",
    json: Json = False,
) -> None:
    """Alice writes with a mark, Bob trains on it, Alice tests Bob: over a grid, with real models.

    Open and closed, supervised and unsupervised, the baseline without a mark, and the p-values of
    a clean Bob under many keys. --out keeps texts, models, answers and readings; the same command
    goes on with a study that was stopped. summary.md, summary.json and the plots are made at the
    end.

    Exit codes: 0 done, 2 bad usage or a package is missing, 130 interrupted (what was done is
    kept).
    """
    from filigrane.study import figures, grid

    figures.require()
    settings = grid.Settings(
        alice=alice,
        bobs=tuple(_list(bobs)),
        schemes=tuple(_list(schemes)),
        rhos=tuple(_numbers("--rhos", rhos)),
        learning_rates=tuple(_numbers("--learning-rates", learning_rates)),
        epochs=tuple(_numbers("--epochs", epochs)),
        languages=tuple(_list(languages)),
        known=known,
        pairs=pairs,
        fresh=fresh,
        asked=fresh,
        max_new_tokens=max_new_tokens,
        method=method,
        layers=layers,
        seeds=seeds,
        keys=keys,
        dtype=dtype,
        device=device,
    )
    folder = Path(out)
    try:
        with render.progress("done") as report:
            rows = grid.run(settings, folder, report)
    except BaseException:
        if os.path.isdir(out):
            render.notice(f"what was done is safe in {out}; the same command continues from there")
        raise
    document = grid.summary(folder, settings, rows)
    figures.draw(rows, folder)
    if json:
        render.dump(document)
        return
    _show(rows, document["calibration"])
    render.notice(f"{len(rows)} results; tables and plots are in {out}")


def _list(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(";")]
    if "" in parts:
        raise FiligraneError(f"{text!r} has an empty entry; separate values by one semicolon.")
    return parts


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in _list(text)]
    except ValueError as error:
        raise FiligraneError(f"{name} takes numbers separated by semicolons, got {text!r}.") from (
            error
        )


def _show(rows: list[dict[str, Any]], calibration: list[dict[str, Any]]) -> None:
    from rich.text import Text

    out = render.stdout()
    grid = render.table("setting", "statistic", "rho", "scored", "log10 p", right=("rho", "scored"))
    for row in rows:
        cells = (row["setting"], row["statistic"], f"{row['rho']:g}", str(row["n_scored"]))
        grid.add_row(*map(Text, (*cells, render.log10(row["log10_pvalue"]))))
    out.print(grid)
    if calibration:
        worst = min(calibration, key=lambda row: row["ks_pvalue"])
        out.print(
            f"clean Bob, {worst['keys']} keys: smallest KS p of {len(calibration)} tests "
            f"{worst['ks_pvalue']:.2g} ({worst['test']})"
        )
