"""`filigrane receipt`: check signed results, without the service that issued them."""

import json as jsonlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from filigrane.cli import render
from filigrane.errors import ReceiptError

_MAX_BYTES = 10_000_000


def verify(
    receipt: Annotated[Path, typer.Argument(metavar="FILE", help="The receipt, one line.")],
    jwks: Annotated[
        Path,
        typer.Option(help="The service's public keys: its /.well-known/jwks.json, kept as a file."),
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="The text that it must be about (UTF-8), to the last character."),
    ] = None,
    text_date: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"],
            help="When the text was first seen (UTC), from elsewhere than from the key's holder.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check that a receipt is genuine, and that it is about a text.

    Checked are its signature, that its key stood in the service's log before, and, with --text,
    that it is about this very text. Nothing is asked of the network. Take the keys from the
    service, or from whoever kept them, never from who shows the receipt. A line break at the end of
    the text file counts, unless the receipt was made without it.

    A receipt of a mark counts only for texts first seen after committed_at: an older text may have
    had a key chosen to fit it. With --text-date that is checked, too. Whether the key was
    compromised since, only the service knows: POST /v1/receipts/verify.

    Exit codes: 0 genuine, 2 not.
    """
    from filigrane.service.receipts import check_date
    from filigrane.service.receipts import verify as check

    token = _read(receipt).strip()
    try:
        keys = jsonlib.loads(_read(jwks))
    except ValueError:
        raise ReceiptError(f"{jwks} is not JSON; save the service's jwks.json again.") from None
    if not isinstance(keys, dict):
        raise ReceiptError(f"{jwks} is no set of keys; save the service's jwks.json again.")
    content = None if text is None else _read(text)
    if content is None:
        found = check(token, keys, None)
    else:
        try:
            found = check(token, keys, content)
        except ReceiptError:
            # Editors end files with a line break that no text field sends.
            bare = content.removesuffix("\n").removesuffix("\r")
            if bare == content:
                raise
            found = check(token, keys, bare)
    if text_date is not None:
        check_date(found, text_date if text_date.tzinfo else text_date.replace(tzinfo=UTC))
    facts: dict[str, Any] = {
        "verdict": found.verdict,
        "statement": found.claims.get("statement"),
        "key": found.key_id,
        "committed_at": None if found.committed_at is None else found.committed_at.isoformat(),
        "issued_at": found.issued_at.isoformat(),
        "tenant": found.tenant,
        "tier": found.tier,
        "technique": found.technique,
        "alpha": found.alpha,
        "n_keys": found.n_keys,
        "n_readable": found.n_readable,
        "hints": [f"{name} {value}" for name, value in sorted(found.hints.items())],
        "log10_pvalue": found.log10_pvalue,
        "cautions": found.claims.get("cautions", []),
        "content_sha256": found.content_sha256,
        "content_checked": text is not None,
        "detector": found.detector,
        "id": found.id,
    }
    if json:
        render.dump(facts)
        return
    shown = {
        name.replace("_", " "): _shown(value)
        for name, value in facts.items()
        if value not in (None, [])
    }
    out = render.stdout()
    out.print("genuine", style="bold")
    width = max(map(len, shown))
    for name, value in shown.items():
        # Unwrapped: digests are copied and compared.
        line = Text(f"{name:<{width}}", style="bold")
        out.print(line.append(f"  {render.clean(value)}", style="not bold"), soft_wrap=True)
    if text is None:
        render.notice("with --text FILE it is also checked which text this is about")
    if found.committed_at is not None and text_date is None:
        render.notice(
            "counts only for texts first seen after committed at; --text-date DATE checks that"
        )


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ReceiptError(f"{path} is too long.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ReceiptError(f"{path} is not UTF-8 text.") from None


SUBCOMMANDS: dict[str, Callable[..., None]] = {"verify": verify}
