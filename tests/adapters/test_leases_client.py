"""Leases without a service: the seal and who can open it, the folder, and a service that cheats."""

import base64
import dataclasses
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joserfc.jwk import OKPKey

from filigrane import foreign
from filigrane.adapters.leases.client import Service, read_token
from filigrane.adapters.leases.folder import BASE, LeaseFolder
from filigrane.adapters.leases.keeping import Keeper
from filigrane.adapters.leases.metrics import Counts, since
from filigrane.adapters.leases.proof import prove
from filigrane.adapters.leases.sealing import (
    Identity,
    Lease,
    LeasedKey,
    check_public_key,
    new_nonce,
    seal,
    unseal,
)
from filigrane.detection import detect
from filigrane.errors import EndpointError, KeyFormatError, KeyringError, SecretLeakError
from filigrane.keys import Key, _Secret
from filigrane.schemes import SCHEMES, from_tag
from filigrane.serving import Keyring

AT = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
KEYS = {id: Key.generate(id, slots=2) for id in ("acme.chat@1", "acme.chat@2", "zeta.chat@1")}


def lease(
    *states: str, nonce: str = "n" * 32, tenant: str = "acme", engine: str = "gpu-1", **more: Any
) -> Lease:
    """A lease of acme.chat@1, @2 ... with these states."""
    keys = []
    for number, state in enumerate(states, 1):
        if state:
            id = f"{tenant}.chat@{number}"
            text = _Secret(KEYS[id].export_text())
            keys.append(LeasedKey(id=id, state=state, kind="scheme", mark="gumbel", key=text))  # type: ignore[arg-type]
    given = {"tenant": tenant, "engine": engine, "nonce": nonce, "keys": tuple(keys)}
    times = {"issued_at": AT, "expires_at": AT + HOUR}
    return Lease(**(given | times | more))  # type: ignore[arg-type]


def bodies() -> list[str]:
    return [key.export_text().rpartition(":")[2] for key in KEYS.values()]


# ---------------------------------------------------------------- the seal


def test_only_the_engine_opens_it() -> None:
    mine, other = Identity.generate("gpu-1"), Identity.generate("gpu-1")
    said = lease("active", "staged")
    sealed = seal(said, mine.public_key)
    opened = unseal(sealed, mine, nonce=said.nonce)
    assert [(k.id, k.state, k.key.reveal()) for k in opened.keys] == [
        (k.id, k.state, k.key.reveal()) for k in said.keys
    ]
    assert (opened.tenant, opened.issued_at, opened.lifetime) == ("acme", AT, HOUR)
    with pytest.raises(EndpointError, match="sealed to another identity"):
        unseal(sealed, other, nonce=said.nonce)
    # Nor with the header rewritten to name the other one.
    head, _, rest = sealed.partition(".")
    header = json.loads(base64.urlsafe_b64decode(head + "=="))
    header["kid"] = other.key_id
    forged = base64.urlsafe_b64encode(json.dumps(header).encode()).decode().rstrip("=")
    with pytest.raises(EndpointError, match="damaged, or was not sealed for this engine"):
        unseal(f"{forged}.{rest}", other, nonce=said.nonce)


def test_a_replayed_or_misdirected_lease_is_refused() -> None:
    mine = Identity.generate("gpu-1")
    with pytest.raises(EndpointError, match="put an old one back"):
        unseal(seal(lease("active"), mine.public_key), mine, nonce=new_nonce())
    other = lease("active", engine="gpu-2")
    with pytest.raises(EndpointError, match="made out to engine 'gpu-2', this is 'gpu-1'"):
        unseal(seal(other, mine.public_key), mine, nonce=other.nonce)


def test_damage_is_told_without_what_was_inside() -> None:
    mine = Identity.generate("gpu-1")
    said = lease("active")
    sealed = seal(said, mine.public_key)
    rng = np.random.default_rng(3)
    letters = "ABCDEFGHabcdefgh0123-_."
    for _ in range(200):
        at = int(rng.integers(len(sealed) - 1))  # the last letter holds bits that nobody reads
        changed = letters[rng.integers(len(letters))]
        if sealed[at] == changed:
            continue
        with pytest.raises(EndpointError) as caught:
            unseal(sealed[:at] + changed + sealed[at + 1 :], mine, nonce=said.nonce)
        assert not any(body in str(caught.value) for body in bodies())
    for nonsense in ("", "....", "a.b.c.d.e", "é", sealed[:50], "x" * 5_000_000):
        with pytest.raises(EndpointError):
            unseal(nonsense, mine, nonce=said.nonce)


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"nonce": 3},
        {"keys": [{}]},
        {"expires_at": "2026-06-01T11:00:00Z"},
        {"expires_at": "2036-06-01T11:00:00Z"},
        {"issued_at": "2026-06-01T12:00:00"},
        {"id": "../../etc/passwd"},
        {"id": "acme.chat@0"},
        {"id": "zeta.chat@1"},
        {"state": "retired"},
        {"kind": "other"},
        {"key": ""},
    ],
)
def test_what_is_inside_is_checked(change: dict[str, object]) -> None:
    """Ids become file names; a lease of one tenant holds no other's keys."""
    from joserfc import jwe

    mine = Identity.generate("gpu-1")
    said = lease("active")
    inside = json.loads(mine.decrypt(seal(said, mine.public_key)).reveal())
    target = inside["keys"][0] if set(change) <= set(inside["keys"][0]) else inside
    target.update(change)
    header = {"alg": "ECDH-ES+A256KW", "enc": "A256GCM", "kid": mine.key_id}
    sealed = jwe.encrypt_compact(
        header,
        json.dumps(inside).encode(),
        check_public_key(mine.public_key),
        algorithms=["ECDH-ES+A256KW", "A256GCM"],
    )
    with pytest.raises(EndpointError, match="says something"):
        unseal(sealed, mine, nonce=said.nonce)


def test_an_identity_stays_where_it_is(tmp_path: Path) -> None:
    mine = Identity.generate("gpu-1")
    path = tmp_path / "identity.json"
    mine.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    private = json.loads(path.read_text())["key"]["d"]
    again = Identity.load(path)
    assert (again.name, again.public_key) == (mine.name, mine.public_key)
    assert private not in repr(again) + json.dumps(again.public_key)
    with pytest.raises(SecretLeakError):
        again.__reduce_ex__(2)
    with pytest.raises(KeyFormatError, match="never overwritten"):
        mine.save(path)
    path.chmod(0o640)
    with pytest.raises(KeyFormatError, match="others"):
        Identity.load(path)
    path.chmod(0o600)
    public = json.dumps({"engine": "gpu-1", "key": mine.public_key})
    for nonsense in ("", "{}", "[]", '{"engine": 3, "key": {}}', private, public):
        path.write_text(nonsense)
        with pytest.raises(KeyFormatError) as caught:
            Identity.load(path)
        assert private not in str(caught.value)
    with pytest.raises(KeyFormatError):
        Identity.generate("no spaces")


def test_only_public_keys_are_sealed_to() -> None:
    good = Identity.generate("gpu-1").public_key
    check_public_key(good)
    check_public_key({name: good[name] for name in ("kty", "crv", "x")})
    private = dict(OKPKey.generate_key("X25519").as_dict(private=True))
    signing = dict(OKPKey.generate_key("Ed25519").as_dict(private=False))
    wrong: list[dict[str, object]] = [{}, {"kty": "OKP"}, private, signing, {**good, "x": "AA"}]
    wrong += [{**good, "x": 3}, {**good, "crv": "X448"}, {**good, "d": "AAAA"}]
    for jwk in wrong:
        with pytest.raises(KeyFormatError, match="not the public key of an engine") as caught:
            seal(lease("active"), jwk)
        assert str(private["d"]) not in str(caught.value)


# ---------------------------------------------------------------- proofs


@pytest.mark.parametrize(
    "tag", [*SCHEMES, "greenlist:gamma=0.25,delta=1", "gumbel:context_width=1"]
)
def test_proofs_show_the_key_and_no_other(tag: str) -> None:
    key, other = Key.generate("a"), Key.generate("b")
    rng = np.random.default_rng(5)
    one, two = (prove("a", "scheme", tag, _Secret(key.export_text()), rng=rng) for _ in range(2))
    assert detect(one, key, from_tag(tag)).log_pvalue < -20.8  # 1e-9, which the service asks for
    assert detect(one, other, from_tag(tag)).log_pvalue > -14
    assert one.tolist() != two.tolist()


def test_proofs_of_other_tools_marks() -> None:
    profile = foreign.from_tag("vllm-gumbel")
    key = foreign.ForeignKey.derive(Key.generate("a"), profile)
    text = _Secret(key.export_text())
    proof = prove("a", "profile", profile.tag, text, rng=np.random.default_rng(5))
    assert profile.read(foreign.Written(tokens=proof), key).log_pvalue < -20.8


# ---------------------------------------------------------------- the folder


def states(folder: Path) -> dict[str, str]:
    return {id: entry.state for id, entry in Keyring.load(folder).entries.items()}


def test_leases_of_two_tenants_make_one_keyring(tmp_path: Path) -> None:
    tmp_path /= "ring"
    (tmp_path).mkdir()
    digest = "ab" * 32
    (tmp_path / BASE).write_text(
        f'policy = "enforce"\n[tenants.acme]\ntokens_sha256 = ["{digest}"]\n[keys.own]\n'
    )
    Key.generate("own").save(tmp_path / "own.key")
    with LeaseFolder.open(tmp_path) as folder:
        folder.put(lease("active", "staged"), expires=AT + HOUR, at=AT)
        folder.put(lease("active", tenant="zeta"), expires=AT + 2 * HOUR, at=AT)
    ring = Keyring.load(tmp_path)
    assert {id: e.state for id, e in ring.entries.items()} == {
        **{"own": "active", "acme.chat@1": "active"},
        **{"acme.chat@2": "staged", "zeta.chat@1": "active"},
    }
    assert ring.policy == "enforce" and ring.tenants["acme"].tokens_sha256 == (digest,)
    assert ring.tenants["acme"].default == "acme.chat" and ring.entries["own"].expires is None
    assert ring.entries["acme.chat@1"].expires == AT + HOUR
    assert ring.entries["zeta.chat@1"].tenant == "zeta"
    for path in tmp_path.iterdir():
        if path.name not in (BASE, "own.key"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    open_texts = [tmp_path / "keyring.toml", tmp_path / "leases.json"]
    assert not any(body in path.read_text() for body in bodies() for path in open_texts)


def test_a_rotation_in_the_folder(tmp_path: Path) -> None:
    with LeaseFolder.open(tmp_path) as folder:
        folder.put(lease("active"), expires=AT + HOUR, at=AT)
        folder.put(lease("active", "staged"), expires=AT + HOUR, at=AT)
        assert states(tmp_path) == {"acme.chat@1": "active", "acme.chat@2": "staged"}
        folder.put(lease("", "active"), expires=AT + HOUR, at=AT)
        assert states(tmp_path) == {"acme.chat@2": "active"}
        assert not (tmp_path / "acme.chat@1.key").exists()
        # Nothing is left: everything is refused, and nothing marks with what is gone.
        folder.put(lease(), expires=AT + HOUR, at=AT)
        assert states(tmp_path) == {} and not list(tmp_path.glob("*.key"))
    assert not list(tmp_path.glob("*.new")) and not list(tmp_path.glob(".trial*"))


def test_a_lease_that_says_the_same_is_written_at_half_time(tmp_path: Path) -> None:
    with LeaseFolder.open(tmp_path) as folder:
        path = tmp_path / "keyring.toml"
        folder.put(lease("active"), expires=AT + HOUR, at=AT)
        written = path.stat().st_mtime_ns
        for minutes, renewed in ((1, False), (29, False), (31, True)):
            now = AT + timedelta(minutes=minutes)
            folder.put(lease("active"), expires=now + HOUR, at=now)
            assert (path.stat().st_mtime_ns != written) == renewed
        ring = Keyring.load(tmp_path)
        assert ring.entries["acme.chat@1"].expires == AT + timedelta(minutes=91)
        written = path.stat().st_mtime_ns
        folder.put(lease("staged"), expires=now + HOUR, at=now)
        assert path.stat().st_mtime_ns != written


def test_another_process_goes_on(tmp_path: Path) -> None:
    """And what somebody has put back or changed by hand is written over."""
    with LeaseFolder.open(tmp_path) as folder:
        folder.put(lease("active", "staged"), expires=AT + HOUR, at=AT)
        old = (tmp_path / "keyring.toml").read_text()
        folder.put(lease("", "active"), expires=AT + HOUR, at=AT)
        busy = pytest.raises(KeyringError, match="another `filigrane engine lease`")
        with busy, LeaseFolder.open(tmp_path):
            pass
    with LeaseFolder.open(tmp_path) as folder:
        assert set(folder.leased) == {"acme"}
        (tmp_path / "keyring.toml").write_text(old)
        folder.compose()
        assert states(tmp_path) == {"acme.chat@2": "active"}
        (tmp_path / BASE).write_text('policy = "opt-in"\n')
        folder.compose()
        assert Keyring.load(tmp_path).policy == "opt-in"


def test_a_base_that_makes_no_sense(tmp_path: Path) -> None:
    """What engines see stays; a default that a lease no longer holds does not keep it alive."""
    with LeaseFolder.open(tmp_path) as folder:
        folder.put(lease("active"), expires=AT + HOUR, at=AT)
        before = (tmp_path / "keyring.toml").read_text()
        for bad in ('policy = "x"', "[keys.gone]", "[", "x = 1.5", '[keys."acme.chat@1"]'):
            (tmp_path / BASE).write_text(bad + "\n")
            with pytest.raises(KeyringError):
                folder.compose()
            assert (tmp_path / "keyring.toml").read_text() == before
        for default in ("acme.chat", "acme.chat@1"):
            (tmp_path / BASE).write_text(f'[tenants.acme]\ndefault = "{default}"\n')
            folder.put(lease("active"), expires=AT + HOUR, at=AT)
            assert Keyring.load(tmp_path).tenants["acme"].default == default
            folder.put(lease(), expires=AT + HOUR, at=AT)
            assert Keyring.load(tmp_path).tenants["acme"].default is None
    (tmp_path / "leases.json").write_text("{}")
    with pytest.raises(KeyringError, match="damaged"), LeaseFolder.open(tmp_path):
        pass


@pytest.mark.parametrize("unmarked", [False, True])
def test_keys_whose_lease_is_long_over_go(tmp_path: Path, unmarked: bool) -> None:
    if unmarked:
        (tmp_path / BASE).write_text('expired = "unmarked"\n')
    with LeaseFolder.open(tmp_path) as folder:
        folder.put(lease("active"), expires=AT + HOUR, at=AT)
        folder.put(lease("active", tenant="zeta"), expires=AT + 2 * HOUR, at=AT)
        assert folder.sweep(AT + 24 * HOUR) == ()
        gone = () if unmarked else ("acme.chat@1",)
        assert folder.sweep(AT + 25 * HOUR) == gone
        assert set(states(tmp_path)) == {"acme.chat@1", "zeta.chat@1"} - set(gone)
        assert (tmp_path / "acme.chat@1.key").exists() == unmarked
        assert folder.drop("zeta") == ("zeta.chat@1",) and folder.drop("zeta") == ()
    assert not (tmp_path / "zeta.chat@1.key").exists()
    assert "zeta" not in (tmp_path / "leases.json").read_text()


def test_keys_for_everybody(tmp_path: Path) -> None:
    with LeaseFolder.open(tmp_path) as folder:
        folder.put(lease("active"), expires=AT + HOUR, everybody=True, at=AT)
    ring = Keyring.load(tmp_path)
    assert ring.default == "acme.chat" and ring.entries["acme.chat@1"].tenant is None


@pytest.mark.parametrize("everybody", [False, True])
def test_the_default_stays_when_a_second_key_comes(tmp_path: Path, everybody: bool) -> None:
    """An engine that has never seen the first alone has none."""
    text = _Secret(Key.generate("acme.api@1").export_text())
    api = LeasedKey(id="acme.api@1", state="active", kind="scheme", mark="gumbel", key=text)
    one = lease("active")
    both = dataclasses.replace(one, keys=(*one.keys, api))

    def default(folder: Path) -> str | None:
        ring = Keyring.load(folder)
        return ring.default if everybody else ring.tenants["acme"].default

    for name, leases in (("old", (one, both)), ("new", (both,))):
        with LeaseFolder.open(tmp_path / name) as folder:
            for said in leases:
                folder.put(said, expires=AT + HOUR, everybody=everybody, at=AT)
    assert default(tmp_path / "old") == "acme.chat" and default(tmp_path / "new") is None
    with LeaseFolder.open(tmp_path / "old") as folder:  # what is gone does not stay
        only = dataclasses.replace(one, keys=(api,))
        folder.put(only, expires=AT + HOUR, everybody=everybody, at=AT)
    assert default(tmp_path / "old") == "acme.api"


def test_keys_of_other_tools_have_no_place_there(tmp_path: Path) -> None:
    text = _Secret("12345")
    other = LeasedKey(id="acme.old@1", state="active", kind="profile", mark="vllm-gumbel", key=text)
    said = lease("active")
    with LeaseFolder.open(tmp_path) as folder:
        more = lease("active", keys=(*said.keys, other))
        assert folder.put(more, expires=AT + HOUR, at=AT) == ("acme.old@1",)
    assert states(tmp_path) == {"acme.chat@1": "active"}
    assert not any("12345" in path.read_text() for path in tmp_path.iterdir() if path.is_file())


# ---------------------------------------------------------------- a service that cheats


@contextmanager
def serving(
    answer: Callable[[str, dict[str, Any]], tuple[int, bytes]],
) -> Iterator[tuple[str, list[Any]]]:
    """A real HTTP server; what it was asked is kept."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            status, content = answer(self.path, body)
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_service_that_plays_an_old_lease_again(tmp_path: Path) -> None:
    mine = Identity.generate("gpu-1")
    old = seal(lease("active", nonce="o" * 32), mine.public_key)
    kept: dict[str, bytes] = {}

    def answer(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path == "/v1/engine/ack":
            return 204, b""
        if "lease" not in kept or body["nonce"] == kept["nonce"].decode():
            fresh = seal(lease("staged", "active", nonce=body["nonce"]), mine.public_key)
            kept.setdefault("lease", json.dumps({"lease": fresh}).encode())
            return 200, json.dumps({"lease": fresh}).encode()
        return 200, json.dumps({"lease": old}).encode()

    with (
        serving(answer) as (url, asked),
        LeaseFolder.open(tmp_path) as folder,
        Service(url, _Secret("token"), mine) as service,
    ):
        fresh, _ = service.lease()
        folder.put(fresh, expires=datetime.now(UTC) + HOUR, at=AT)
        kept["nonce"] = b""
        done = Keeper([service], folder, rng=np.random.default_rng(1)).round()
        assert not done.good and "put an old one back" in done.problems[0]
        assert states(tmp_path) == {"acme.chat@1": "staged", "acme.chat@2": "active"}
    nonces = [body["nonce"] for path, _, body in asked if path.endswith("lease")]
    assert len(set(nonces)) == len(nonces) == 2
    said = json.dumps(asked)
    assert not any(body in said for body in bodies())
    assert all(headers["Authorization"] == "Bearer token" for _, headers, _ in asked)


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (401, b'{"detail": "Not signed in."}', "answered 401: Not signed in."),
        (503, b"<html>", "answered 503: nothing that"),
        (500, json.dumps({"detail": "a\nb"}).encode(), "nothing that"),
        (200, b"[]", "answered 200"),
        (200, b"{}", "something else than a lease"),
        (200, b'{"lease": 3}', "something else than a lease"),
        (200, b'{"lease": "a.b.c.d.e"}', "cannot be opened"),
        (307, b"", "answered 307"),
        (200, b"[" * 200_000, "answered 200"),
        (200, b" " * (9 * 2**20), "more than a lease"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, status: int, content: bytes, said: str) -> None:
    mine = Identity.generate("gpu-1")
    with (
        serving(lambda *_: (status, content)) as (url, _),
        Service(url, _Secret("token"), mine) as service,
        pytest.raises(EndpointError, match=said),
    ):
        service.lease()


@pytest.mark.parametrize(
    ("status", "code", "gone"),
    [
        (401, "token", True),
        (404, "not_found", True),
        (401, None, False),
        (404, None, False),
        (404, "token", False),
        (403, "role", False),
        (503, "store_unavailable", False),
    ],
)
def test_an_engine_that_was_let_out_keeps_no_keys(
    tmp_path: Path, status: int, code: str | None, gone: bool
) -> None:
    """But only the service itself can say so: a proxy's 404 takes nothing away."""
    said = json.dumps({"detail": "No."} | ({} if code is None else {"code": code})).encode()
    mine = Identity.generate("gpu-1")
    until = datetime.now(UTC) + HOUR
    with (
        serving(lambda *_: (status, said)) as (url, _),
        LeaseFolder.open(tmp_path) as folder,
        Service(url, _Secret("fgt_acme_x_y"), mine) as service,
    ):
        folder.put(lease("active", "staged"), expires=until, at=until - HOUR)
        folder.put(lease("active", tenant="zeta"), expires=until, at=until - HOUR)
        done = Keeper([service], folder, rng=np.random.default_rng(1)).round()
    assert not done.good and f"answered {status}" in done.problems[0]
    left = {"zeta.chat@1"} if gone else {"acme.chat@1", "acme.chat@2", "zeta.chat@1"}
    assert {path.stem for path in tmp_path.glob("*.key")} == left == set(states(tmp_path))
    assert ("removed from this host: acme.chat@1, acme.chat@2." in done.problems) == gone


def test_a_service_that_is_not_there(tmp_path: Path) -> None:
    mine = Identity.generate("gpu-1")
    with (
        Service("http://127.0.0.1:9", _Secret("token"), mine) as service,
        pytest.raises(EndpointError, match="does not answer"),
    ):
        service.lease()
    for url in (
        "http://example.org",
        "ftp://x",
        "x",
        "https://u:p@h",
        "https://h/?q",
        "http://[::",
    ):
        with pytest.raises(EndpointError, match="address") as caught:
            Service(url, _Secret("token"), mine)
        assert "u:p" not in str(caught.value)


def test_tokens_come_from_private_files(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(EndpointError, match="cannot be read"):
        read_token(path)
    path.write_text("fgt_acme_x_yyyy\n")
    path.chmod(0o600)
    assert read_token(path).reveal() == "fgt_acme_x_yyyy"
    path.write_text("two words")
    with pytest.raises(EndpointError, match="does not hold one token") as caught:
        read_token(path)
    assert "two words" not in str(caught.value)
    path.chmod(0o644)
    with pytest.raises(EndpointError, match="chmod 600"):
        read_token(path)


def test_counts_since_the_last_look() -> None:
    first = Counts(requests={("marked", "gumbel"): 5}, marked_tokens=50, unmarked_tokens=4)
    second = Counts(
        requests={("marked", "gumbel"): 7, ("refused", "greedy"): 1},
        marked_tokens=70,
        unmarked_tokens=9,
    )
    assert since(first, second) == Counts(
        requests={("marked", "gumbel"): 2, ("refused", "greedy"): 1},
        marked_tokens=20,
        unmarked_tokens=5,
    )
    assert not since(first, first)
    # The engine was started anew.
    assert since(second, first) == first


def test_the_core_needs_none_of_it() -> None:
    """Engines read keyrings without the packages that leases need."""
    code = "import filigrane.serving, filigrane.adapters.admission, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert not {"joserfc", "httpx2", "sqlalchemy"} & set(done.stdout.split())
