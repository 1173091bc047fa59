"""filigrane keys: the life of a provider's keys, on the service's own database."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text as Styled

from filigrane.cli import render
from filigrane.cli.keys_archive import export_archive, import_archive, migrate
from filigrane.cli.keys_office import (
    Actor,
    Config,
    Tenant,
    TokenFile,
    VersionId,
    key_name,
    moment,
    opened,
    parts,
    principal,
    settings_of,
    told,
)
from filigrane.cli.options import Json, Slots
from filigrane.errors import FiligraneError

if TYPE_CHECKING:
    from filigrane.custody.hierarchy import KeySpec
    from filigrane.foreign import ForeignKey
    from filigrane.keys import Key
    from filigrane.service.settings import Settings
    from filigrane.store.records import VersionRecord

Name = Annotated[str, typer.Argument(metavar="NAME", help="The key's name.", show_default=False)]
RequestId = Annotated[
    str | None,
    typer.Option(
        "--request-id",
        metavar="ID",
        help="Asking again with the same one makes nothing new.",
        show_default=False,
    ),
]


def create(
    tenant: Tenant,
    name: Name,
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODEL", help="What marks with it.", show_default=False),
    ],
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", "-s", metavar="TAG", help="The scheme of its mark.", show_default=False
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="TAG",
            help="Another tool's mark instead, e.g. vllm-gumbel.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="NAME",
            help="The model's tokenizer, to read texts: a name of [tokenizers] in the settings.",
            show_default=False,
        ),
    ] = None,
    tokenizer_sha256: Annotated[
        str | None,
        typer.Option(
            "--tokenizer-sha256",
            metavar="HEX",
            help="The same by its fingerprint, as `filigrane embed --json` says it.",
            show_default=False,
        ),
    ] = None,
    slots: Slots = 8,
    source: Annotated[
        Path | None,
        typer.Option(
            "--import",
            metavar="FILE",
            help="Take over the key of this file instead of deriving one; once more: its next "
            "version.",
            show_default=False,
        ),
    ] = None,
    request_id: RequestId = None,
    actor: Actor = "operator",
    config: Config = None,
    json: Json = False,
) -> None:
    """Make a key with its first version, which does not mark before it is promoted.

    Its commitment goes into the audit log in the same moment.

    Exit codes: 0 made.
    """
    from filigrane.custody.hierarchy import KeySpec

    settings = settings_of(config)
    if tokenizer is not None:
        if tokenizer_sha256 is not None:
            raise FiligraneError("name one of the two: --tokenizer or --tokenizer-sha256.")
        tokenizer_sha256 = _fingerprint(tokenizer, settings)
    spec = KeySpec(
        tenant=tenant,
        name=name,
        model=model,
        scheme=scheme,
        profile=profile,
        tokenizer_sha256=tokenizer_sha256,
        slots=slots,
        source="derived" if source is None else "imported",
    )
    with opened(config) as counter:
        if source is None:
            record = counter.keybook.create(spec, actor=actor, request_id=request_id)
        else:
            record = counter.keybook.import_key(spec, _read(source, spec), actor=actor)
    _show(record, json, tokenizer=tokenizer)
    if tokenizer_sha256 is None:
        render.notice(_unread(record.id, settings))


def list_keys(tenant: Tenant, config: Config = None, json: Json = False) -> None:
    """List a tenant's keys with all their versions and what each waits for.

    Exit codes: 0 listed.
    """
    with opened(config) as counter:
        found = counter.keybook.keys(tenant)
    versions = [version for key in found for version in key.versions]
    if json:
        render.dump({"tenant": tenant, "versions": [told(version) for version in versions]})
        return
    grid = render.table("version", "state", "model", "mark", "tokenizer", "waits for")
    for version in versions:
        spec, waits = version.spec, ", ".join(version.waiting_for)
        reader = _short(spec.tokenizer_sha256)
        cells = (version.id, version.state.value, spec.model, spec.mark, reader, waits)
        grid.add_row(*map(Styled, cells))
    render.stdout().print(grid)


def rotate(
    tenant: Annotated[
        str, typer.Argument(metavar="TENANT", help="Whose; or acme.chat.", show_default=False)
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The key's name.", show_default=False)
    ] = None,
    request_id: RequestId = None,
    actor: Actor = "operator",
    config: Config = None,
    json: Json = False,
) -> None:
    """Make the next version of a key; the present one marks until that is promoted.

    Exit codes: 0 made.
    """
    owner, key = key_name(tenant, name)
    with opened(config) as counter:
        record = counter.keybook.rotate(owner, key, actor=actor, request_id=request_id)
    _show(record, json)


def promote(
    version: VersionId, actor: Actor = "operator", config: Config = None, json: Json = False
) -> None:
    """Let a version mark; the one that did is retired in the same moment.

    It has to be in the log, to pass calibration, and every engine of its model has to have it.

    Exit codes: 0 it marks now.
    """
    tenant, name, number = parts(version)
    with opened(config) as counter:
        record = counter.keybook.promote(tenant, name, number, actor=actor)
    _show(record, json)


def retire(
    version: VersionId, actor: Actor = "operator", config: Config = None, json: Json = False
) -> None:
    """Let a version mark no more; its texts stay readable.

    Exit codes: 0 done.
    """
    tenant, name, number = parts(version)
    with opened(config) as counter:
        record = counter.keybook.retire(tenant, name, number, actor=actor)
    _show(record, json)


def compromise(
    version: VersionId,
    since: Annotated[
        str,
        typer.Option(
            "--since",
            metavar="TIME",
            help="From when on others may have had it: 2026-11-02 (UTC), 2026-11-02T09:30:00Z.",
            show_default=False,
        ),
    ],
    actor: Actor = "operator",
    config: Config = None,
    json: Json = False,
) -> None:
    """Say that others may have a version: what it finds counts only for texts from before.

    Exit codes: 0 done.
    """
    tenant, name, number = parts(version)
    when = moment(since, "--since")
    with opened(config) as counter:
        record = counter.keybook.compromise(tenant, name, number, since=when, actor=actor)
    _show(record, json)


def destroy(
    version: VersionId,
    approval: Annotated[
        str,
        typer.Option(
            "--approval",
            metavar="ID",
            help="Of two custodians: `filigrane access request`, then `access approve`.",
            show_default=False,
        ),
    ],
    token_file: TokenFile,
    config: Config = None,
    json: Json = False,
) -> None:
    """Erase what a version is made from: no text can ever be read with it again.

    Backups and archives made before still hold it.

    Exit codes: 0 destroyed.
    """
    tenant, name, number = parts(version)
    with opened(config) as counter:
        who = principal(counter, token_file)
        if who.tenant != tenant:
            raise FiligraneError(
                f"this token is of {who.tenant}, and {version} is not: use one of {tenant}."
            )
        record = counter.keybook.destroy(tenant, name, number, actor=who.name, approval=approval)
    _show(record, json)


SUBCOMMANDS: Final = {
    "create": create,
    "list": list_keys,
    "rotate": rotate,
    "promote": promote,
    "retire": retire,
    "compromise": compromise,
    "destroy": destroy,
    "export": export_archive,
    "import": import_archive,
    "migrate": migrate,
}


def _read(path: Path, spec: "KeySpec") -> "Key | ForeignKey":
    from filigrane.foreign import ForeignKey, from_tag
    from filigrane.keys import Key

    if spec.profile is None:
        return Key.load(path)
    return ForeignKey.load(path, from_tag(spec.profile).key_form)


def _fingerprint(name: str, settings: "Settings") -> str:
    from filigrane.service.tokenizing import Tokenizers

    return Tokenizers(settings.tokenizers).sha256(name)


def _unread(version_id: str, settings: "Settings") -> str:
    from filigrane.service.tokenizing import Tokenizers

    only = Tokenizers(settings.tokenizers).only
    if only is not None:
        return (
            f"{version_id} does not say its tokenizer: its texts are read with {only!r} as long as "
            "[tokenizers] holds no other; --tokenizer NAME says it for good."
        )
    return (
        f"{version_id} does not say its tokenizer, so that only token ids can be tested: set "
        "[tokenizers] in the settings, and create keys with --tokenizer NAME."
    )


def _short(tokenizer_sha256: str | None) -> str:
    """What a table says of a tokenizer. Its name would take loading all that the settings have."""
    from filigrane.service.tokenizing import BYTES_SHA256

    if tokenizer_sha256 is None:
        return ""
    return "bytes" if tokenizer_sha256 == BYTES_SHA256 else f"{tokenizer_sha256[:12]}…"


def _show(record: "VersionRecord", json: bool, *, tokenizer: str | None = None) -> None:
    """tokenizer: its name, if it was given by name."""
    lines = [f"{record.id} is {record.state.value}", f"commitment: {record.commitment}"]
    if record.spec.tokenizer_sha256 is not None:
        name = "" if tokenizer is None else f"{tokenizer}, "
        lines.append(f"tokenizer: {name}sha256 {record.spec.tokenizer_sha256}")
    if record.waiting_for:
        lines.append(f"waits for: {', '.join(record.waiting_for)}")
    render.answer(json, told(record), *lines)
