"""A first service in a folder of its own: one command from nothing to a running one.

For trying out and for a single host. What it writes is what an operator would: a settings file, a
root key under a passphrase, an empty database, one tenant, and a token for each role.
"""

import json
import secrets
import tempfile
from pathlib import Path
from typing import Final

from filigrane.custody.hierarchy import check_name
from filigrane.errors import FiligraneError
from filigrane.keys import _Secret
from filigrane.private_files import new_file
from filigrane.service.settings import FILE, Settings

__all__ = ["TOKENS", "write"]

TOKENS: Final = "tokens.json"
_ACTOR: Final = "operator"
_TEXT: Final = """\
# Settings of filigrane's service, explained in docs/service.md. Paths count from this folder.

[listen]
host = "127.0.0.1"
port = 8470
workers = 1

[database]
url = "sqlite:///filigrane.db"

[kms]
provider = "local"
path = "root.key"
passphrase_file = "root.passphrase"

[tokenizers]
# What texts are read with: that of each model. Keys name one of them when they are made
# (`keys create --tokenizer`); a key that names none is read with the only one there is.
# smollm2 = "smollm2"   # name = "folder with tokenizer.json, .gguf file, or alias"

[public]
tenant = "{tenant}"

[web]
# Without TLS on this machine; behind TLS remove the line.
secure_cookie = false
"""


def write(folder: Path, tenant: str) -> Path:
    """Write everything into `folder` and return the path of the settings file.

    Raises FiligraneError if the folder holds a service already, or cannot be written.
    """
    check_name("tenant", tenant)
    path = folder / FILE
    if path.exists():
        raise FiligraneError(f"{path} exists already; serve it with --config {path}.")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Beside each other first: what a full disk cuts short must not look like a service.
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
            _fill(Path(new), tenant)
            made = sorted(Path(new).iterdir(), key=lambda file: file.name == FILE)
            for file in made:
                if (folder / file.name).exists():
                    raise FiligraneError(
                        f"{folder / file.name} exists; choose an empty folder, it is not touched."
                    )
            for file in made:
                file.rename(folder / file.name)
    except OSError as error:
        if isinstance(error, FiligraneError):
            raise
        raise FiligraneError(
            f"{error.filename or folder}: {error.strerror}; choose an empty folder that you may "
            "write, with room on its disk."
        ) from None
    return path


def _fill(folder: Path, tenant: str) -> None:
    from filigrane.kms.opening import create_kms
    from filigrane.store.access import Access
    from filigrane.store.database import Database, migrate
    from filigrane.store.keys import KeyBook
    from filigrane.store.records import Role

    _write(folder / "root.passphrase", _Secret(secrets.token_urlsafe(32) + "\n"))
    _write(folder / FILE, _Secret(_TEXT.format(tenant=tenant)))
    settings = Settings.load(folder / FILE)
    kms = create_kms(settings.kms)
    try:
        url = settings.database.open_url().reveal()
        migrate(url)
        database = Database.open(url)
        try:
            KeyBook(database, kms).create_tenant(tenant, actor=_ACTOR)
            access = Access(database)
            tokens = {
                str(role): access.issue_token(
                    tenant, f"first-{role}", frozenset({role}), actor=_ACTOR
                )
                for role in Role
                # An engine's token belongs to an engine, which has to be enrolled first.
                if role is not Role.ENGINE
            }
        finally:
            database.close()
    finally:
        kms.close()
    _write(folder / TOKENS, _Secret(json.dumps(tokens, indent=2) + "\n"))


def _write(path: Path, text: _Secret[str]) -> None:
    with new_file(path) as out:
        out.write(text.reveal().encode("utf-8"))
