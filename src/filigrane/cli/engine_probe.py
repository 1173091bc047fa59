"""filigrane engine probe."""

import math
import os
from typing import Annotated, Final

import typer

from filigrane.cli import render
from filigrane.cli.detect import check_alpha
from filigrane.cli.options import Json
from filigrane.errors import FiligraneError

TOKEN_VARIABLE: Final = "FILIGRANE_TENANT_TOKEN"


def probe(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, http://HOST:PORT/v1.")],
    model: Annotated[str, typer.Option("--model", "-m", help="What the server calls its model.")],
    keyring: Annotated[
        str, typer.Option("--keyring", metavar="DIR", help="The keyring that the server has.")
    ],
    key: Annotated[
        str | None,
        typer.Option(
            "--key", help="Id of a key of the keyring; its default if left out.", show_default=False
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", "-s", metavar="TAG", help="As in requests.", show_default=False),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            "--tenant",
            help="On whose behalf. Where tenants have tokens, that of this tenant is read from "
            f"${TOKEN_VARIABLE}.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="How long a text.")] = 120,
    alpha: Annotated[float, typer.Option("--alpha", help="The mark is found below it.")] = 1e-6,
    json: Json = False,
) -> None:
    """Ask a running server for a text and look for the mark in it: does it really mark?

    A readiness probe that tests the whole way, for the machine that the server's keyring is on.

    Exit codes: 0 marked; 1 answered, and no mark was found; 2 not answered.
    """
    from filigrane.adapters.probing import probe as run
    from filigrane.serving import Decoding, Keyring, Mark, decide

    check_alpha(alpha)
    ring = Keyring.load(keyring)
    arguments = {"filigrane_key": key, "filigrane_scheme": scheme, "filigrane_tenant": tenant}
    given = {name: value for name, value in arguments.items() if value is not None}
    decided = decide(ring, given | {"filigrane_mark": True}, Decoding(max_tokens=tokens))
    if not isinstance(decided, Mark):
        raise FiligraneError("the keyring marks nothing; see its policy.")
    secret = os.environ.get(TOKEN_VARIABLE)
    if secret is not None and tenant is not None and ring.tenant_of(secret) != tenant:
        raise FiligraneError(f"the token in ${TOKEN_VARIABLE} is not one of tenant {tenant}.")
    found = run(url, model, decided, tenant=None if secret else tenant, token=secret, tokens=tokens)
    good = found.found(alpha)
    log10_p = found.result.log10_pvalue + 0.0
    if json:
        facts = {"key": decided.key_id, "scheme": decided.scheme.tag, "tokens": found.tokens}
        render.dump(facts | {"log10_pvalue": log10_p, "found": good})
    else:
        render.stdout().print(
            render.facts(
                {
                    "key": decided.key_id,
                    "scheme": decided.scheme.tag,
                    "tokens": str(found.tokens),
                    "log10 p": render.log10(log10_p),
                    "verdict": "marked" if good else "NOT MARKED",
                }
            )
        )
    if not good:
        if found.result.log_pvalue < math.log(1e-2):
            render.warn(
                f"something is there, and {found.tokens} tokens are too few to be sure at "
                f"{alpha:g}: raise --tokens."
            )
        raise typer.Exit(1)
