"""Options that several commands share, so that they read the same everywhere."""

from typing import Annotated, Literal

import typer

Form = Literal["auto", "text", "jsonl"]

_KEY = "Key (exactly one source)"
_INPUT = "Input"
_OUTPUT = "Output"
_FROM_ENVIRONMENT = "Else FILIGRANE_KEY_FILE (a path) or FILIGRANE_KEY (the text) is used."

KeyFile = Annotated[
    str | None,
    typer.Option(
        "--key-file",
        "-k",
        metavar="PATH",
        help=f"Key file that keygen wrote. {_FROM_ENVIRONMENT}",
        rich_help_panel=_KEY,
        show_default=False,
    ),
]
KeyFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--key-file",
        "-k",
        metavar="PATH",
        help=f"Key file; several may be given if there is no --users. {_FROM_ENVIRONMENT}",
        rich_help_panel=_KEY,
        show_default=False,
    ),
]
Keyring = Annotated[
    str | None,
    typer.Option(
        "--keyring",
        metavar="NAME",
        help="Name of a key in the system's keyring.",
        rich_help_panel=_KEY,
        show_default=False,
    ),
]
User = Annotated[
    int | None,
    typer.Option(
        "--user",
        metavar="N",
        min=0,
        help="The key of user N, derived from this root key.",
        rich_help_panel=_KEY,
        show_default=False,
    ),
]
SchemeTag = Annotated[
    str,
    typer.Option(
        "--scheme",
        "-s",
        metavar="TAG",
        help="The scheme of the mark, e.g. gumbel or greenlist:gamma=0.5,delta=3; "
        "see `filigrane schemes`.",
        show_default=False,
    ),
]
Slots = Annotated[
    int,
    typer.Option(
        "--slots",
        metavar="N",
        min=1,
        max=64,  # keys.MAX_SLOTS, without numpy for every --help
        help="Independent key streams that the mark takes turns with.",
    ),
]
Files = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILES",
        help="Text files (one text each) or JSON Lines (one record with tokens or text a line); "
        "- or nothing reads stdin.",
        show_default=False,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        "-t",
        metavar="MODEL",
        help="Whose tokenizer texts are read with: smollm2, a .gguf file, a folder or a hub id. "
        "Records with tokens need none.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
Format = Annotated[
    Form,
    typer.Option(
        "--format",
        help="auto goes by the file's name, else by its first line.",
        rich_help_panel=_INPUT,
    ),
]
VocabSize = Annotated[
    int | None,
    typer.Option(
        "--vocab-size",
        metavar="N",
        min=1,
        help="Refuse records of another vocabulary size and ids at or above it.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
Retokenize = Annotated[
    bool,
    typer.Option(
        "--retokenize",
        help="Use the text of records that have both text and tokens: what a reader would have.",
        rich_help_panel=_INPUT,
    ),
]
Joint = Annotated[
    bool,
    typer.Option("--joint", help="All texts are one claim: one answer for all of them together."),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Machine-readable answer on stdout, nothing else.", rich_help_panel=_OUTPUT
    ),
]
