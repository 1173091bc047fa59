"""filigrane engine check."""

from typing import Annotated

import typer

from filigrane.cli import render
from filigrane.cli.options import Json


def check(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="The keyring: keyring.toml and the key files.")
    ],
    json: Json = False,
) -> None:
    """Read a server's keyring as its engine will, and find the known answers on this machine.

    Says what is wrong with a keyring before a server refuses to start with it, and that texts
    marked here are the ones that everybody else would find. Shows no secret.

    Exit codes: 0 ready, 2 not.
    """
    from filigrane.serving import Keyring, known_answers
    from filigrane.serving.orders import now

    ring = Keyring.load(folder)
    answers = known_answers(ring.schemes)
    if json:
        keys = [
            {
                "id": entry.id,
                "fingerprint": entry.key.fingerprint,
                "tenant": entry.tenant,
                "state": entry.state,
                "expires": entry.expires.isoformat() if entry.expires else None,
                "schemes": [scheme.tag for scheme in entry.schemes],
            }
            for entry in ring.entries.values()
        ]
        tenants = [
            {"name": t.name, "default": t.default, "tokens": len(t.tokens_sha256)}
            for t in ring.tenants.values()
        ]
        head = {"policy": ring.policy, "default": ring.default}
        render.dump(head | {"keys": keys, "tenants": tenants, "known_answers": answers})
        return
    out = render.stdout()
    grid = render.table("key", "fingerprint", "tenant", "state", "scheme")
    for entry in ring.entries.values():
        more = f" and {len(entry.schemes) - 1} more" if len(entry.schemes) > 1 else ""
        state = "expired" if entry.active and entry.expired(now()) else entry.state
        scheme = f"{entry.schemes[0].name}{more}"
        grid.add_row(entry.id, entry.key.fingerprint, entry.tenant or "all", state, scheme)
    out.print(grid)
    found = ", ".join(f"{name} {value:.0f}" for name, value in answers.items())
    facts = {"policy": ring.policy, "default": ring.default or "none"}
    facts["schemes"] = ", ".join(scheme.tag for scheme in ring.schemes)
    out.print(render.facts(facts | {"known answers": f"found, log10 p {found}"}))
