"""filigrane keygen."""

import sys
from typing import Annotated

import typer

from filigrane.cli import render
from filigrane.cli.options import Json, Slots
from filigrane.cli.secrets import store_in_keyring
from filigrane.errors import FiligraneError
from filigrane.keys import Key


def keygen(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Public name of the key: letters, digits, . _ @ -")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="New file for the key, readable by its owner only (0600); - prints the secret.",
            show_default=False,
        ),
    ] = None,
    keyring: Annotated[
        bool, typer.Option("--keyring", help="Keep the key in the system's keyring instead.")
    ] = False,
    slots: Slots = 8,
    json: Json = False,
) -> None:
    """Make a secret key, keep it, and say its name, slots and fingerprint.

    Nothing is ever overwritten. Whoever has the key can mark and forge; a lost key cannot be made
    again.

    Exit codes: 0 made, 2 not made.
    """
    if (out is None) == (not keyring):
        raise FiligraneError("say where to keep the key: --out FILE or --keyring, one of them.")
    if out == "-" and json:
        raise FiligraneError("--out - writes the secret itself to stdout; it excludes --json.")
    key = Key.generate(name, slots=slots)
    kept: dict[str, object] = {"keyring": key.name} if keyring else {"file": out}
    if keyring:
        store_in_keyring(key)
    elif out == "-":
        sys.stdout.write(key.export_text() + "\n")
    elif out is not None:
        key.save(out)
    facts = {"key": key.name, "slots": str(key.slots), "fingerprint": key.fingerprint}
    if json:
        render.dump({"name": name, "slots": slots, "fingerprint": key.fingerprint, **kept})
    elif out == "-":
        render.notice(f"key {name}, {slots} slots, fingerprint {key.fingerprint}")
    else:
        facts["kept in"] = "the keyring" if keyring else str(out)
        render.stdout().print(render.facts(facts))
        render.notice("keep a copy in a safe place: nothing marked with a lost key can be proven")
