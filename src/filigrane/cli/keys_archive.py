"""filigrane keys export, import and migrate."""

import os
from pathlib import Path
from typing import Annotated

import typer

from filigrane.cli import render
from filigrane.cli.keys_office import Actor, Config, Tenant, opened, settings_of, write_private
from filigrane.cli.options import Json
from filigrane.errors import FiligraneError


def export_archive(
    tenant: Tenant,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.", show_default=False)],
    actor: Actor = "operator",
    config: Config = None,
    json: Json = False,
) -> None:
    """Write a tenant's archive: with the same root it makes all its texts readable again.

    Whoever destroys a key has to destroy its archives too. Tokens and jobs are not in it.

    Exit codes: 0 written.
    """
    with opened(config) as counter:
        data = counter.keybook.export_archive(tenant, actor=actor)
    write_private(file, data)
    document = {"tenant": tenant, "file": str(file), "bytes": len(data)}
    render.answer(json, document, f"wrote {file}, {len(data)} bytes")


def import_archive(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive.", show_default=False)],
    actor: Actor = "operator",
    config: Config = None,
    json: Json = False,
) -> None:
    """Restore a tenant that is not in the database from its archive.

    Its signature, its log and every commitment are checked first.

    Exit codes: 0 restored.
    """
    data = file.read_bytes()
    with opened(config) as counter:
        count = counter.keybook.import_archive(data, actor=actor)
    render.answer(json, {"versions": count}, f"restored {count} versions of keys")


def migrate(
    service_role: Annotated[
        str | None,
        typer.Option(
            "--service-role",
            metavar="ROLE",
            help="PostgreSQL: the role by which the service connects; it gets what it needs.",
            show_default=False,
        ),
    ] = None,
    url_env: Annotated[
        str | None,
        typer.Option(
            "--url-env",
            metavar="VARIABLE",
            help="Variable with the URL of the role that owns the tables; else the settings' own.",
            show_default=False,
        ),
    ] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Make or renew the database's tables; stop the service before, and have a backup.

    Exit codes: 0 the tables are those of this version.
    """
    if url_env is None:
        url = settings_of(config).database.open_url().reveal()
    else:
        url = os.environ.get(url_env, "")
        if not url:
            raise FiligraneError(f"--url-env: set the variable {url_env}.")
    try:
        from filigrane.store.database import migrate as run
    except ImportError as error:
        raise FiligraneError(
            f"{error.name} is missing: pip install 'filigrane[service]'."
        ) from None
    before, after = run(url, service_role=service_role)
    # SQLite has no roles: there the option is for nothing.
    granted_to = service_role if url.startswith("postgresql") else None
    done = []
    if before != after:
        done.append(f"was {'an empty database' if before is None else before}")
    if granted_to is not None:
        done.append(f"granted to {granted_to}")
    said = ", ".join(done) or "nothing to do"
    document = {"before": before, "after": after, "granted_to": granted_to}
    render.answer(json, document, f"tables {after}: {said}")
