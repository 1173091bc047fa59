"""The deployment runs: root, roles, tables, service, tokens, keys, and back from nothing but backups."""

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from conftest import Bao, Site, done, filigrane

from filigrane import embed, from_tag
from filigrane.errors import KmsError
from filigrane.keys import _Secret
from filigrane.kms.opening import open_kms
from filigrane.service.settings import Settings
from filigrane.toy import ZipfModel
from servicekit import marked_ids


def test_the_service_s_token_computes_with_the_root_and_does_nothing_else(site: Site) -> None:
    kms = open_kms(Settings.load(site.config).kms)
    try:
        before = kms.mac(1, b"a message").reveal()
        wrapped = kms.wrap(_Secret(b"a data key"), b"context")
        assert kms.unwrap(wrapped, b"context").reveal() == b"a data key"
        with pytest.raises(KmsError):
            kms.rotate()
        for words in (
            ("write", "-f", "transit/keys/filigrane/rotate"),
            ("delete", "transit/keys/filigrane"),
            ("read", "transit/export/hmac-key/filigrane"),
            ("write", "transit/keys/filigrane/config", "deletion_allowed=true"),
            ("write", "-f", "transit/keys/another"),
            ("write", "auth/token/create-orphan", "policies=filigrane"),
            ("read", "sys/policies/acl/filigrane"),
        ):
            assert "permission denied" in site.bao.ask(*words, by="openbao.token", rc=2), words

        site.bao.ask("write", "-f", "transit/keys/filigrane/rotate")
        assert kms.versions() == (1, 2)
        assert kms.mac(1, b"a message").reveal() == before
        assert "denied" in site.bao.ask(
            "write", "transit/hmac/filigrane", "input=YQ==", by="openbao.operator", rc=2
        )
        assert "root tokens may not" in site.bao.ask(
            "write", "auth/token/create-orphan", "policies=root", rc=2
        )
    finally:
        kms.close()


def test_a_new_token_takes_over_where_the_service_reads_it(site: Site) -> None:
    accessors = site.bao.ask("list", "-format=json", "auth/token/accessors")
    assert len(json.loads(accessors)) == 2, "no root token may be left behind"
    made = site.bao.ask(
        *("write", "-format=json", "auth/token/create-orphan"),
        *("policies=filigrane", "period=8760h", "display_name=filigrane"),
    )
    token = json.loads(made)["auth"]["client_token"]
    file = site.place / "secrets/openbao.token"
    old = file.read_text()
    kms = open_kms(Settings.load(site.config).kms)
    try:
        first = json.loads(site.bao.ask("token", "lookup", "-format=json", by=file.name))
        file.write_text(token)
        site.bao.ask(
            "write", "auth/token/revoke-accessor", f"accessor={first['data']['accessor']}"
        )
        assert old != token and kms.versions()
    finally:
        kms.close()


def test_roles_own_what_they_should(site: Site) -> None:
    rights = "rolsuper::int + rolbypassrls::int + rolcreatedb::int + rolcreaterole::int"
    assert site.psql(
        f"SELECT string_agg(rolname || ({rights}), ',' ORDER BY rolname) FROM pg_roles "
        "WHERE rolname LIKE 'filigrane%'"
    ) == "filigrane0,filigrane_owner0"
    owners = site.psql("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
    assert owners == "filigrane_owner"
    assert site.psql("SELECT count(*) FROM tenants", role="filigrane") == "0"
    for sql in ("CREATE TABLE mine (a int)", "CREATE TEMPORARY TABLE mine (a int)", "DROP TABLE log"):
        with pytest.raises(AssertionError, match="denied|must be owner"):
            site.psql(sql, role="filigrane")
    # Again changes nothing, and sets the passwords that the files hold now.
    password = site.place / "secrets/postgres.service"
    password.write_text("another-password")
    site.make_roles()
    assert site.psql("SELECT 1", role="filigrane") == "1"


def test_roles_with_more_rights_are_refused(site: Site) -> None:
    site.cluster.execute("ALTER ROLE filigrane BYPASSRLS")
    try:
        with pytest.raises(AssertionError, match="more rights than they may have"):
            site.make_roles()
    finally:
        site.cluster.execute("ALTER ROLE filigrane NOBYPASSRLS")
    site.make_roles()


def ready(site: Site) -> dict[str, Any]:
    """Start the service; what /readyz says once it is green."""
    site.service.start()
    deadline = time.monotonic() + 60
    while True:
        answer = httpx2.get(f"{site.service.url}/readyz", timeout=20)
        if answer.status_code == 200 or time.monotonic() > deadline:
            assert answer.status_code == 200, answer.text
            return dict(answer.json())
        time.sleep(0.2)


def test_from_nothing_to_a_detection_and_back_from_backups(site: Site, tmp_path: Path) -> None:
    """The commands of docs/deploying.md, then the restore drill of the same page."""
    components = {part["name"]: part["ok"] for part in ready(site)["components"]}
    assert set(components) == {"database", "kms", "log", "detection"} and all(components.values())

    filigrane("access", "tenant", "acme", config=site.config)
    for role in ("key-admin", "detector-expert"):
        file = tmp_path / role
        filigrane(
            *("access", "token", "acme", f"first-{role}", "--role", role, "--out", str(file)),
            config=site.config,
        )
        site.service.tokens["acme"][role] = file.read_text().strip()
    with site.service.client("key-admin", "acme") as client:
        spec = {"name": "chat", "model": "toy", "scheme": "gumbel", "slots": 2}
        assert client.post("/v1/keys", json=spec).status_code == 201
        assert client.post("/v1/keys/chat/versions/1/promote").status_code == 200
    text = marked_ids(site.service, "acme.chat@1", 200, 1, "acme").tolist()
    receipt = detected(site, text)

    # Backups of both halves, while the service runs.
    dump, snapshot = tmp_path / "filigrane.dump", tmp_path / "openbao.snapshot"
    pg_dump = str(site.cluster.bin / "pg_dump")
    dumping = [pg_dump, "--format=custom", f"--file={dump}", "filigrane"]
    refused = done(dumping, env=site.postgres("filigrane_owner"), rc=1)
    assert "row-level security" in refused
    done(dumping, env=site.postgres())
    site.bao.ask("operator", "raft", "snapshot", "save", str(snapshot))
    assert b"acme.chat" not in snapshot.read_bytes()

    # Everything is lost but backups, secrets and settings.
    assert site.service.stop() == 0
    site.cluster.execute("DROP DATABASE filigrane WITH (FORCE)")
    site.cluster.execute("DROP ROLE filigrane", "DROP ROLE filigrane_owner")
    site.bao.stop()
    site.bao.wipe()

    site.make_roles()
    pg_restore = [str(site.cluster.bin / "pg_restore"), "--exit-on-error", "--single-transaction"]
    done([*pg_restore, "--dbname=filigrane", str(dump)], env=site.postgres())
    filigrane("keys", "migrate", "--service-role", "filigrane", config=site.owner)

    # A root of the same name that is another finds nothing: a drill that stops here has failed.
    site.bao.start()
    ready(site)
    answer = detect(site, text)
    assert answer.status_code >= 400 or answer.json()["verdict"] != "detected", answer.text
    site.service.stop()

    site.bao.ask("operator", "raft", "snapshot", "restore", "-force", str(snapshot))
    site.bao.stop()
    site.bao.start()
    ready(site)
    detected(site, text)
    with httpx2.Client(base_url=site.service.url) as client:
        keys = client.get("/.well-known/jwks.json").json()
    jwks, token = tmp_path / "jwks.json", tmp_path / "receipt"
    jwks.write_text(json.dumps(keys))
    token.write_text(receipt)
    said = filigrane("receipt", "verify", str(token), "--jwks", str(jwks), config=site.config)
    assert "detected" in said


def detect(site: Site, text: list[int]) -> httpx2.Response:
    with site.service.client("detector-expert", "acme") as client:
        return client.post("/v1/detect", json={"tokens": text, "issue_receipt": True})


def detected(site: Site, text: list[int]) -> str:
    """A marked text is found, an unmarked one is not; the receipt of the first."""
    answer = detect(site, text).json()
    assert answer["verdict"] == "detected" and answer["key"] == "acme.chat@1", answer
    other = np.random.default_rng(5).integers(0, 256, 200).tolist()
    assert detect(site, other).json()["verdict"] == "inconclusive"
    return str(answer["receipt"])


def test_a_corpus_is_read_in_pieces(tmp_path: Path) -> None:
    """deploy/ray_corpus.py, without Ray and whatever the pieces are."""
    import ray_corpus

    from filigrane import Key

    key = Key.generate("acme", slots=2)
    key.save(tmp_path / "acme.key")
    rng, scheme = np.random.default_rng(3), from_tag("gumbel")
    lines = []
    for number in range(12):
        ids = rng.integers(0, 256, 120)
        if number % 4 == 1:
            ids = embed(ZipfModel(256, 1.0), np.array([1, 2]), 120, key, scheme, rng=rng).tokens
        lines.append(json.dumps({"tokens": ids.tolist()}))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join([*lines, "", '{"text": "no ids"}', '{"tokens": [1]}']))

    seen = []
    for size in (37, 400, 1_000_000):
        pieces = ray_corpus.ranges(str(corpus), size)
        seen.append(
            [
                found
                for start, stop in pieces
                for found in ray_corpus.examine(
                    str(corpus), start, stop, str(tmp_path / "acme.key"), "gumbel"
                )
            ]
        )
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 14
    out = tmp_path / "out.jsonl"
    with out.open("w") as stream:
        ray_corpus.write(seen[0], stream)
    told = [json.loads(line) for line in out.read_text().splitlines()]
    marked = {line["line"] for line in told if line.get("log10_corrected", 0) < -6}
    assert marked == {2, 6, 10}
    assert [line["problem"] for line in told[-2:]] == ["NoTokens", "TooShort"]


def test_a_corpus_without_ray_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import ray_corpus

    from filigrane import Key

    Key.generate("acme").save(tmp_path / "acme.key")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"tokens": list(range(100))}) + "\n")
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [str(tmp_path / "corpus.jsonl"), "--key-file", str(tmp_path / "acme.key")]
    monkeypatch.setattr(sys, "argv", ["ray_corpus", *words, "--scheme", "gumbel"])
    said: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", said.append)
    monkeypatch.setattr(sys.stdout, "write", said.append)
    assert ray_corpus.main() == 0
    assert "Ray is not installed" in said[0] and re.search(r'"line": 1', said[1])


def test_openbao_keeps_its_root_over_a_restart(site: Site) -> None:
    def mac(bao: Bao) -> str:
        words = ("write", "-field=hmac", "transit/hmac/filigrane", "input=YQ==", "key_version=1")
        return bao.ask(*words, by="openbao.token")

    before = mac(site.bao)
    site.bao.stop()
    site.bao.start()
    assert mac(site.bao) == before
