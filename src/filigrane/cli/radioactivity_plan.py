"""filigrane radioactivity plan."""

from typing import Annotated

import typer

from filigrane.cli import render
from filigrane.cli.options import Json


def plan(
    excess: Annotated[
        float,
        typer.Option(
            "--excess",
            help="Green share above gamma that is expected, e.g. 0.01; of a pilot, which must not "
            "be part of the test.",
            show_default=False,
        ),
    ],
    gamma: Annotated[float, typer.Option("--gamma", help="Share of green tokens.")] = 0.25,
    alpha: Annotated[float, typer.Option("--alpha", help="Level of the test.")] = 1e-5,
    power: Annotated[
        float, typer.Option("--power", help="Chance of finding the effect if it is there.")
    ] = 0.9,
    kept: Annotated[
        float,
        typer.Option(
            "--kept", help="Share of tokens that the rules leave; 0.4 in the published closed test."
        ),
    ] = 0.4,
    tokens_per_answer: Annotated[int, typer.Option("--tokens-per-answer", min=1)] = 100,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-second",
            help="Of the suspect, for the hours it takes.",
            show_default=False,
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(
            "--price",
            help="Of a million generated tokens, in any currency, for the cost.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """How many tokens and queries does a count test need for an effect of this size?

    Reading mode with a presumed base model needs several times fewer.

    Exit codes: 0 done, 2 numbers outside their range.
    """
    from dataclasses import asdict

    from filigrane.errors import FiligraneError
    from filigrane.radioactivity.power import plan as run

    for name, value in (("--tokens-per-second", tokens_per_second), ("--price", price)):
        if value is not None and not 0.0 < value < float("inf"):
            raise FiligraneError(f"{name} must be a positive number, got {value}.")
    made = run(
        excess,
        gamma=gamma,
        alpha=alpha,
        power=power,
        kept=kept,
        tokens_per_answer=tokens_per_answer,
    )
    hours = None if tokens_per_second is None else made.tokens / tokens_per_second / 3600.0
    cost = None if price is None else made.tokens * price / 1e6
    if json:
        render.dump({"command": "radioactivity plan", **asdict(made), "hours": hours, "cost": cost})
        return
    facts = {
        "to score": f"{made.pairs} pairs of window and token",
        "to generate": f"{made.tokens} tokens, if {made.kept:.0%} of them survive the rules",
        "queries": f"{made.queries} of {made.tokens_per_answer} tokens",
    }
    if hours is not None:
        facts["hours"] = f"{hours:.1f}"
    if cost is not None:
        facts["cost"] = f"{cost:.2f}"
    render.stdout().print(render.facts(facts))
