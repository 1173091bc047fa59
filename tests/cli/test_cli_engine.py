"""filigrane engine: check, token, probe and vllm-config, as programs."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from filigrane.foreign import ForeignKey, from_tag
from filigrane.keys import Key


def run(*arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "filigrane", "engine", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | (env or {})
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Key.generate("acme").save(tmp_path / "acme.key")
    (tmp_path / "keyring.toml").write_text(
        'default = "acme"\nschemes = ["gumbel", "greenlist"]\n[keys.acme]\n'
    )
    return tmp_path


def test_check(folder: Path) -> None:
    done = run("check", str(folder))
    assert done.returncode == 0, done.stderr
    key = Key.load(folder / "acme.key")
    assert key.fingerprint in done.stdout and "found, log10 p gumbel -183" in done.stdout
    said = json.loads(run("check", str(folder), "--json").stdout)
    assert said["keys"][0]["schemes"][0] == "gumbel:context_width=4"
    assert said["known_answers"]["greenlist"] < -50
    assert key.export_text().rpartition(":")[2] not in done.stdout + json.dumps(said)
    (folder / "keyring.toml").write_text('[keys.acme]\nstat = "retired"\n')
    done = run("check", str(folder))
    assert done.returncode == 2 and "[keys.acme] has stat" in done.stderr and not done.stdout


def test_token() -> None:
    said = json.loads(run("token", "--json").stdout)
    assert hashlib.sha256(said["token"].encode()).hexdigest() == said["sha256"]
    lines = run("token").stdout.splitlines()
    token, digest = lines[0].removeprefix("token: "), lines[1].split('"')[1]
    assert len(lines) == 2 and hashlib.sha256(token.encode()).hexdigest() == digest
    assert token != said["token"]


def test_vllm_config(folder: Path) -> None:
    out = folder / "watermark.yaml"
    ring = str(folder / "acme.key")
    done = run("vllm-config", str(out), "--key-file", ring, "--user", "3", "-p", "vllm-dual-gumbel")
    assert done.returncode == 0, done.stderr
    profile = from_tag("vllm-dual-gumbel")
    number = ForeignKey.derive(Key.load(ring).user(3), profile).reveal()[0]
    settings = json.loads(out.read_text())["watermark-config"]
    assert settings["key"] == number and settings["algorithm"] == "dual_key_gumbel"
    assert (settings["alpha"], settings["context_width"]) == (0.1, 4)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert str(number) not in done.stdout + done.stderr
    again = run("vllm-config", str(out), "--key-file", ring)
    assert again.returncode == 2 and "never overwritten" in again.stderr
    other = run("vllm-config", str(folder / "x"), "--key-file", ring, "-p", "sglang-gumbel")
    assert other.returncode == 2 and "is not vLLM's" in other.stderr


class Elsewhere(BaseHTTPRequestHandler):
    """A server that answers, and does not mark."""

    answer: ClassVar[dict[str, Any]] = {}
    status: ClassVar[int] = 200

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(self.answer).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, type[Elsewhere]]]:
    handler = type("Handler", (Elsewhere,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
        server.shutdown()


def test_a_probe_of_what_does_not_mark(
    folder: Path, elsewhere: tuple[str, type[Elsewhere]]
) -> None:
    url, handler = elsewhere
    asked = ["probe", url, "--model", "m", "--keyring", str(folder)]
    handler.answer = {"choices": [{"token_ids": list(range(120))}]}
    done = run(*asked)
    assert done.returncode == 1 and "NOT MARKED" in done.stdout
    assert json.loads(run(*asked, "--json").stdout)["found"] is False
    handler.answer = {"choices": [{"text": "only text"}]}
    done = run(*asked)
    assert done.returncode == 2 and "returns no token ids" in done.stderr
    handler.status, handler.answer = 401, {"error": "who is the token of nobody?"}
    done = run(*asked, env={"FILIGRANE_TENANT_TOKEN": "the token of nobody"})
    assert (
        done.returncode == 2 and "401" in done.stderr and "the token of nobody" not in done.stderr
    )
    assert run("probe", "http://127.0.0.1:9/v1", *asked[2:]).returncode == 2
    assert run(*asked, "--key", "nobody").returncode == 2


@pytest.mark.model
def test_a_probe_of_what_marks(folder: Path, tmp_path: Path) -> None:
    import servers

    port = servers.free_port()
    command = [sys.executable, "-m", "filigrane", "engine", "serve", "--model", "smollm2"]
    command += ["--keyring", str(folder), "--port", str(port)]
    env = {"OMP_NUM_THREADS": "1"}
    with servers.server(command, port, tmp_path / "log", env, patience=300) as url:
        for scheme in ("gumbel", "greenlist"):
            done = run(
                *("probe", url, "--model", "smollm2", "--keyring", str(folder), "--scheme", scheme),
                *("--alpha", "1e-4", "--json"),
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert json.loads(done.stdout)["found"] is True
