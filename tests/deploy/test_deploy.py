"""The deployment runs: root, roles, tables, service, tokens, keys, and back from backups alone."""

import json
import secrets
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from deploykit import Bao, Site, done, filigrane

from filigrane.errors import KmsError
from filigrane.keys import _Secret
from filigrane.kms.opening import open_kms
from filigrane.service.settings import Settings
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
    """The rotation of docs/deploying.md. OpenBao's own tokens begin with "s.", and a new OpenBao
    could not be set up with one in the file.
    """
    accessors = site.bao.ask("list", "-format=json", "auth/token/accessors")
    assert len(json.loads(accessors)) == 2, "no root token may be left behind"
    file, new = site.place / "secrets/openbao.token", site.place / "secrets/new"
    kms = open_kms(Settings.load(site.config).kms)
    try:
        first = json.loads(site.bao.ask("token", "lookup", "-format=json", by=file.name))
        new.write_text(secrets.token_hex(32))
        words = (f"id=@{new}", "policies=filigrane", "period=8760h", "display_name=filigrane")
        site.bao.ask("write", "auth/token/create-orphan", *words)
        file.write_text(new.read_text())
        site.bao.ask("write", "auth/token/revoke-accessor", f"accessor={first['data']['accessor']}")
        assert kms.versions()
    finally:
        kms.close()


def test_roles_own_what_they_should(site: Site) -> None:
    rights = "rolsuper::int + rolbypassrls::int + rolcreatedb::int + rolcreaterole::int"
    assert (
        site.psql(
            f"SELECT string_agg(rolname || ({rights}), ',' ORDER BY rolname) FROM pg_roles "
            "WHERE rolname LIKE 'filigrane%'"
        )
        == "filigrane0,filigrane_owner0"
    )
    owners = site.psql("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
    assert owners == "filigrane_owner"
    assert site.psql("SELECT count(*) FROM tenants", role="filigrane") == "0"
    for sql in ("CREATE TABLE a (b int)", "CREATE TEMPORARY TABLE a (b int)", "DROP TABLE log"):
        with pytest.raises(AssertionError, match=r"denied|must be owner"):
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
    deadline = time.monotonic() + 120
    while True:
        answer = httpx2.get(f"{site.service.url}/readyz", timeout=20)
        if answer.status_code == 200 or time.monotonic() > deadline:
            assert answer.status_code == 200, answer.text
            return dict(answer.json())
        time.sleep(0.2)


def test_from_nothing_to_a_detection_and_back_from_backups(site: Site, tmp_path: Path) -> None:
    """The commands of docs/deploying.md, then the restore drill of the same page."""
    components = {part["name"]: part["ok"] for part in ready(site)["components"]}
    assert set(components) >= {"database", "kms", "log", "detection"} and all(components.values())

    filigrane("access", "tenant", "acme", config=site.config)
    file, roles = tmp_path / "token", ("key-admin", "detector-expert")
    words = [word for role in roles for word in ("--role", role)]
    filigrane("access", "token", "acme", "ann", *words, "--out", str(file), config=site.config)
    site.service.tokens["acme"] = dict.fromkeys(roles, file.read_text().strip())
    with site.service.client("key-admin", "acme") as client:
        spec = {"name": "chat", "model": "toy", "scheme": "gumbel", "slots": 2}
        assert client.post("/v1/keys", json=spec).status_code == 201
        assert client.post("/v1/keys/chat/versions/1/promote").status_code == 200
    text = marked_ids(site.service, "acme.chat@1", 200, 1, "acme").tolist()
    receipt = detected(site, text)

    # Backups of both halves, while the service runs.
    root = mac(site.bao)
    dump, snapshot = tmp_path / "filigrane.dump", tmp_path / "openbao.snapshot"
    pg_dump = site.program("pg_dump")
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
    pg_restore = [site.program("pg_restore"), "--exit-on-error", "--single-transaction"]
    done([*pg_restore, "--dbname=filigrane", str(dump)], env=site.postgres())
    filigrane("keys", "migrate", "--service-role", "filigrane", config=site.owner)

    # Everything answers, and nothing would be found: it is another root of the same name.
    site.bao.start()
    assert mac(site.bao) != root
    site.bao.ask("operator", "raft", "snapshot", "restore", "-force", str(snapshot))
    site.bao.stop()
    site.bao.start()
    assert mac(site.bao) == root
    ready(site)
    detected(site, text)
    with httpx2.Client(base_url=site.service.url) as client:
        keys = client.get("/.well-known/jwks.json").json()
    jwks, token = tmp_path / "jwks.json", tmp_path / "receipt"
    jwks.write_text(json.dumps(keys))
    token.write_text(receipt)
    said = filigrane("receipt", "verify", str(token), "--jwks", str(jwks), config=site.config)
    assert "detected" in said


def mac(bao: Bao) -> str:
    words = ("write", "-field=hmac", "transit/hmac/filigrane", "input=YQ==", "key_version=1")
    return bao.ask(*words, by="openbao.token")


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
