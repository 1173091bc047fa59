"""filigrane radioactivity selftest."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from filigrane.cli import render
from filigrane.cli.options import Json

if TYPE_CHECKING:
    from filigrane.study.selftest import SelfTest

_SHOWN = ("open", "open, logged texts", "closed", "closed, filtered")
_TUNED = ("tuned: argmax", "tuned: soft", "tuned: differential")


def selftest(
    keys: Annotated[int, typer.Option("--keys", min=20, help="Clean runs per window.")] = 60,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    json: Json = False,
) -> None:
    """Run the whole test on n-gram models, where everything is known.

    The dose of marked text against what the test says, a model that copies what it sees, and clean
    models under many keys. Needs no model and no network.

    Exit codes: 0 every claim held, 1 one did not, 2 bad usage.
    """
    import dataclasses

    from filigrane.study.selftest import selftest as run

    with render.progress("steps") as report:
        found = run(seed, keys=keys, report=report)
    if json:
        render.dump(
            {
                "command": "radioactivity selftest",
                "seed": seed,
                "held": found.held,
                **dataclasses.asdict(found),
            }
        )
    else:
        _show(found)
    if not found.held:
        raise typer.Exit(1)


def _show(found: "SelfTest") -> None:
    out = render.stdout()
    for title, names, numbers in (
        ("Bob trained from nothing: log10 p", _SHOWN, "log10_pvalues"),
        ("Bob tuned from a base model: log10 p", _TUNED, "log10_pvalues"),
    ):
        out.print(Text(title, style="bold"))
        heads = [name.removeprefix("tuned: ") for name in names]
        grid = render.table("k", "rho", *heads, right=("k", "rho", *heads))
        for dose in found.doses:
            values: dict[str, Any] = getattr(dose, numbers)
            cells = [render.log10(values[name]) for name in names]
            grid.add_row(str(dose.window), f"{dose.rho:g}", *cells)
        out.print(grid)
        out.print()
    out.print(Text("Clean models, texts written anew under every key", style="bold"))
    grid = render.table("k", "", "keys", "KS p", "mean log10 p", right=("k", "keys", "KS p"))
    for row in [*found.copying, *found.chance]:
        shown = (f"{row.ks_pvalue:.2g}", f"{row.mean_log10_pvalue:.2f}")
        grid.add_row(str(row.window), row.name, str(row.keys), *shown)
    out.print(grid)
    failed = [check for check in found.checks if not check.held]
    out.print(f"{len(found.checks) - len(failed)} of {len(found.checks)} claims held")
    for check in failed:
        render.fail(f"{check.claim}; found {check.found}")
