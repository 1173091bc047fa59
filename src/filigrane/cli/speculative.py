"""filigrane speculative certify."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from filigrane.cli import render
from filigrane.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table

    from filigrane.speculative.nogo import Certificate

_SIZES = (2, 3, 4)


def certify(
    vocabulary: Annotated[
        list[int] | None,
        typer.Option(
            "--vocabulary",
            "-V",
            metavar="SIZE",
            help="Tokens of a vocabulary, 2 to 5; may be given several times. "
            "2, 3 and 4 if not given.",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option("--pairs", min=1, max=1_000_000, help="Random pairs of laws per size.")
    ] = 20_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random pairs.")] = 0,
    json: Json = False,
) -> None:
    """Recompute the no-go theorem of Hu and Huang (2024) on small vocabularies.

    No mark of full strength lets drafts through as often as no mark does, once there are three
    tokens. Every claim is two numbers that were computed; nothing is taken from the paper.

    Exit codes: 0 every claim held, 1 one did not, 2 bad usage.
    """
    from filigrane.speculative.nogo import certify as run

    found = run(vocabulary or _SIZES, pairs, seed)
    if json:
        render.dump(_document(found, pairs, seed))
    else:
        _show(found, pairs)
    if not found.held:
        raise typer.Exit(1)


def _document(found: "Certificate", pairs: int, seed: int) -> dict[str, object]:
    return {
        "command": "speculative certify",
        "held": found.held,
        "pairs": pairs,
        "seed": seed,
        "worked": [row._asdict() | {"otmc": row.otmc._asdict()} for row in found.worked],
        "strengths": [row._asdict() for row in found.strengths],
        "random": [row._asdict() for row in found.random],
        "claims": [claim._asdict() for claim in found.claims],
    }


def _show(found: "Certificate", pairs: int) -> None:
    out = render.stdout()
    out.print(Text("Best acceptance of a draft when the text must be R_E(P)", style="bold"))
    out.print(_worked(found))
    out.print(
        "1 - TV is what a draft without a mark reaches, and OTMC with one. OTMC gives up R_E(P): "
        "its text is another function of the key. same: share of its tokens that are those of the "
        "full mark; evidence: its mean score as a share of the full mark's (both simulated)."
    )
    out.print()
    out.print(Text("Three laws of half overlap, any reweight, by linear programme", style="bold"))
    grid = render.table(
        *("strength E|a - 1/2|", "best mean acceptance", "dual bound"),
        right=("strength E|a - 1/2|", "best mean acceptance", "dual bound"),
    )
    for row in found.strengths:
        grid.add_row(f"{row.strength:.3f}", f"{row.acceptance:.4f}", f"{row.bound:.4f}")
    out.print(grid)
    out.print("1 - TV is 0.5: strength 0, no mark at all, is the only one that reaches it.")
    out.print()
    out.print(Text(f"Largest loss against 1 - TV in {pairs} random pairs", style="bold"))
    names = ("tokens", "race", "inverse CDF", "gamma")
    grid = render.table(*names, right=names)
    for drawn in found.random:
        losses = (drawn.race, drawn.inverse_cdf, drawn.gamma)
        grid.add_row(str(drawn.size), *(f"{abs(loss):.4f}" for loss in losses))
    out.print(grid)
    out.print()
    out.print(_claims(found))
    out.print()
    failed = sum(not claim.held for claim in found.claims)
    out.print(f"{len(found.claims) - failed} of {len(found.claims)} claims held")
    if failed:
        render.fail("a claim did not hold; the line that says 'no' above has both numbers.")


def _worked(found: "Certificate") -> "Table":
    numbers = ("1 - TV", "race", "inverse CDF", "gamma", "OTMC", "same", "evidence")
    grid = render.table("pair", *numbers, right=numbers)
    for row in found.worked:
        grid.add_row(
            row.name,
            *(f"{value:.4f}" for value in (row.full, row.race, row.inverse_cdf)),
            "" if row.gamma is None else f"{row.gamma:.4f}",
            f"{row.otmc.acceptance:.4f}",
            f"{row.otmc.agreement:.3f}",
            f"{row.otmc.evidence:.3f}",
        )
    return grid


def _claims(found: "Certificate") -> "Table":
    grid = render.table("claim", "left", "", "right", "held", right=("left", "right"))
    grid.columns[0].no_wrap = False
    for claim in found.claims:
        grid.add_row(
            claim.statement,
            f"{claim.left + 0.0:.4g}",
            claim.relation,
            f"{claim.right:.4g}",
            Text("yes" if claim.held else "no", style="" if claim.held else "red"),
        )
    return grid


SUBCOMMANDS = {"certify": certify}
