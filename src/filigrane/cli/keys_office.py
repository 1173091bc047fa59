"""What the commands of an operator share: the service's settings, opened without the service."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from filigrane.cli.secrets import no_core_dumps
from filigrane.errors import FiligraneError, KeyFormatError, MissingDependency
from filigrane.private_files import new_file, why_not

if TYPE_CHECKING:
    from filigrane.service.settings import Settings
    from filigrane.store.access import Access, Principal
    from filigrane.store.keys import KeyBook
    from filigrane.store.log import Log
    from filigrane.store.records import VersionRecord

_ID = re.compile(r"([^.@]+)\.([^.@]+)@([1-9][0-9]{0,5})")
_KEY = re.compile(r"([^.@]+)\.([^.@]+)")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="The service's settings; else the file of FILIGRANE_CONFIG, else filigrane.toml here.",
        show_default=False,
    ),
]
Actor = Annotated[
    str, typer.Option("--actor", metavar="NAME", help="Who does this, for the audit log.")
]
Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="Whose.", show_default=False)]
VersionId = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="A version of a key, as acme.chat@3 names one.", show_default=False
    ),
]
TokenFile = Annotated[
    Path,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="A file that only you can read, with the API token that says who you are.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """What commands work on."""

    keybook: "KeyBook"
    access: "Access"
    log: "Log"


def settings_of(config: Path | None) -> "Settings":
    """The service's settings. Raises FiligraneError, MissingDependency."""
    with _needed():
        from filigrane.service.settings import Settings, settings_path
    return Settings.load(settings_path(config))


@contextlib.contextmanager
def opened(config: Path | None) -> Iterator[Counter]:
    """Database and key management system, until the block ends."""
    no_core_dumps()
    settings = settings_of(config)
    with _needed():
        from filigrane.kms.opening import open_kms
        from filigrane.store.access import Access
        from filigrane.store.database import Database
        from filigrane.store.keys import KeyBook
        from filigrane.store.log import Log
    with contextlib.ExitStack() as closing:
        database = Database.open(settings.database.open_url().reveal())
        closing.callback(database.close)
        kms = open_kms(settings.kms)
        closing.callback(kms.close)
        keybook = KeyBook(database, kms)
        closing.callback(keybook.forget)
        yield Counter(keybook=keybook, access=Access(database), log=Log(database, kms))


def parts(version_id: str) -> tuple[str, str, int]:
    """Tenant, name and number of 'acme.chat@3'."""
    found = _ID.fullmatch(version_id)
    if found is None:
        raise KeyFormatError("a version of a key is written tenant.name@number: acme.chat@3.")
    return found[1], found[2], int(found[3])


def key_name(tenant: str, name: str | None) -> tuple[str, str]:
    """Tenant and name of a key, given as two words or as 'acme.chat'. Raises KeyFormatError."""
    if name is not None:
        return tenant, name
    found = _KEY.fullmatch(tenant)
    if found is None:
        raise KeyFormatError("a key is written tenant.name or tenant name: acme.chat.")
    return found[1], found[2]


def moment(written: str, what: str) -> datetime:
    """A time with its zone, or the begin of a day in UTC. Raises FiligraneError."""
    try:
        when = datetime.fromisoformat(written)
    except ValueError:
        when = None
    if when is not None and _DAY.fullmatch(written):
        when = when.replace(tzinfo=UTC)
    if when is None or when.tzinfo is None:
        raise FiligraneError(
            f"{what}: write a day (UTC), as 2026-11-02, or a time with its zone, as "
            "2026-11-02T09:30:00Z."
        )
    return when


def principal(counter: Counter, token_file: Path) -> "Principal":
    """Who a token belongs to. Raises FiligraneError if the file is open to others, NotFound."""
    from filigrane.service.settings import secret_line

    return counter.access.authenticate(secret_line(token_file, "--token-file").reveal())


def write_private(path: Path, content: bytes) -> None:
    """A new file that only its owner can read; FiligraneError if it cannot be made."""
    try:
        with new_file(path) as out:
            out.write(content)
    except OSError as error:
        raise FiligraneError(f"{path}: {why_not(error)}.") from None


def told(record: "VersionRecord") -> dict[str, Any]:
    """A version as JSON; nothing of it is secret."""
    times = {
        name: None if value is None else value.isoformat()
        for name in ("created_at", "promoted_at", "retired_at", "compromised_since", "destroyed_at")
        for value in [getattr(record, name)]
    }
    return {
        "id": record.id,
        "state": record.state.value,
        "model": record.spec.model,
        "mark": record.spec.mark,
        "tokenizer_sha256": record.spec.tokenizer_sha256,
        "slots": record.spec.slots,
        "source": record.spec.source,
        "commitment": record.commitment,
        "log_index": record.log_index,
        "root_version": record.root_version,
        "acknowledged": list(record.acknowledged),
        "waiting_for": list(record.waiting_for),
        **times,
    }


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if isinstance(error, FiligraneError):
            raise
        raise MissingDependency(
            f"{error.name} is missing: pip install 'filigrane[service]'."
        ) from None
