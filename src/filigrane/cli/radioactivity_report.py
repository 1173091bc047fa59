"""filigrane radioactivity report."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from filigrane.cli import render
from filigrane.cli.options import Json
from filigrane.errors import FiligraneError


def report(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="RESULT...",
            help="Results that `radioactivity test --out` wrote; each is one test.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE.html",
            help="Page to write; the same as data goes beside it, with the ending .json.",
        ),
    ] = "report.html",
    json: Json = False,
) -> None:
    """Write what was found, and what was not, as one page for people and as JSON.

    The page needs no other file and no script: it can be printed, sent and kept. It says what was
    asked and found, how to read the p-value, what was counted and what was left out, which controls
    were run, where everything comes from, and what the result does not establish.

    Exit codes: 0 written, whatever was found; 2 bad usage, or a file that is no result.
    """
    from filigrane.study import checked
    from filigrane.study import report as reports

    page = Path(out)
    given = {Path(name).resolve() for name in files}
    for path in (page, page.with_suffix(".json")):
        if path.resolve() in given:
            raise FiligraneError(
                f"the report would replace {path}, one of the results; choose another --out."
            )
    documents = [checked.read(name) for name in files]
    page, data = reports.write(documents, page)
    if json:
        render.dump(reports.summary(documents) | {"files": [str(page), str(data)]})
        return
    grid = render.table("suspect", "setting", "log10 p", "alpha", "verdict", right=["log10 p"])
    for document in documents:
        found = document.fields["verdict"]
        grid.add_row(
            Text(render.shorten(document.fields["suspect"]["name"], 30)),
            document.setting,
            reports.log10(document.decisive),
            f"{document.fields['alpha']:g}",
            Text("trace found" if found else "no trace found", style="green" if found else ""),
        )
    render.stdout().print(grid)
    render.notice(f"{page} and {data} written")
