"""Keyrings on disk, for tests of servers."""

import hashlib
from pathlib import Path

from filigrane import Key

TENANTS = ("acme", "zeta")
TOKENS = {name: f"token-of-{name}-0123456789" for name in TENANTS}


def write(
    folder: Path, *, schemes: str = '"gumbel", "greenlist"', tokens: bool = True, head: str = ""
) -> dict[str, Key]:
    """A keyring of two tenants with a key each; returns the keys by tenant."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [head, f"schemes = [{schemes}]"]
    keys = {}
    for name in TENANTS:
        keys[name] = Key.generate(name)
        keys[name].save(folder / f"{name}.key")
        digest = hashlib.sha256(TOKENS[name].encode()).hexdigest()
        known = f'tokens_sha256 = ["{digest}"]' if tokens else ""
        lines += [
            f'[keys.{name}]\ntenant = "{name}"',
            f'[tenants.{name}]\ndefault = "{name}"',
            known,
        ]
    (folder / "keyring.toml").write_text("\n".join(lines) + "\n")
    return keys


def secrets_of(key: Key) -> list[str]:
    """What must appear nowhere: the key's text, and its secret part alone."""
    text = key.export_text()
    return [text, text.rsplit(":", 1)[1]]
