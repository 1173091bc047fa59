"""filigrane engine enrol."""

import json as jsons
import sys
from typing import Annotated

import typer

from filigrane.cli import render
from filigrane.cli.options import Json


def enrol(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the service calls the engine.")],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="New file for the private part.")
    ],
    json: Json = False,
) -> None:
    """Make an engine's identity, and print its public part for the service.

    To be run on the engine's host: the private part stays there, in a file of mode 0600. The line
    on stdout is the public part, a JWK; whoever looks after the service passes it to `filigrane
    access engine`. Leases are sealed to this identity.

    Exit codes: 0 made, 2 not made.
    """
    from filigrane.adapters.leases.sealing import Identity

    identity = Identity.generate(name)
    identity.save(out)
    if json:
        render.dump({"engine": name, "file": out, "public_key": identity.public_key})
        return
    sys.stdout.write(jsons.dumps(identity.public_key) + "\n")
    render.notice(f"the private part is in {out}: it never leaves this machine.")
