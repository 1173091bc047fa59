"""filigrane radioactivity filter."""

from typing import Annotated

import typer

from filigrane.cli import render
from filigrane.cli.options import Json
from filigrane.cli.radioactivity_inputs import Texts, each, sha256_of
from filigrane.errors import FiligraneError
from filigrane.schemes import from_tag


def filter_(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXTS",
            help="JSON Lines of marked texts: the logs (supervised), or fresh ones.",
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", "-s", metavar="TAG", help="Its windows' width.", show_default=False
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="FILE", help="Filter to write.", show_default=False),
    ] = None,
    inspect: Annotated[
        str | None,
        typer.Option(
            "--inspect", metavar="FILE", help="Show a filter instead.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "-t",
            metavar="MODEL",
            help="Of the model that wrote the texts; shows windows as text.",
            show_default=False,
        ),
    ] = None,
    min_count: Annotated[
        int, typer.Option("--min-count", min=1, help="Leave out rarer windows.")
    ] = 1,
    most: Annotated[int, typer.Option("--most", min=0, help="Most frequent ones to show.")] = 10,
    json: Json = False,
) -> None:
    """Build a k-gram filter for the closed test, or look into one.

    The windows of the answers' own text, without prompts and chat templates. A filter made with
    fresh marked text serves a suspect of which no log was kept.

    Exit codes: 0 done, 2 bad usage or unreadable files.
    """
    from filigrane.adapters.evidence import load_filter, save_filter
    from filigrane.radioactivity.filter import WindowFilter

    loaded = None
    if tokenizer is not None:
        from filigrane.adapters.models import load_tokenizer

        loaded = load_tokenizer(tokenizer)
    if inspect is not None:
        if files or out:
            raise FiligraneError("--inspect FILE shows a filter; it takes no texts and no --out.")
        made, path = load_filter(inspect), inspect
    else:
        if not files or scheme is None or out is None:
            raise FiligraneError("name texts, --scheme and --out FILE; or --inspect FILE.")
        chosen = from_tag(scheme)
        reader = Texts(loaded, None, chosen)
        texts = [text for name in each(files) for text in reader.read(name, prompts=False)]
        digests = {text.tokenizer_sha256 for text in texts if text.tokenizer_sha256}
        if loaded is not None:
            digests.add(loaded.tokenizer_sha256)
        if len(digests) > 1:
            raise FiligraneError(
                "these texts were made with different tokenizers; build a filter of each model's."
            )
        made = WindowFilter.build(
            [text.tokens for text in texts],
            chosen.context_width,
            min_count=min_count,
            tokenizer_sha256=next(iter(digests), None),
        )
        save_filter(made, out)
        path = out
    order = (-made.counts).argsort(kind="stable")[:most]
    top = [
        {
            "tokens": made.windows[i].tolist(),
            "count": int(made.counts[i]),
            "text": None if loaded is None else loaded.tokenizer.decode(made.windows[i].tolist()),
        }
        for i in order
    ]
    document = {
        "command": "radioactivity filter",
        "file": path,
        "sha256": sha256_of(path),
        "windows": len(made),
        "width": made.width,
        "documents": made.documents,
        "tokens": made.tokens,
        "tokenizer_sha256": made.tokenizer_sha256,
        "most_frequent": top,
    }
    if json:
        render.dump(document)
        return
    console = render.stdout()
    console.print(
        render.facts(
            {
                "windows": f"{len(made)} of {made.width} tokens",
                "from": f"{made.documents} texts, {made.tokens} tokens",
                "sha256": str(document["sha256"]),
            }
        )
    )
    if top:
        grid = render.table("window", "count", right=("count",))
        for row in top:
            shown = row["tokens"] if row["text"] is None else repr(row["text"])
            grid.add_row(render.shorten(str(shown), 50), str(row["count"]))
        console.print(grid)
