"""A server's keyring: what a folder may say, and that mistakes are told before anything starts."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from filigrane.errors import FiligraneError, KeyringError
from filigrane.keys import Key
from filigrane.serving.keyring import ENVIRONMENT, Keyring
from filigrane.serving.live import require_live

GOOD = """
policy = "enforce"
schemes = ["gumbel", "greenlist:delta=3"]
default = "common"

[keys.common]

[keys.acme-2026]
tenant = "acme"
schemes = ["tournament"]

[keys.acme-2025]
tenant = "acme"
state = "retired"
file = "old/acme.key"

[tenants.acme]
default = "acme-2026"
tokens_sha256 = ["DIGEST"]
""".replace("DIGEST", hashlib.sha256(b"secret token").hexdigest())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "old").mkdir()
    for name in ("common", "acme-2026", "old/acme"):
        Key.generate(Path(name).name).save(tmp_path / f"{name}.key")
    (tmp_path / "keyring.toml").write_text(GOOD)
    return tmp_path


def test_it_is_read(folder: Path) -> None:
    ring = Keyring.load(folder)
    assert ring.policy == "enforce" and ring.default == "common"
    assert ring.entries["acme-2026"].key == Key.load(folder / "acme-2026.key")
    assert [scheme.name for scheme in ring.entries["common"].schemes] == ["gumbel", "greenlist"]
    assert [scheme.name for scheme in ring.entries["acme-2026"].schemes] == ["tournament"]
    assert [entry.active for entry in ring.entries.values()] == [True, True, False]
    assert {scheme.name for scheme in ring.schemes} == {"gumbel", "greenlist", "tournament"}


def test_tokens_say_who_is_asking(folder: Path) -> None:
    ring = Keyring.load(folder)
    assert ring.tenant_of("secret token") == "acme"
    assert ring.tenant_of("secret token ") is None and ring.tenant_of("") is None


def test_nothing_secret_is_shown(folder: Path) -> None:
    ring = Keyring.load(folder)
    shown = repr(ring)
    for entry in ring.entries.values():
        assert entry.key.export_text().rpartition(":")[2] not in shown
    assert "secret token" not in shown


def edited(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edited('"enforce"', '"forced"'), "policy is 'forced'; use one of default"),
        (edited('policy = "enforce"', 'polic = "enforce"'), "the file has polic; known are"),
        (edited('state = "retired"', 'stat = "retired"'), r"\[keys.acme-2025\] has stat"),
        (edited('state = "retired"', 'state = "revoked"'), "state is 'revoked'"),
        (edited('"gumbel"', '"gumbell"'), "Did you mean 'gumbel'"),
        (edited('["tournament"]', '"tournament"'), "is a list of schemes"),
        (edited('tenant = "acme"\nstate', 'tenant = "acmee"\nstate'), r"\[tenants.acmee\]"),
        (edited('default = "common"', 'default = "acme-2026"'), "the default of the server"),
        (edited('default = "acme-2026"', 'default = "acme-2025"'), "the default of tenant acme"),
        (edited("old/acme.key", "acme-2026.key"), "acme-2026 and acme-2025 are the same key"),
        (edited("old/acme.key", "nobody.key"), "nobody.key: "),
        (edited("[keys.common]", '[keys."a b"]'), "is not a name"),
        (edited("policy =", "policy ="), None),
        (lambda text: text + "\n[tenants.x]\ntokens_sha256 = ['plain token']\n", "64 hex digits"),
        (
            lambda text: text + "\n[tenants.x]\n" + text[text.index("tokens_sha256") :],
            "acme and x share a token",
        ),
        (lambda text: text + "\n[", "cannot be read"),
        (lambda _: "", "lists no key"),
        (lambda _: "keys = 3", "as tables"),
    ],
)
def test_mistakes_are_told(folder: Path, edit: Callable[[str], str], said: str | None) -> None:
    (folder / "keyring.toml").write_text(edit(GOOD))
    if said is None:
        Keyring.load(folder)
        return
    with pytest.raises(KeyringError, match=said) as caught:
        Keyring.load(folder)
    assert "keyring.toml" in str(caught.value) and "plain token" not in str(caught.value)


def test_key_files_are_private(folder: Path) -> None:
    (folder / "common.key").chmod(0o644)
    with pytest.raises(KeyringError, match=r"\[keys.common\]"):
        Keyring.load(folder)


def test_the_environment_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert Keyring.from_environment() is None
    with pytest.raises(FiligraneError, match=ENVIRONMENT):
        require_live()
    monkeypatch.setenv(ENVIRONMENT, os.fspath(folder))
    assert require_live().now().default == "common"
    monkeypatch.setenv(ENVIRONMENT, os.fspath(folder / "nowhere"))
    with pytest.raises(KeyringError, match="does not exist"):
        Keyring.from_environment()
