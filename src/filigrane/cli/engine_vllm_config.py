"""filigrane engine vllm-config."""

from typing import Annotated

import typer

from filigrane.cli import render
from filigrane.cli.options import Json, KeyFile, Keyring, User
from filigrane.cli.secrets import for_user, read_key
from filigrane.errors import FiligraneError


def vllm_config(
    out: Annotated[str, typer.Argument(metavar="OUT", help="New file, for vllm serve --config.")],
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            "-p",
            metavar="TAG",
            help="vllm-gumbel or vllm-dual-gumbel, with parameters after a colon.",
        ),
    ] = "vllm-gumbel",
    key_file: KeyFile = None,
    keyring: Keyring = None,
    user: User = None,
    json: Json = False,
) -> None:
    """Drive vLLM's own watermark with a filigrane key: write its settings to a private file.

    vLLM's key is a number of 64 bits; it is derived from the filigrane key for this purpose alone
    and stands in no command line. `filigrane detect --profile` finds the text with the same key.

    Exit codes: 0 written, 2 not written.
    """
    from filigrane.adapters.vllm.native import write_config
    from filigrane.foreign import from_tag
    from filigrane.foreign.vllm import VllmDualGumbel, VllmGumbel

    chosen = from_tag(profile)
    if not isinstance(chosen, VllmGumbel | VllmDualGumbel):
        raise FiligraneError(
            f"{chosen.tag} is not vLLM's: use vllm-gumbel or vllm-dual-gumbel (as --profile)."
        )
    root = read_key(key_file, keyring)
    key = for_user(root, user)
    write_config(out, key, chosen)
    if json:
        render.dump({"file": out, "profile": chosen.tag, "key": key.name})
        return
    render.stdout().print(render.facts({"written": out, "profile": chosen.tag, "key": key.name}))
    render.notice(f"vllm serve MODEL --config {out}")
