"""The operator's commands, on a service that `Settings.initial` wrote."""

import contextlib
import json
import os
import re
import sqlite3
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import pgkit
import storekit
from filigrane.cli import access, audit, keys
from filigrane.errors import FiligraneError, NotFound, StateError
from filigrane.keys import Key
from filigrane.service.settings import Settings, open_office
from filigrane.service.tokenizing import BYTES_SHA256, NoTokenizer


class Commands:
    """Runs a command; errors are raised as the application gets them."""

    def __init__(self, config: Path) -> None:
        self.config = str(config)
        self.said = ""

    def __call__(self, module: ModuleType, *arguments: str, code: int = 0) -> str:
        app = typer.Typer()
        for word, function in module.SUBCOMMANDS.items():
            app.command(word)(function)
        env = {"FILIGRANE_CONFIG": self.config, "COLUMNS": "200", "NO_COLOR": "1"}
        done = CliRunner().invoke(app, list(arguments), env=env)
        self.said += done.output
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return done.stdout

    def json(self, module: ModuleType, *arguments: str, code: int = 0) -> Any:
        return json.loads(self(module, *arguments, "--json", code=code))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    Settings.initial(tmp_path / "service")
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path / "service" / "filigrane.toml")


def test_a_provider_from_the_terminal(run: Commands, tmp_path: Path) -> None:
    run(access, "tenant", "acme", "--actor", "op")
    made = run.json(keys, "create", "acme", "chat", "--model", "m", "--scheme", "gumbel")
    assert made["id"] == "acme.chat@1" and made["state"] == "pre-active"
    (tmp_path / "engine.jwk").write_text(json.dumps(storekit.identity()))
    run(access, "engine", "acme", "e1", "--model", "m", "--public-key", "engine.jwk")
    assert "waits for" in run(keys, "rotate", "acme", "chat", "--request-id", "r1")
    assert run.json(keys, "rotate", "acme.chat", "--request-id", "r1")["id"] == "acme.chat@2"
    with pytest.raises(FiligraneError, match="is written tenant"):
        run(keys, "rotate", "acme")
    with pytest.raises(StateError, match="waits for the engines e1"):
        run(keys, "promote", "acme.chat@1")
    run(access, "revoke", "acme", "--engine", "e1")
    assert "acme.chat@1 is active" in run(keys, "promote", "acme.chat@1")
    run(keys, "promote", "acme.chat@2")
    leaked = run.json(keys, "compromise", "acme.chat@1", "--since", "2026-01-01")
    assert leaked["compromised_since"] == "2026-01-01T00:00:00+00:00"
    run(keys, "compromise", "acme.chat@1", "--since", "2025-12-01T00:00:00Z")
    run(keys, "retire", "acme.chat@2")
    with pytest.raises(StateError, match=r"acme\.chat@2 is retired already"):
        run(keys, "retire", "acme.chat@2")
    with pytest.raises(FiligraneError, match="with its zone"):
        run(keys, "compromise", "acme.chat@2", "--since", "yesterday")
    own = Key.generate("own")
    own.save("own.key")
    given = ("--scheme", "gumbel", "--import", "own.key")
    assert run.json(keys, "create", "acme", "own", "--model", "m", *given)["source"] == "imported"
    listed = run.json(keys, "list", "acme")["versions"]
    assert [v["id"] for v in listed] == ["acme.chat@1", "acme.chat@2", "acme.own@1"]
    assert "acme.chat@2" in run(keys, "list", "acme")
    assert own.export_text().rpartition(":")[2][:20] not in run.said


def test_a_key_says_its_tokenizer(run: Commands, tmp_path: Path) -> None:
    made = ("create", "demo")
    mark = ("--model", "m", "--scheme", "gumbel")
    said = run(keys, *made, "chat", *mark, "--tokenizer", "bytes")
    assert f"tokenizer: bytes, sha256 {BYTES_SHA256}\n" in said
    said = run(keys, *made, "same", *mark, "--tokenizer-sha256", BYTES_SHA256)
    assert f"tokenizer: sha256 {BYTES_SHA256}\n" in said
    other = run.json(keys, *made, "other", *mark, "--tokenizer-sha256", "ab" * 32)
    assert other["tokenizer_sha256"] == "ab" * 32
    assert "does not say its tokenizer" not in run.said
    # The notice is not part of the answer.
    assert "tokenizer" not in run(keys, *made, "none", *mark)
    assert "demo.none@1 does not say its tokenizer, so that only token ids" in run.said
    settings = tmp_path / "service" / "filigrane.toml"
    settings.write_text(settings.read_text().replace("# smollm2 =", "smollm2 ="))
    run(keys, *made, "only", *mark)
    assert "demo.only@1 does not say its tokenizer: its texts are read with 'smollm2'" in run.said
    with pytest.raises(FiligraneError, match="one of the two"):
        both = ("--tokenizer", "bytes", "--tokenizer-sha256", BYTES_SHA256)
        run(keys, *made, "both", *mark, *both)
    with pytest.raises(NoTokenizer, match="it has bytes, smollm2"):
        run(keys, *made, "wrong", *mark, "--tokenizer", "mine")
    with open_office(Settings.load(settings)) as office:
        found = {key.spec.name: key.spec.tokenizer_sha256 for key in office.keybook.keys("demo")}
    named = {"chat": BYTES_SHA256, "same": BYTES_SHA256, "other": "ab" * 32}
    assert found == {**named, "none": None, "only": None}
    listed = {v["id"]: v["tokenizer_sha256"] for v in run.json(keys, "list", "demo")["versions"]}
    assert listed == {f"demo.{name}@1": sha256 for name, sha256 in found.items()}
    rows = {row.split()[0]: row.split() for row in run(keys, "list", "demo").splitlines()}
    shown = {"chat": "bytes", "same": "bytes", "other": "abababababab…"}
    for name in found:
        assert rows[f"demo.{name}@1"][4:] == ([shown[name]] if name in shown else [])


def test_two_custodians(run: Commands, tmp_path: Path) -> None:
    run(access, "tenant", "acme")
    run(keys, "create", "acme", "chat", "--model", "m", "--scheme", "gumbel")
    for name in ("ann", "bob"):
        out = run(access, "token", "acme", name, "--role", "custodian", "--out", f"{name}.token")
        assert "fgt_" not in out
        assert (tmp_path / f"{name}.token").stat().st_mode & 0o777 == 0o600
    asked = run.json(
        access,
        *("request", "destroy", "acme.chat@1", "--purpose", "a leak"),
        *("--token-file", "ann.token"),
    )
    with pytest.raises(StateError, match="cannot also approve"):
        run(access, "approve", asked["id"], "--token-file", "ann.token")
    given = ("--approval", asked["id"], "--token-file", "ann.token")
    with pytest.raises(StateError, match="second person"):
        run(keys, "destroy", "acme.chat@1", *given)
    assert "approved: destroy" in run(access, "approve", asked["id"], "--token-file", "bob.token")
    # A person of the same name is another person where they belong to another tenant.
    run(access, "tenant", "globex")
    run(access, "token", "globex", "ann", "--role", "custodian", "--out", "globex.token")
    with pytest.raises(FiligraneError, match="is of globex"):
        run(keys, "destroy", "acme.chat@1", *given[:3], "globex.token")
    assert "is destroyed" in run(keys, "destroy", "acme.chat@1", *given)
    os.chmod("bob.token", 0o644)
    with pytest.raises(FiligraneError, match="others may use"):
        run(access, "approve", asked["id"], "--token-file", "bob.token")
    listed = run.json(access, "list", "acme")
    assert [t["name"] for t in listed["tokens"]] == ["ann", "bob"]
    assert listed["approvals"][0]["used_at"] is not None
    assert "a leak" in run(access, "list", "acme")
    shown = run(access, "token", "acme", "eve", "--role", "auditor", "--days", "1")
    assert re.fullmatch(r"token: fgt_acme_[a-z2-7]{12}_[a-z2-7]{52}\n", shown)
    with pytest.raises(FiligraneError, match="no role 'king'"):
        run(access, "token", "acme", "eve", "--role", "king")
    token = run.json(access, "list", "acme")["tokens"][0]["id"]
    run(access, "revoke", "acme", "--token", token)
    with pytest.raises(NotFound, match="opens nothing"):
        run(access, "approve", asked["id"], "--token-file", "ann.token")


def test_the_log_is_verified_offline(
    run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(access, "tenant", "acme")
    run(keys, "create", "acme", "chat", "--model", "m", "--scheme", "gumbel")
    assert "signed 2 records" in run(audit, "checkpoint", "acme", "--out", "kept.json")
    run(keys, "rotate", "acme", "chat")
    assert "wrote 3 records" in run(audit, "export", "acme", "log.jsonl")
    run(audit, "jwks", "--out", "jwks.json")
    whole = (tmp_path / "log.jsonl").read_bytes()
    assert run(audit, "export", "acme").encode() == whole
    # Neither service nor database from here on.
    os.rename("service", "away")
    given = ("verify", "log.jsonl", "--jwks", "jwks.json", "--trusted", "kept.json")
    report = run.json(audit, *given)
    assert report["verified"] and (report["n_records"], report["n_covered"]) == (3, 3)
    assert report["n_checkpoints"] == 2
    assert "in order: 3 records" in run(audit, *given)
    for changed in (
        whole.replace(b"key.rotate", b"key.create"),
        b"".join(whole.splitlines(keepends=True)[:2]),
        whole.replace(b"acme.chat@1", b"acme.chat@9"),
        b"nonsense\n",
    ):
        (tmp_path / "log.jsonl").write_bytes(changed)
        assert run.json(audit, *given, code=1)["verified"] is False
    # The last checkpoint is cut off: the third record is signed by nobody, whatever was kept.
    cut = b"".join(whole.splitlines(keepends=True)[:-1])
    (tmp_path / "log.jsonl").write_bytes(cut)
    for known in (given, given[:4]):
        refused = run.json(audit, *known, code=1)
        assert refused["reason"] == "1 record at the end is signed by nobody."
        assert run(audit, *known, code=1) == ""
        assert "1 record at the end is signed by nobody" in run.said.splitlines()[-1]
        assert "in order: 3 records" in run(audit, *known, "--allow-unsigned-end")
    (tmp_path / "jwks.json").write_text("[]")
    with pytest.raises(FiligraneError, match="no JSON object"):
        run(audit, *given)


def test_archives_and_migrations(
    run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(access, "tenant", "acme")
    run(keys, "create", "acme", "chat", "--model", "m", "--profile", "vllm-gumbel")
    run(keys, "export", "acme", "acme.archive")
    assert (tmp_path / "acme.archive").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FiligraneError, match="never overwritten"):
        run(keys, "export", "acme", "acme.archive")
    for path in (tmp_path / "service").glob("filigrane.db*"):
        path.unlink()
    with pytest.raises(FiligraneError, match="keys migrate"):
        run(keys, "import", "acme.archive")
    assert run.json(keys, "migrate") == {"before": None, "after": "0001", "granted_to": None}
    assert "nothing to do" in run(keys, "migrate")
    assert run.json(keys, "import", "acme.archive") == {"versions": 1}
    assert run.json(keys, "list", "acme")["versions"][0]["id"] == "acme.chat@1"
    with pytest.raises(FiligraneError, match="set the variable NOWHERE"):
        run(keys, "migrate", "--url-env", "NOWHERE")


def test_a_log_that_was_altered_is_exported_unsigned(run: Commands, tmp_path: Path) -> None:
    run(access, "tenant", "acme")
    run(keys, "create", "acme", "chat", "--model", "m", "--scheme", "gumbel")
    run(audit, "jwks", "--out", "jwks.json")
    with contextlib.closing(sqlite3.connect(tmp_path / "service" / "filigrane.db")) as connection:
        connection.execute("DROP TRIGGER log_no_update")
        connection.execute("UPDATE log SET actor = 'eve' WHERE position = 1")
        connection.commit()
    assert "wrote 2 records" in run(audit, "export", "acme", "log.jsonl", code=1)
    assert "record 1 of acme's log was altered" in run.said
    refused = run.json(audit, "verify", "log.jsonl", "--jwks", "jwks.json", code=1)
    assert "record 1 is not what was logged" in refused["reason"]


def test_migrating_says_whom_it_served(
    cluster: pgkit.Cluster, run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWNER", cluster.empty().owner)
    given = ("migrate", "--url-env", "OWNER", "--service-role", "filigrane_app")
    first, second = run(keys, *given), run(keys, *given)
    assert "was an empty database, granted to filigrane_app" in first
    assert second.endswith(": granted to filigrane_app\n")
    assert run.json(keys, *given)["granted_to"] == "filigrane_app"
