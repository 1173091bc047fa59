"""filigrane bench: its timings; the experiment `tradeoff` has a module of its own."""

import json as json_module
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from filigrane.cli import render
from filigrane.cli.options import Json
from filigrane.cli.tradeoff import tradeoff

if TYPE_CHECKING:
    from rich.table import Table


_Quick = Annotated[
    bool, typer.Option("--quick", help="Tiny sizes: shows that it runs, measures nothing.")
]
_Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="Also write the JSON here.", show_default=False
    ),
]


def embed(quick: _Quick = False, out: _Out = None, json: Json = False) -> None:
    """Time a decoding step, with and without a mark, beside other tools'.

    Needs torch, and compares with transformers if it is there. Takes up to three minutes; leave the
    machine alone meanwhile.

    Exit codes: 0 done, 2 bad usage or a package is missing.
    """
    _time("embed", quick, out, json)


def detect(quick: _Quick = False, out: _Out = None, json: Json = False) -> None:
    """Time a complete test of a text, and its parts, beside other tools'.

    Compares with transformers if it is there. Takes about a minute; leave the machine alone
    meanwhile.

    Exit codes: 0 done, 2 bad usage or a package is missing.
    """
    _time("detect", quick, out, json)


def fused(quick: _Quick = False, out: _Out = None, json: Json = False) -> None:
    """Time the fused kernel on a GPU, beside plain sampling, a copy and vLLM's own kernel.

    Needs torch, triton and a CUDA device; compares with vLLM if it is there.

    Exit codes: 0 done, 2 bad usage, a package or the device is missing.
    """
    _time("fused", quick, out, json)


def trace(quick: _Quick = False, out: _Out = None, json: Json = False) -> None:
    """Time one text against up to a million user keys.

    Takes about a minute; leave the machine alone meanwhile.

    Exit codes: 0 done, 2 bad usage or a package is missing.
    """
    _time("trace", quick, out, json)


SUBCOMMANDS: Final[dict[str, Callable[..., None]]] = {
    "embed": embed,
    "detect": detect,
    "trace": trace,
    "fused": fused,
    "tradeoff": tradeoff,
}


def _time(what: str, quick: bool, out: Path | None, json: bool) -> None:
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
