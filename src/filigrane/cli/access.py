"""filigrane access: tenants, tokens, engines and approvals, on the service's own database."""

import json as json_text
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text as Styled

from filigrane.cli import render
from filigrane.cli.keys_office import (
    Actor,
    Config,
    Tenant,
    TokenFile,
    opened,
    principal,
    write_private,
)
from filigrane.cli.options import Json
from filigrane.errors import FiligraneError
from filigrane.private_files import why_not

if TYPE_CHECKING:
    from filigrane.store.records import Approval

Person = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Of the person or machine.", show_default=False),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine", metavar="NAME", help="An engine that was enrolled.", show_default=False
    ),
]


def tenant(
    name: Annotated[
        str, typer.Argument(metavar="TENANT", help="1 to 24 of a-z 0-9 -.", show_default=False)
    ],
    actor: Actor = "operator",
    config: Config = None,
    json: Json = False,
) -> None:
    """Make a tenant, and with it the first record of its log.

    Exit codes: 0 made.
    """
    with opened(config) as counter:
        counter.keybook.create_tenant(name, actor=actor)
    render.answer(json, {"tenant": name}, f"made tenant {name}")


def token(
    tenant: Tenant,
    name: Person,
    role: Annotated[
        list[str],
        typer.Option(
            "--role",
            metavar="ROLE",
            help="engine, detector-public, detector-expert, attribution-officer, key-admin, "
            "custodian, auditor or tenant-admin; several may be given.",
            show_default=False,
        ),
    ],
    engine: EngineName = None,
    days: Annotated[
        int | None,
        typer.Option(
            "--days", metavar="N", min=1, help="For how long; else for ever.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Write it into a new file that only you can read, instead of showing it.",
            show_default=False,
        ),
    ] = None,
    actor: Actor = "operator",
    config: Config = None,
    json: Json = False,
) -> None:
    """Issue an API token. It is shown once; the database keeps a digest of it.

    An engine's token has the role engine and names the engine that it is for.

    Exit codes: 0 issued.
    """
    with opened(config) as counter:
        from filigrane.store.records import Role

        known = [item.value for item in Role]
        unknown = [word for word in role if word not in known]
        if unknown:
            raise FiligraneError(f"there is no role {unknown[0]!r}; use {', '.join(known)}.")
        if out is not None and out.exists():
            # Before there is a token that nobody would have.
            raise FiligraneError(f"{out}: {why_not(FileExistsError())}.")
        ends = None if days is None else datetime.now(UTC) + timedelta(days=days)
        made = counter.access.issue_token(
            tenant,
            name,
            [Role(word) for word in role],
            engine=engine,
            expires_at=ends,
            actor=actor,
        )
    token_id = made.split("_")[2]
    if out is not None:
        write_private(out, made.encode("ascii") + b"\n")
        render.answer(json, {"id": token_id, "file": str(out)}, f"wrote token {token_id} to {out}")
        return
    render.answer(json, {"id": token_id, "token": made}, f"token: {made}")


def engine(
    tenant: Tenant,
    name: Person,
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="MODEL",
            help="What it serves; several may be given.",
            show_default=False,
        ),
    ],
    public_key: Annotated[
        Path,
        typer.Option(
            "--public-key",
            metavar="FILE",
            help="The JWK that `filigrane engine enrol` printed there; - reads stdin.",
            show_default=False,
        ),
    ],
    actor: Actor = "operator",
    config: Config = None,
    json: Json = False,
) -> None:
    """Enrol an engine. From then on, keys of its models wait for it before they mark.

    Exit codes: 0 enrolled.
    """
    text = sys.stdin.read() if str(public_key) == "-" else public_key.read_text("utf-8")
    try:
        key = json_text.loads(text)
    except (ValueError, RecursionError):
        key = None
    if not isinstance(key, dict):
        raise FiligraneError(f"{public_key} holds no JWK: print one with `filigrane engine enrol`.")
    with opened(config) as counter:
        record = counter.access.enrol_engine(tenant, name, model, key, actor=actor)
    render.answer(
        json,
        {"engine": record.name, "models": list(record.models)},
        f"enrolled {record.name} for {', '.join(record.models)}",
    )


def revoke(
    tenant: Tenant,
    token: Annotated[
        str | None, typer.Option("--token", metavar="ID", help="A token.", show_default=False)
    ] = None,
    engine: EngineName = None,
    actor: Actor = "operator",
    config: Config = None,
    json: Json = False,
) -> None:
    """Revoke a token, or an engine with all its tokens, for good.

    Exit codes: 0 revoked.
    """
    if (token is None) == (engine is None):
        raise FiligraneError("name one of them: --token ID or --engine NAME.")
    with opened(config) as counter:
        if token is not None:
            counter.access.revoke_token(tenant, token, actor=actor)
        elif engine is not None:
            counter.access.revoke_engine(tenant, engine, actor=actor)
    render.answer(json, {"revoked": token or engine}, f"revoked {token or engine}")


def list_access(tenant: Tenant, config: Config = None, json: Json = False) -> None:
    """List a tenant's tokens, engines and approvals.

    Exit codes: 0 listed.
    """
    with opened(config) as counter:
        tokens = counter.access.tokens(tenant)
        engines = counter.access.engines(tenant)
        approvals = counter.access.approvals(tenant)
    listed: dict[str, list[dict[str, Any]]] = {
        "tokens": [
            {
                "id": item.id,
                "name": item.name,
                "roles": sorted(item.roles),
                "engine": item.engine,
                "expires_at": _time(item.expires_at),
                "revoked_at": _time(item.revoked_at),
            }
            for item in tokens
        ],
        "engines": [
            {
                "name": item.name,
                "models": list(item.models),
                "last_seen_at": _time(item.last_seen_at),
                "revoked_at": _time(item.revoked_at),
            }
            for item in engines
        ],
        "approvals": [_approval(item) for item in approvals],
    }
    if json:
        render.dump({"tenant": tenant, **listed})
        return
    for title, rows in listed.items():
        if not rows:
            continue
        grid = render.table(title, *list(rows[0])[1:])
        for row in rows:
            grid.add_row(*(Styled(_cell(value)) for value in row.values()))
        render.stdout().print(grid)


def request(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="destroy or trace.", show_default=False)
    ],
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECT", help="What to: for destroy, acme.chat@3.", show_default=False
        ),
    ],
    purpose: Annotated[
        str,
        typer.Option("--purpose", metavar="WORDS", help="Why; it is logged.", show_default=False),
    ],
    token_file: TokenFile,
    config: Config = None,
    json: Json = False,
) -> None:
    """Ask a second person to agree to destroying a key or to tracing a text.

    The tenant is that of the token.

    Exit codes: 0 asked.
    """
    with opened(config) as counter:
        who = principal(counter, token_file)
        made = counter.access.request_approval(who.tenant, kind, subject, purpose, who)
    render.answer(json, _approval(made), f"approval {made.id} waits for a second person")


def approve(
    approval: Annotated[
        str, typer.Argument(metavar="ID", help="Of the approval.", show_default=False)
    ],
    token_file: TokenFile,
    config: Config = None,
    json: Json = False,
) -> None:
    """Agree, as the second person, to what somebody has asked for.

    The tenant is that of the token.

    Exit codes: 0 approved.
    """
    with opened(config) as counter:
        who = principal(counter, token_file)
        made = counter.access.approve(who.tenant, approval, who)
    render.answer(json, _approval(made), f"approved: {made.kind} {made.subject}")


SUBCOMMANDS: Final = {
    "tenant": tenant,
    "token": token,
    "engine": engine,
    "revoke": revoke,
    "list": list_access,
    "request": request,
    "approve": approve,
}


def _approval(made: "Approval") -> dict[str, Any]:
    return {
        "id": made.id,
        "kind": made.kind,
        "subject": made.subject,
        "purpose": made.purpose,
        "requested_by": made.requested_by,
        "approved_by": made.approved_by,
        "expires_at": _time(made.expires_at),
        "used_at": _time(made.used_at),
    }


def _time(when: datetime | None) -> str | None:
    return None if when is None else when.isoformat()


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else render.clean(str(value))
