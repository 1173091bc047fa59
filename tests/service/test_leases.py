"""Keys on their way to engines: a real service, a real engine, and everything between them."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bytemodel
import servers
from filigrane.adapters.leases.client import Service as Client
from filigrane.adapters.leases.proof import prove
from filigrane.adapters.leases.sealing import Identity
from filigrane.cli.engine import SUBCOMMANDS
from filigrane.detection import detect
from filigrane.errors import EndpointError
from filigrane.keys import Key, _Secret
from filigrane.schemes import from_tag
from filigrane.service.office import open_office
from filigrane.service.settings import Settings
from filigrane.serving import Keyring
from servicekit import PATIENCE, Service, prepare, problem, running

LEASE_S = 12
MOST = -13.8  # log(1e-6)


@pytest.fixture(scope="module")
def leasing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = prepare(
        tmp_path_factory.mktemp("leasing"),
        sections=f"[engine]\nlease_s = {LEASE_S}\n[limits]\ntoken_cache_s = 0.05\nseconds = 120\n",
        log_level="debug",
    )
    with running(made):
        yield made


def command(name: str) -> list[str]:
    """`filigrane engine NAME`."""
    if name in SUBCOMMANDS:
        return [sys.executable, "-m", "filigrane", "engine", name]
    code = f"import typer; from filigrane.cli.engine_{name} import {name}; typer.run({name})"
    return [sys.executable, "-c", code]


def keys_of(service: Service, *ids: str) -> list[Key]:
    """The keys themselves, as the service derives them."""
    with open_office(Settings.load(service.config)) as office:
        found = [office.keybook.key_of(office.keybook.version("demo", id)) for id in ids]
    assert all(isinstance(key, Key) for key in found)
    return found  # type: ignore[return-value]


def secrets_of(keys: Sequence[Key]) -> list[bytes]:
    """What must be found nowhere: the text of keys, and their bytes as hex and base64."""
    found = []
    for key in keys:
        body = key.export_text().rpartition(":")[2]
        raw = base64.b32decode(body.upper() + "=" * (-len(body) % 8))[:32]
        found += [body.encode(), raw.hex().encode(), base64.b64encode(raw)[:42]]
    return found


def make_key(service: Service, name: str, model: str) -> None:
    with service.client("key-admin") as client:
        spec = {"name": name, "model": model, "scheme": "gumbel", "slots": 2}
        assert client.post("/v1/keys", json=spec).status_code == 201


def enrol(service: Service, identity: Identity, *models: str) -> str:
    """Enrol an engine; its token."""
    with service.client("tenant-admin") as client:
        body = {
            "name": identity.name,
            "models": list(models),
            "public_key": identity.public_key,
        }
        answer = client.post("/v1/engines", json=body)
        assert answer.status_code == 201, answer.text
        token = {"name": identity.name, "roles": ["engine"], "engine": identity.name}
        answer = client.post("/v1/tokens", json=token)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["token"])


def versions(service: Service, name: str) -> dict[int, dict[str, Any]]:
    with service.client("key-admin") as client:
        answer = client.get(f"/v1/keys/{name}")
    assert answer.status_code == 200, answer.text
    return {version["number"]: version for version in answer.json()["versions"]}


def post(service: Service, role: str, path: str, body: object = None) -> Any:
    with service.client(role) as client:
        return client.post(path, json=body) if body is not None else client.post(path)


# ---------------------------------------------------------------- one engine and its token


def test_a_lease_is_sealed_to_the_engine(leasing: Service) -> None:
    mine, other = Identity.generate("sealed-1"), Identity.generate("sealed-2")
    make_key(leasing, "sealed", "m-sealed")
    make_key(leasing, "elsewhere", "m-elsewhere")
    token = _Secret(enrol(leasing, mine, "m-sealed"))
    with Client(leasing.url, token, mine) as client:
        lease, expires = client.lease()
    assert [(key.id, key.state, key.acknowledged) for key in lease.keys] == [
        ("demo.sealed@1", "staged", False)
    ]
    (key,) = keys_of(leasing, "demo.sealed@1")
    assert Key.from_text(lease.keys[0].key.reveal()) == key
    assert lease.lifetime.total_seconds() == LEASE_S and expires > lease.issued_at
    # A stolen token without the private key, even with the engine's name.
    for thief in (other, Identity.generate("sealed-1")):
        wrong = pytest.raises(EndpointError, match="sealed to another identity")
        with Client(leasing.url, token, thief) as client, wrong:
            client.lease()
    import httpx2

    headers = {"Authorization": f"Bearer {token.reveal()}"}
    answer = httpx2.post(
        f"{leasing.url}/v1/engine/lease", json={"nonce": "n" * 32}, headers=headers
    )
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    assert not any(secret in answer.content for secret in secrets_of([key]))
    for nonce in ("", "short", "x" * 65, 'a"' * 16, 3, None):
        answer = httpx2.post(
            f"{leasing.url}/v1/engine/lease", json={"nonce": nonce}, headers=headers
        )
        problem(answer, 422)


def test_only_engines_lease(leasing: Service) -> None:
    for role in leasing.tokens["demo"]:
        for path, body in (
            ("lease", {"nonce": "n" * 32}),
            ("ack", {"version": "demo.sealed@1", "proof": [1, 2]}),
            ("coverage", {"since": "2026-01-01T00:00:00Z", "until": "2026-01-02T00:00:00Z"}),
        ):
            problem(post(leasing, role, f"/v1/engine/{path}", body), 403, "role")
    mine = Identity.generate("dismissed")
    token = enrol(leasing, mine, "m")
    with Client(leasing.url, _Secret(token), mine) as client:
        client.lease()
        with leasing.client("tenant-admin") as admin:
            assert admin.delete("/v1/engines/dismissed").status_code == 204
        time.sleep(0.2)
        with pytest.raises(EndpointError, match="answered 401"):
            client.lease()


def test_proofs(leasing: Service) -> None:
    mine = Identity.generate("prover")
    make_key(leasing, "proved", "m-proved")
    token = enrol(leasing, mine, "m-proved")
    (key,) = keys_of(leasing, "demo.proved@1")
    rng = np.random.default_rng(1)
    promote = "/v1/keys/proved/versions/1/promote"
    problem(post(leasing, "key-admin", promote), 409, "state")
    with Client(leasing.url, _Secret(token), mine) as client:
        for wrong in (rng.integers(1000, size=400).tolist(), [1], [7] * 2000):
            with pytest.raises(EndpointError, match="answered 409"):
                client.acknowledge("demo.proved@1", wrong)
        for other in ("demo.proved@2", "demo.chat@1", "other.chat@1", "x"):
            with pytest.raises(EndpointError, match="answered 404"):
                client.acknowledge(other, [1])
        for ids in ([], [-1], [2**32], ["a"], [0.5], [True], [1] * 20_001):
            with pytest.raises(EndpointError, match="answered 422"):
                client.acknowledge("demo.proved@1", ids)  # type: ignore[arg-type]
        problem(post(leasing, "key-admin", promote), 409, "state")
        good = prove("x", "scheme", "gumbel", _Secret(key.export_text()), rng=rng)
        client.acknowledge("demo.proved@1", good.tolist())
        client.acknowledge("demo.proved@1", good.tolist())
        lease, _ = client.lease()
        assert (lease.keys[0].state, lease.keys[0].acknowledged) == ("staged", True)
        assert post(leasing, "key-admin", promote).status_code == 200
        lease, _ = client.lease()
        assert lease.keys[0].state == "active"
        # An engine that comes later marks when it has proved the version itself.
        late = Identity.generate("late")
        late_token = enrol(leasing, late, "m-proved")
        with Client(leasing.url, _Secret(late_token), late) as second:
            lease, _ = second.lease()
            assert lease.keys[0].state == "staged"
            second.acknowledge("demo.proved@1", good.tolist())
            lease, _ = second.lease()
            assert lease.keys[0].state == "active"
        assert post(leasing, "key-admin", "/v1/keys/proved/versions/1/retire").status_code == 200
        assert client.lease()[0].keys == ()
    with open_office(Settings.load(leasing.config)) as office:
        told = [r for r in office.log.records("demo") if r.kind == "engine.lease"]
    assert [r.facts["versions"] for r in told if r.facts["engine"] == "prover"] == [
        ["demo.proved@1"]
    ]


def test_keys_of_other_tools_are_leased_and_proved(leasing: Service) -> None:
    mine = Identity.generate("native")
    spec = {"name": "native", "model": "m-native", "profile": "vllm-gumbel"}
    assert post(leasing, "key-admin", "/v1/keys", spec).status_code == 201
    token = enrol(leasing, mine, "m-native")
    with Client(leasing.url, _Secret(token), mine) as client:
        (key,) = client.lease()[0].keys
        assert key.kind == "profile"
        rng = np.random.default_rng(1)
        client.acknowledge(key.id, prove(key.id, key.kind, key.mark, key.key, rng=rng).tolist())
        assert client.lease()[0].keys[0].acknowledged


def test_coverage_is_a_ledger_without_words(leasing: Service) -> None:
    mine = Identity.generate("counting")
    token = enrol(leasing, mine, "m")
    import httpx2

    def report(**changed: object) -> Any:
        body = {
            "since": "2026-01-01T00:00:00Z",
            "until": "2026-01-01T01:00:00Z",
            "counts": [
                {"outcome": "marked", "reason": "gumbel", "requests": 5},
                {"outcome": "unmarked", "reason": "opted_out", "requests": 2},
                {"outcome": "refused", "reason": "my secret text", "requests": 1},
            ],
            "marked_tokens": 400,
            "unmarked_tokens": 20,
        }
        return httpx2.post(
            f"{leasing.url}/v1/engine/coverage",
            json={**body, **changed},
            headers={"Authorization": f"Bearer {token}"},
        )

    assert report().status_code == 204
    assert report().status_code == 204  # the same once more: an answer was lost
    assert report(since="2026-01-01T01:00:00Z", until="2026-01-01T02:00:00Z").status_code == 204
    problem(report(until="2026-01-01T00:00:00Z"), 409, "state")
    problem(report(until="2126-01-01T00:00:00Z"), 409, "state")
    many = [{"outcome": "marked", "reason": "gumbel", "requests": 1}] * 129
    for bad in ({"since": "yesterday"}, {"since": "2026-01-01T00:00:00"}, {"counts": many},
                {"marked_tokens": -1}, {"marked_tokens": 2**60}, {"text": "x"}):  # fmt: skip
        problem(report(**bad), 422)
    with leasing.client("auditor") as client:
        lines = client.get("/v1/engine/coverage").json()["engines"]
        mine_only = [line for line in lines if line["engine"] == "counting"]
        until = {"until": "2026-01-01T01:30:00Z"}
        early = client.get("/v1/engine/coverage", params=until).json()["engines"]
    assert mine_only[0]["reports"] == 2 and mine_only[0]["marked_tokens"] == 800
    assert {(c["outcome"], c["reason"]): c["requests"] for c in mine_only[0]["counts"]} == {
        ("marked", "gumbel"): 10,
        ("unmarked", "opted_out"): 4,
        ("refused", "other"): 2,
    }
    assert [line["reports"] for line in early if line["engine"] == "counting"] == [1]
    with leasing.client("detector-expert") as client:
        problem(client.get("/v1/engine/coverage"), 403, "role")
    with open_office(Settings.load(leasing.config)) as office:
        assert "my secret text" not in repr(office.log.records("demo"))


# ---------------------------------------------------------------- from end to end


class Tap:
    """A wire between two ends of a connection that keeps all bytes."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.seen = bytearray()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._server.accept()
                threading.Thread(target=self._join, args=(here,), daemon=True).start()

    def _join(self, here: socket.socket) -> None:
        target = ("127.0.0.1", self.target)
        with suppress(OSError), here, socket.create_connection(target) as there:
            back = threading.Thread(target=self._pass, args=(there, here), daemon=True)
            back.start()
            self._pass(here, there)
            back.join()

    def _pass(self, one: socket.socket, two: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65_536):
                self.seen += data
                two.sendall(data)
        with suppress(OSError):
            two.shutdown(socket.SHUT_WR)


@contextmanager
def process(arguments: Sequence[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as out:
        made = subprocess.Popen(
            arguments,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            yield made
        finally:
            if made.poll() is None:
                made.send_signal(signal.SIGTERM)
                try:
                    made.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(made.pid, signal.SIGKILL)
                    made.wait(10)


def until(done: Callable[[], bool], what: str, patience: float = PATIENCE) -> float:
    started = time.monotonic()
    while not done():
        assert time.monotonic() - started < patience, what
        time.sleep(0.1)
    return time.monotonic() - started


class Engine:
    """The small server, asked on behalf of the tenant."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, **arguments: object) -> tuple[int, dict[str, Any]]:
        body = {
            **{"model": "tiny", "prompt": "The sea", "max_tokens": 120, "ignore_eos": True},
            **{"return_token_ids": True, "filigrane_tenant": "demo"},
            **arguments,
        }
        request = urllib.request.Request(
            f"{self.url}/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def reason(self, **arguments: object) -> str:
        status, body = self.ask(**arguments)
        assert status == 400, body
        return str(body["error"]["code"])

    def key(self) -> str | None:
        """What marks now, or None."""
        status, body = self.ask(max_tokens=8)
        return str(body["filigrane"]["key"]) if status == 200 else None

    def text(self) -> tuple[str, list[int]]:
        status, body = self.ask()
        assert status == 200, body
        return body["filigrane"]["key"], body["choices"][0]["token_ids"]


def test_a_key_from_its_making_to_its_end(leasing: Service, tmp_path: Path) -> None:
    """Enrol, lease, prove, promote, rotate, retire, an outage: the engine is never restarted."""
    ring, identity, token = (tmp_path / name for name in ("ring", "identity.json", "token"))
    made = subprocess.run(
        [*command("enrol"), "gpu-1", "--out", str(identity)],
        capture_output=True,
        text=True,
        check=True,
    )
    jwk = json.loads(made.stdout)
    assert set(jwk) == {"kty", "crv", "x"}
    assert json.loads(identity.read_text())["key"]["d"] not in made.stdout + made.stderr
    mine = Identity.load(identity)
    assert mine.public_key == jwk
    make_key(leasing, "chat", "tiny")
    token.touch(mode=0o600)
    token.write_text(enrol(leasing, mine, "tiny"))
    promote = "/v1/keys/chat/versions/{}/promote"
    refusal = problem(post(leasing, "key-admin", promote.format(1)), 409, "state")
    assert "gpu-1" in refusal["detail"]

    tap = Tap(leasing.port)
    lease = [*command("lease"), "--service", f"http://127.0.0.1:{tap.port}", "--identity"]
    lease += [str(identity), "--token-file", str(token), "--keyring", str(ring)]
    once = subprocess.run(lease, capture_output=True, text=True, check=False)
    assert once.returncode == 0, once.stderr
    assert Keyring.load(ring).entries["demo.chat@1"].state == "staged"
    assert versions(leasing, "chat")[1]["waiting_for"] == []

    port = servers.free_port()
    model = bytemodel.write(tmp_path / "model")
    serve = [*command("serve"), "--model", str(model), "--keyring", str(ring)]
    serve += ["--port", str(port), "--served-model-name", "tiny"]
    log, watch_log = tmp_path / "engine.log", tmp_path / "lease.log"
    with servers.server(serve, port, log, {"OMP_NUM_THREADS": "1"}, patience=180) as url:
        engine = Engine(url)
        # It has the key, and does not mark with it.
        assert engine.reason() == engine.reason(filigrane_key="demo.chat@1") == "staged_key"
        watch = [*lease, "--watch", "--every", "0.4", "--metrics", f"{url[:-3]}/metrics"]
        watch += ["--report-every", "1"]
        with process(watch, watch_log) as watching:
            assert post(leasing, "key-admin", promote.format(1)).status_code == 200
            until(lambda: engine.key() == "demo.chat@1", "version 1 does not mark")
            name, first = engine.text()
            assert name == "demo.chat@1"

            assert post(leasing, "key-admin", "/v1/keys/chat/versions").status_code == 201
            until(lambda: versions(leasing, "chat")[2]["waiting_for"] == [], "no proof comes")
            assert engine.key() == "demo.chat@1"
            assert engine.reason(filigrane_key="demo.chat@2") in ("staged_key", "unknown_key")
            assert post(leasing, "key-admin", promote.format(2)).status_code == 200
            took = until(lambda: engine.key() == "demo.chat@2", "version 2 does not mark")
            assert took < 60
            name, second = engine.text()
            assert name == "demo.chat@2"
            old, new = keys_of(leasing, "demo.chat@1", "demo.chat@2")
            found = [
                [detect(tokens, key, from_tag("gumbel")).log_pvalue for key in (old, new)]
                for tokens in (first, second)
            ]
            assert found[0][0] < MOST < found[0][1] and found[1][1] < MOST < found[1][0], found
            assert engine.reason(filigrane_key="demo.chat@1") == "unknown_key"
            assert [path.name for path in ring.glob("*.key")] == ["demo.chat@2.key"]

            def marked() -> int:
                with leasing.client("auditor") as client:
                    lines = client.get("/v1/engine/coverage").json()["engines"]
                return sum(line["marked_tokens"] for line in lines if line["engine"] == "gpu-1")

            until(lambda: marked() > 0, "no coverage is reported")

            # An outage: it marks until the lease is over, and then nothing.
            leasing.stop(signal.SIGKILL)
            killed = time.monotonic()
            assert engine.key() == "demo.chat@2"
            asked = time.monotonic()
            while engine.key() is not None:
                last, asked = asked, time.monotonic()
                assert last - killed < LEASE_S + 1, "it marks beyond its lease"
            assert engine.reason() == engine.reason(filigrane_mark=True) == "lease_expired"
            assert engine.ask(filigrane_mark=False)[1]["filigrane"]["marked"] is False
            assert watching.poll() is None
            leasing.start()
            until(lambda: engine.key() == "demo.chat@2", "it does not come back")

            # Compromised, with nothing in its place: refused, at once.
            body = {"since": "2026-01-01T00:00:00Z"}
            path = "/v1/keys/chat/versions/2/compromise"
            assert post(leasing, "key-admin", path, body).status_code == 200
            until(lambda: engine.key() is None, "a compromised key marks")
            assert engine.reason() == "no_key" and not list(ring.glob("*.key"))
            cmdlines = [Path(f"/proc/{watching.pid}/cmdline").read_bytes()]
        assert watching.returncode == 0
    tap.close()
    places = {
        "wire": bytes(tap.seen),
        "engine's log": log.read_bytes(),
        "client's log": watch_log.read_bytes(),
        "service's log": leasing.out.read_bytes() + leasing.err.read_bytes(),
        "first round": (once.stdout + once.stderr).encode(),
        "command line": b"".join(cmdlines),
        "keyring": b"".join((ring / n).read_bytes() for n in ("keyring.toml", "leases.json")),
        "database": (leasing.config.parent / "filigrane.db").read_bytes(),
    }
    assert b"/v1/engine/lease" in places["wire"]
    for where, content in places.items():
        assert not any(secret in content for secret in secrets_of([old, new])), where
        if where != "wire":
            assert token.read_bytes() not in content, where
