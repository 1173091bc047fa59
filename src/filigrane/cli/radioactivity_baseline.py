"""filigrane radioactivity baseline."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from filigrane.cli import render
from filigrane.cli.options import Json
from filigrane.cli.radioactivity_inputs import Texts, described

if TYPE_CHECKING:
    from filigrane.cli.radioactivity_inputs import MarkedText
    from filigrane.contexts import TokenIds


def baseline(
    logged: Annotated[
        str,
        typer.Option(
            "--logged",
            metavar="FILE",
            help="JSON Lines of texts that the suspect may have been trained on.",
            show_default=False,
        ),
    ],
    fresh: Annotated[
        str,
        typer.Option(
            "--fresh",
            metavar="FILE",
            help="Texts of the same kind by the same model that nobody can have been trained on.",
            show_default=False,
        ),
    ],
    suspect: Annotated[
        str,
        typer.Option(
            "--suspect",
            metavar="MODEL",
            help="smollm2, a .gguf file, a transformers folder or a hub id.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="The prompts, for records that hold only their hash.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha")] = 1e-5,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 8,
    device: Annotated[str, typer.Option("--device", help="Where the model runs.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option("--dtype", help="The checkpoint's own if not given.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """The baseline without a mark: does the suspect know the logs better than fresh texts?

    Loss of the first 256 tokens over their compressed size, two samples, Kolmogorov-Smirnov. Needs
    the suspect's weights and the very texts; needs no key. It finds whatever differs between the
    two files, so they have to be of one kind.

    Exit codes: 0 a difference at --alpha, 1 none, 2 bad usage or unreadable files.
    """
    import dataclasses
    import math

    from filigrane.adapters.models import load
    from filigrane.adapters.reading import calibrated_losses
    from filigrane.cli.detect import check_alpha
    from filigrane.radioactivity.membership import baseline as run

    check_alpha(alpha)
    render.notice(f"loading {suspect}")
    loaded = load(suspect, dtype=dtype, device=device)
    reader = Texts(loaded, prompts)
    inputs, samples = [], []
    with render.progress("pieces") as report:
        for path, role in ((logged, "logged"), (fresh, "fresh")):
            texts = reader.read(path)
            inputs.append(described(path, len(texts), role).as_json())
            samples.append(
                calibrated_losses(loaded, _pieces(texts), batch_size=batch_size, report=report)
            )
    found = run(*samples)
    result = dataclasses.asdict(found) | {"log10_pvalue": found.log_pvalue / math.log(10) + 0.0}
    verdict = found.log_pvalue <= math.log(alpha)
    if json:
        render.dump(
            {
                "command": "radioactivity baseline",
                "suspect": loaded.name,
                "alpha": alpha,
                "inputs": inputs,
                "result": result,
                "verdict": verdict,
            }
        )
    else:
        render.stdout().print(
            render.facts(
                {
                    "pieces": f"{found.n_logged} logged, {found.n_fresh} fresh",
                    "loss per compressed byte": f"{found.median_logged:.3f} logged, "
                    f"{found.median_fresh:.3f} fresh (medians, nats)",
                    "distance": f"{found.distance:.3f}",
                    "log10 p": render.log10(result["log10_pvalue"]),
                    "verdict": "the two differ" if verdict else "no difference found",
                }
            )
        )
    if not verdict:
        raise typer.Exit(1)


def _pieces(texts: "list[MarkedText]") -> "list[TokenIds]":
    """The first piece of each text, prompt and answer end to end.

    One piece a text: pieces of one text are alike, and the test wants independent ones.
    """
    import numpy as np

    from filigrane.radioactivity.membership import PIECE

    whole = [
        text.tokens if text.prompt is None else np.concatenate([text.prompt, text.tokens])
        for text in texts
    ]
    return [ids[:PIECE] for ids in whole if ids.shape[0] > 1]
