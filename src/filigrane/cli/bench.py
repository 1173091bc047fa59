"""filigrane bench."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from filigrane.cli import render
from filigrane.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table


def bench(
    what: Annotated[Literal["embed", "detect", "trace"], typer.Argument(help="What to time.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: shows that it runs, measures nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Also write the JSON here.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Time a decoding step, a test or a trace beside what others do, on this machine.

    embed needs torch, and compares with transformers if it is there. Takes up to three minutes;
    leave the machine alone meanwhile.

    Exit codes: 0 done, 2 bad usage or a package is missing.
    """
    from importlib import import_module

    # A path that cannot be written is better found out before than after the minutes of a run.
    part = None if out is None else out.with_name(f"{out.name}.part")
    if part is not None:
        part.touch()
    run = import_module(f"filigrane.bench.{what}").run
    try:
        with render.progress("sizes") as report:
            document = run(quick, report)
        if part is not None and out is not None:
            part.write_text(json_module.dumps(document, indent=1) + "\n", encoding="utf-8")
            part.replace(out)
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    if json:
        render.dump(document)
        return
    render.stdout().print(_grid(document["rows"]))


def _grid(rows: list[dict[str, Any]]) -> "Table":
    """The medians; the spread is in the JSON."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if not name.startswith(("min_", "max_", "runs", "stages_"))]
    grid = render.table(*columns, right=[name for name in columns if name != "case"])
    for row in rows:
        grid.add_row(*(_cell(row.get(name, "")) for name in columns))
    return grid


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)
