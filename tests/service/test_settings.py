"""What an operator writes is read strictly: nothing unknown, no secret, no path by accident."""

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest

from filigrane.errors import BudgetSpent, FiligraneError
from filigrane.service.public import PublicLimits
from filigrane.service.settings import Oidc, Settings, open_office, settings_path

KMS = '[kms]\nprovider = "local"\npath = "root.key"\npassphrase_file = "pass"\n'


def load(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "filigrane.toml"
    path.write_text(text)
    return Settings.load(path)


def test_defaults_and_paths_from_the_files_folder(tmp_path: Path) -> None:
    settings = load(tmp_path, KMS + '[database]\nurl = "sqlite:///a.db"\n')
    assert settings.kms["path"] == str(tmp_path / "root.key")
    assert settings.kms["passphrase_file"] == str(tmp_path / "pass")
    assert settings.database.url == f"sqlite:///{tmp_path}/a.db"
    assert settings.listen.host == "127.0.0.1" and settings.oidc is None
    assert settings.limits.token_cache_s <= 10


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"add a table \[kms\]"),
        (KMS + "[limit]\nbody_bytes = 1\n", r"the file has limit \(did you mean limits\?\); known"),
        (
            KMS + "[limits]\nbodybytes = 1\n",
            r"has bodybytes \(did you mean body_bytes\?\); known are",
        ),
        (KMS + "[limits]\nqqq = 1\n", r"\[limits\] has qqq; known are"),
        (KMS + "[limits]\nbody_bytes = true\n", "limits.body_bytes must be a whole number"),
        (KMS + "[limits]\nbody_bytes = 1.5\n", "limits.body_bytes must be a whole number"),
        (KMS + "[limits]\nseconds = 0\n", "limits.seconds is 0; use"),
        (KMS + "[limits]\nseconds = nan\n", "limits.seconds is nan; use"),
        (KMS + "[limits]\ntoken_cache_s = 600\n", "limits.token_cache_s is 600; use"),
        (KMS + "[limits]\nbuffered_bytes = 9_000_000\n", "buffered_bytes is 9e.06; use 6.4e"),
        (KMS + "[listen]\nport = 99999\n", "listen.port is 99999; use 1 to 65535"),
        (KMS + "[listen]\nproxies = [1]\n", "listen.proxies must be a list of texts"),
        (KMS + '[listen]\ntls_key = "k"\n', "TLS takes two files"),
        (KMS + "listen = 3\n", "kms.listen must be a text"),
        ("listen = 3\n" + KMS, r"write \[listen\]"),
        (KMS + "[public]\n", r"\[public\] lacks tenant"),
        (KMS + '[public]\ntenant = "a"\nmax_characters = 0\n', "max_characters is 0; use 1 to"),
        (KMS + '[public]\ntenant = "No Tenant"\n', "cannot be the name of a tenant"),
        (KMS + '[telemetry]\nlog_level = "chatty"\n', "log_level is one of debug"),
        (KMS + "not toml", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FiligraneError, match=says):
        load(tmp_path, text)


def test_tokenizers_are_paths_from_the_files_folder_or_aliases(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    settings = load(tmp_path, KMS + '[tokenizers]\na = "mine"\nb = "smollm2"\n')
    assert settings.tokenizers == {"a": str(tmp_path / "mine"), "b": "smollm2"}


def test_passwords_are_not_in_the_file_nor_in_what_is_shown(tmp_path: Path) -> None:
    for url in (
        "postgresql://u:hunter2@h/n",
        "postgresql+psycopg://u:hunter2@h/n",
        "postgresql://u:hun/hunter2@h/n",
        "postgresql://u@h/n?password=hunter2",
        "postgresql://u@h/n?sslmode=require&PassWord=hunter2",
        "postgresql://u@h/n?sslp%61ssword=hunter2",
    ):
        with pytest.raises(FiligraneError, match="put it into a file") as caught:
            load(tmp_path, KMS + f'[database]\nurl = "{url}"\n')
        assert "hunter2" not in str(caught.value)
    held = tmp_path / "password"
    held.touch(mode=0o600)
    held.write_text("hunter2@/?\n")
    settings = load(
        tmp_path, KMS + '[database]\nurl = "postgresql://u@h/n"\npassword_file = "password"\n'
    )
    assert settings.database.open_url().reveal() == "postgresql://u:hunter2%40%2F%3F@h/n"
    assert "hunter2" not in repr(settings) + repr(settings.database.open_url())
    held.chmod(0o640)
    with pytest.raises(FiligraneError, match="chmod 600"):
        settings.database.open_url()


def test_the_url_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(tmp_path, KMS + '[database]\nurl_env = "SOME_URL"\n')
    monkeypatch.delenv("SOME_URL", raising=False)
    with pytest.raises(FiligraneError, match="set the variable SOME_URL"):
        settings.database.open_url()
    monkeypatch.setenv("SOME_URL", "sqlite:////x.db")
    assert settings.database.open_url().reveal() == "sqlite:////x.db"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"algorithms": ("HS256",)}, "algorithms are among"),
        ({"algorithms": ("none",)}, "algorithms are among"),
        ({"algorithms": ()}, "algorithms are among"),
        ({"leeway_s": 61}, "leeway_s is 61; use 0 to 60"),
        ({"jwks_url": "http://login.example/keys", "jwks_file": None}, "must be https"),
        ({"jwks_url": "https://login.example/keys"}, "name one place"),
        ({"jwks_file": None}, "name one place"),
        ({"audience": ""}, "needs an issuer and an audience"),
    ],
)
def test_identity_providers(change: dict[str, object], says: str) -> None:
    given = {"issuer": "https://i", "audience": "a", "jwks_file": Path("k")} | change
    with pytest.raises(FiligraneError, match=says):
        Oidc(**given)  # type: ignore[arg-type]


def test_a_first_service_in_an_empty_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    settings = Settings.initial(folder, "acme")
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    tokens = json.loads((folder / "tokens.json").read_text())
    assert "engine" not in tokens and set(tokens) >= {"key-admin", "detector-expert", "auditor"}
    with open_office(settings) as office:
        who = office.access.authenticate(tokens["key-admin"])
        assert (who.tenant, set(map(str, who.roles))) == ("acme", {"key-admin"})
        assert office.keybook.keys("acme") == ()
        shown = repr(office)
        office.keybook.tenant_secret("acme")
        held = office.keybook._material._held
        assert held
    # A closed office has no secret any more.
    assert not held
    passphrase = (folder / "root.passphrase").read_text().strip()
    assert passphrase not in shown + (folder / "filigrane.toml").read_text()
    with pytest.raises(FiligraneError, match="exists already"):
        Settings.initial(folder, "acme")


def test_the_first_settings_say_how_texts_are_read(tmp_path: Path) -> None:
    assert Settings.initial(tmp_path / "new").tokenizers == {}
    path = tmp_path / "new" / "filigrane.toml"
    path.write_text(path.read_text().replace("# smollm2 =", "smollm2 ="))
    assert Settings.load(path).tokenizers == {"smollm2": "smollm2"}


def test_the_public_tier_has_the_limits_of_the_settings(tmp_path: Path) -> None:
    settings = Settings.initial(tmp_path / "new")
    assert settings.public is not None
    with open_office(settings) as office:
        assert office.public.limits == PublicLimits(alpha=settings.detector.alpha)
    public = dataclasses.replace(
        settings.public,
        min_tokens=2,
        per_identity="3/hour",
        per_network="4/hour",
        near_duplicates=5,
        max_characters=6,
        receipts="7/hour",
    )
    with open_office(dataclasses.replace(settings, public=public)) as office:
        given = {field.name for field in dataclasses.fields(public)} - {"tenant"}
        for name in given:
            assert getattr(office.public.limits, name) == getattr(public, name), name
        with pytest.raises(BudgetSpent, match="at most 6 characters"):
            office.public.answer("demo", "1234567", identity=None, address=None)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FiligraneError, match="choose an empty folder"):
        Settings.initial(tmp_path / "file" / "below", "acme")


def test_where_the_file_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FILIGRANE_CONFIG", raising=False)
    assert settings_path(None) == Path("filigrane.toml")
    monkeypatch.setenv("FILIGRANE_CONFIG", os.fspath(Path("/etc/f.toml")))
    assert settings_path(None) == Path("/etc/f.toml")
    assert settings_path("mine.toml") == Path("mine.toml")
