"""filigrane audit: the log of a tenant, exported, signed and verified."""

import io
import json as json_text
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from filigrane.cli import render
from filigrane.cli.keys_office import Config, Tenant, opened
from filigrane.cli.options import Json
from filigrane.errors import AuditError, FiligraneError

Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="A file, instead of stdout.", show_default=False
    ),
]


def export(
    tenant: Tenant,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Where to; else stdout.", show_default=False),
    ] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Write a tenant's whole log as JSON lines: records, hashes, checkpoints.

    The last line is a checkpoint over all of it, signed now if there was none. It holds no text, no
    score and no secret. `filigrane audit verify` checks it anywhere.

    Exit codes: 0 written; 1 written, but unsigned: the log was altered in the database.
    """
    held = io.BytesIO()
    with opened(config) as counter:
        count = counter.log.export(tenant, held)
        try:
            counter.log.check()
            altered = None
        except AuditError as error:
            altered = str(error)
    if file is None:
        # Lines of JSON with or without --json.
        typer.echo(held.getvalue(), nl=False)
    else:
        file.write_bytes(held.getvalue())
        document = {"tenant": tenant, "file": str(file), "records": count}
        render.answer(json, document, f"wrote {count} records to {file}")
    if altered is not None:
        render.fail(altered)
        raise typer.Exit(1)


def checkpoint(tenant: Tenant, out: Out = None, config: Config = None, json: Json = False) -> None:
    """Sign a tenant's log as it is now, and keep the checkpoint in the database.

    Keep it elsewhere too, with --out or --json: `verify --trusted` shows by it that nothing was cut
    off or written anew.

    Exit codes: 0 signed.
    """
    with opened(config) as counter:
        made = counter.log.checkpoint(tenant)
    if out is not None:
        out.write_text(json_text.dumps(made.to_json()) + "\n", encoding="ascii")
    said = f"signed {made.size} records of {tenant} by {made.key_id}; root {made.root}"
    render.answer(json, made.to_json(), said)


def jwks(out: Out = None, config: Config = None, json: Json = False) -> None:
    """Print the public keys that checkpoints are verified with, a JWK set, with or without --json.

    Exit codes: 0 printed.
    """
    with opened(config) as counter:
        made = counter.log.jwks()
    if out is None or json:
        render.dump(made)
    if out is not None:
        out.write_text(json_text.dumps(made) + "\n", encoding="ascii")


def verify(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A log, as export wrote it.", show_default=False),
    ],
    keys: Annotated[
        Path,
        typer.Option(
            "--jwks",
            metavar="FILE",
            help="The service's public keys, from its /.well-known/jwks.json or `audit jwks`.",
            show_default=False,
        ),
    ],
    trusted: Annotated[
        Path | None,
        typer.Option(
            "--trusted",
            metavar="FILE",
            help="A checkpoint that was kept: the log must extend it.",
            show_default=False,
        ),
    ] = None,
    allow_unsigned_end: Annotated[
        bool,
        typer.Option(
            "--allow-unsigned-end",
            help="Only warn of records after the last checkpoint, as a log has that was copied "
            "while it grew.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Check a log that was exported: every record, every hash, every signature. Needs no service.

    An export ends with a checkpoint over all of it: records that none covers are what is left of a
    longer log. A log that was cut right behind an older checkpoint looks whole, and one that was
    written anew by whoever has the service's root does too: only --trusted tells.

    Exit codes: 0 in order; 1 altered, cut, reordered, signed by others, or unsigned at the end.
    """
    from filigrane.custody.checkpoints import Checkpoint
    from filigrane.custody.verification import read_lines, verify_log

    known = _read(keys)
    try:
        kept = None if trusted is None else Checkpoint.from_json(_read(trusted))
        with file.open("rb") as lines:
            report = verify_log(read_lines(lines), known, kept)
    except AuditError as error:
        if json:
            render.dump({"verified": False, "reason": str(error)})
        else:
            render.fail(str(error))
        raise typer.Exit(1) from None
    loose = report.n_records - report.n_covered
    said = (
        f"{loose} {'record' if loose == 1 else 'records'} at the end "
        f"{'is' if loose == 1 else 'are'} signed by nobody"
    )
    if loose:
        hint = "" if allow_unsigned_end else ": the log was cut, or copied while it grew"
        render.warn(said + hint)
    if loose and not allow_unsigned_end:
        if json:
            render.dump({"verified": False, "reason": f"{said}."})
        raise typer.Exit(1)
    render.answer(
        json,
        {"verified": True, **{name: getattr(report, name) for name in report.__slots__}},
        f"the log of {report.tenant} is in order: {report.n_records} records, "
        f"{report.n_checkpoints} checkpoints, {report.n_covered} records covered",
        f"head: {report.head}",
    )
    if json:
        return
    if report.n_backwards:
        render.warn(f"{report.n_backwards} records are dated before the one before them")
    if kept is None:
        render.notice(
            f"the last record is of {report.last_at}; whether others followed it, a checkpoint "
            "that was kept elsewhere tells: --trusted FILE"
        )


SUBCOMMANDS: Final = {
    "export": export,
    "checkpoint": checkpoint,
    "jwks": jwks,
    "verify": verify,
}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json_text.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FiligraneError(f"{path} holds no JSON object.")
    return value
