"""filigrane engine token."""

import hashlib
import secrets

from filigrane.cli import render
from filigrane.cli.options import Json


def token(json: Json = False) -> None:
    """Make a bearer token for a tenant, and the digest that goes into keyring.toml.

    The token is shown once and kept nowhere; give it to the tenant. The server needs the digest
    only, from which nobody can compute the token.

    Exit codes: 0 made.
    """
    made = secrets.token_urlsafe(32)
    digest = hashlib.sha256(made.encode()).hexdigest()
    document = {"token": made, "sha256": digest}
    render.answer(json, document, f"token: {made}", f'tokens_sha256 = ["{digest}"]')
